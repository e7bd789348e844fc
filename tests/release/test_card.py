from pathlib import Path
from typing import Any

import pytest

from roadseg.release.archive import load_release
from roadseg.release.card import card
from tests.conftest import RGB, write_release


def evaluation(**changes: Any) -> dict[str, Any]:
    iou = {"red": 0.9, "green": 0.25, "blue": None}
    return {
        "source": "town", "split": "val", "images": 12, "miou": 0.575, "pixel_accuracy": 0.8, "mean_accuracy": 0.7,
        "runtime": "onnxruntime 1 CPU", "data_fingerprint": "d" * 64, "class_iou": iou,
        "classes": [{"name": c.name, "color": list(c.color), "train_frequency": 0.5} for c in RGB.trained],
        **changes,
    }  # fmt: skip


def test_the_card_describes_model_data_scores_and_weaknesses(release_path: Path) -> None:
    release = load_release(release_path)
    text = card(release, evaluation())
    assert text.startswith(f"# roadseg release {release.digest[:12]}\n") and release.digest in text
    for part in (
        "3 classes",
        "mIoU **57.50 %**",
        "| green | 25.00 | 50.00 |",
        "| blue | absent | 50.00 |",
        "Weakest classes here: green (25.0 %), red (90.0 %).",
        "town val (12 images)",
        "f" * 64,
        "d" * 64,
        "terms of the test",
    ):
        assert part in text, part


def test_the_same_arguments_give_the_same_card(release_path: Path) -> None:
    assert card(load_release(release_path), evaluation()) == card(load_release(release_path), evaluation())


def test_without_scores_and_with_a_commit(tmp_path: Path) -> None:
    release = load_release(write_release(tmp_path / "model.tar.gz", code_commit="abc123"))
    text = card(release, evaluation(miou=None, class_iou=dict.fromkeys(["red", "green", "blue"])))
    assert "commit `abc123`" in text and "mIoU **absent" in text


def test_names_can_not_break_the_table(tmp_path: Path) -> None:
    """A class called a|b is one cell: names come from anybody's label file."""
    names = {"red": 0.5, "a|b": 0.4, "<script>": 0.3}
    classes = [{"name": n, "color": [0, 0, 0], "train_frequency": None} for n in names]
    text = card(load_release(write_release(tmp_path / "m.tar.gz")), evaluation(class_iou=names, classes=classes))
    rows = [line for line in text.splitlines() if line.startswith("| ") and "class" not in line]
    assert all(row.count("|") == 4 for row in rows), rows
    assert "<script>" not in text


@pytest.mark.parametrize("missing", ["miou", "class_iou", "classes", "runtime"])
def test_a_missing_entry_is_an_error(release_path: Path, missing: str) -> None:
    whole = evaluation()
    del whole[missing]
    with pytest.raises(KeyError):
        card(load_release(release_path), whole)
