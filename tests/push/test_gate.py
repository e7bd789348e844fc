import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadseg.errors import GateRefused
from roadseg.push.gate import decide, table


def evaluation(miou: float | None, release: str = "a", **changes: object) -> dict:
    iou = {"road": miou, "sky": None}
    return {
        "release": release * 64, "miou": miou, "class_iou": iou, "data_fingerprint": "f", "runtime": "r", **changes
    }  # fmt: skip


def test_the_first_is_promoted() -> None:
    assert decide(evaluation(0.1), None, 0.002).outcome == "promoted"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_a_smaller_gain_is_refused(candidate: float, champion: float, least: float) -> None:
    decision = decide(evaluation(candidate, "a"), evaluation(champion, "b"), least)
    assert (decision.outcome == "promoted") == (candidate - champion >= least)
    assert decision.miou_gain == candidate - champion


def test_the_champion_again_is_unchanged() -> None:
    assert decide(evaluation(0.5), evaluation(0.5), 0.0).outcome == "unchanged"


@pytest.mark.parametrize("change", [{"data_fingerprint": "g"}, {"runtime": "s"}, {"class_iou": {"road": 0.5}}])
def test_different_data_runtime_or_classes_are_refused(change: dict) -> None:
    with pytest.raises(GateRefused, match="different"):
        decide(evaluation(0.9, "a", **change), evaluation(0.1, "b"), 0.0)


def test_no_score_is_refused() -> None:
    with pytest.raises(GateRefused, match="no mIoU"):
        decide(evaluation(None), None, 0.0)


def test_the_table_lists_each_class() -> None:
    text = table(decide(evaluation(0.4, "a"), evaluation(0.5, "b"), 0.0))
    assert "mIoU" in text and "-0.1000" in text
    assert text.splitlines()[-1].split() == ["sky", "absent", "absent", "absent"]
