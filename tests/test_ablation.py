"""benchmarks/ablation.py: the network that a row of its table is measured for, and what a run left behind."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from roadseg.config.sections import Config, load_config
from roadseg.model import Architecture, build
from roadseg.model.surgery import set_output_stride
from roadseg.sweep.plan import Point
from roadseg.sweep.table import spread

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("ablation")
    sys.path.remove(str(BENCHMARKS))


def config(strides: list[int | None], **model: Any) -> Config:
    """The first stride is the model's, the others begin at later shares of the run."""
    later = strides[1:]
    phases = [{"after": (i + 1) / 8, "crop_px": [64, 64], "output_stride": s} for i, s in enumerate(later)]
    small = {"backbone": "test_efficientnet", "channels": 8, "head": "separable", "atrous_rates": [2, 4, 6]}
    model = {**small, "backbone_weights": "none", "output_stride": strides[0], **model}
    return load_config(None, {"data": {"source": "camvid"}, "model": model, "training": {"phases": phases}})


@pytest.mark.parametrize(
    ("strides", "rates"),
    [
        ([16], (2, 4, 6)),
        ([16, None], (2, 4, 6)),
        ([16, 8], (4, 8, 12)),
        ([16, None, 8, None], (4, 8, 12)),
        ([8, 16], (1, 2, 3)),
        ([32, 16, 8], (8, 16, 24)),
        ([16, 8, 16], (2, 4, 6)),
    ],
)
def test_rates_follow_the_output_stride_as_in_training(
    ablation: ModuleType, strides: list[int | None], rates: tuple[int, ...]
) -> None:
    found = ablation.architecture_of(config(strides))
    assert found.atrous_rates == rates and found.num_classes == ablation.CLASSES and not found.auxiliary
    network = build(ablation.architecture_of(config(strides[:1])), seed=0)
    for stride in strides[1:]:
        if stride:
            set_output_stride(network, stride)
    assert found == network.architecture


def test_a_difference_is_bold_beyond_twice_its_standard_error(ablation: ModuleType) -> None:
    base, one = spread([0.5530, 0.5310, 0.5404]), spread([0.5410])  # 54.1 and 1.1 points
    assert ablation.against(spread([0.4885]), base) == "**−5.3**"
    assert ablation.against(spread([0.5181]), base) == "−2.3"  # of one run 2.5 points tell
    assert ablation.against(spread([0.5180, 0.5181, 0.5182]), base) == "**−2.3**"
    assert ablation.against(spread([0.7]), one) == "+15.9"  # of one run of the base nothing is known
    assert ablation.against(None, base) == ""


def test_a_row_is_measured_for_what_the_change_ships(ablation: ModuleType) -> None:
    """Networks alike in all but the rates or the stride are told apart, those that ship the same are not."""
    phased, at_8 = config([16, 8]), config([8], atrous_rates=[4, 8, 12])
    keys = [ablation.network_key(ablation.architecture_of(c)) for c in (phased, at_8, config([8]), config([16]))]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert ablation.architecture_of(phased) == Architecture(
        num_classes=11,
        backbone="test_efficientnet",
        output_stride=8,
        channels=8,
        head="separable",
        atrous_rates=(4, 8, 12),
        dropout=phased.model.dropout,
    )


@pytest.mark.parametrize("recipe", [False, True])
def test_the_base_is_short_or_the_recipe_itself(
    ablation: ModuleType, recipe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = BENCHMARKS.parent / "configs" / "camvid.yaml"
    monkeypatch.setattr(sys, "argv", ["ablation", "--config", str(path), *(["--recipe"] if recipe else [])])
    made, shipped = ablation.base_config(ablation.arguments()), load_config(path)
    assert made.data.holdout_sequences == ("0006R0",) and made.training.pictures == 0
    t = made.training
    if recipe:
        expected = shipped.training.model_copy(update={"pictures": 0})
        assert (made.model, t) == (shipped.model, expected)
    else:
        assert (t.steps, t.validate_every, t.compile, made.model.early_strides) == (2000, 2000, "never", (2, 2))
        assert (t.loss.cross_entropy, t.augment.class_mix, t.augment.rotate_deg) == (1, 0, 5)


def test_the_recipe_at_another_length_forgets_over_the_same_share(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = BENCHMARKS.parent / "configs" / "camvid.yaml"
    monkeypatch.setattr(sys, "argv", ["ablation", "--config", str(path), "--recipe", "--steps", "3500"])
    made, shipped = ablation.base_config(ablation.arguments()).training, load_config(path).training
    assert (made.steps, made.validate_every, made.compile) == (3500, 3500, "auto")
    assert made.steps * made.weight_decay == pytest.approx(shipped.steps * shipped.weight_decay)
    assert made.loss == shipped.loss and made.augment == shipped.augment
    monkeypatch.setattr(
        sys, "argv", ["ablation", "--config", str(path.with_name("cityscapes-baseline.yaml")), *sys.argv[3:]]
    )
    with pytest.raises(SystemExit, match="counts epochs"):
        ablation.base_config(ablation.arguments())


@pytest.mark.parametrize("timed", [True, False])
def test_a_run_that_had_only_its_validation_left_is_a_result(
    ablation: ModuleType, timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a start trains no step, and has no speed to tell."""

    def train_candidate(config: Config, shards: Any, work: Path) -> None:
        (work / "history.jsonl").write_text(json.dumps({"step": 2, "split": "val", "miou": 0.5}) + "\n")
        (work / "log").mkdir()
        if timed:
            (work / "log" / "bottleneck.json").write_text(json.dumps({"images_per_s": 12.5}))

    monkeypatch.setattr(ablation.stage, "train_candidate", train_candidate)
    shards = type("Shards", (), {"fingerprints": {"val": "f"}})()
    result = ablation.trained(Point("p", "base", 0, config([16])), shards, tmp_path / "work")
    assert result.miou == {"val": 0.5} and result.images_per_s == (12.5 if timed else None)
    assert ablation.scored(result).startswith(f"mIoU: val 50.00 %; {12.5 if timed else '?'} images/s, ")
