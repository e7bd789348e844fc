"""From shards to the candidate archive, on the three-class set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from roadseg.config.sections import Config, load_config
from roadseg.data.batches.plan import LoaderPlan
from roadseg.data.shards.index import Shards
from roadseg.errors import ArchiveError, ConfigError, RoadsegError
from roadseg.files import read_json, read_json_lines, sha256_file
from roadseg.inference.predictor import Predictor
from roadseg.labels import LabelSet
from roadseg.release.archive import Release, load_release
from roadseg.release.card import card
from roadseg.release.graph import WEIGHTS
from roadseg.train import checkpoint, stage
from roadseg.train.stage import train_candidate
from tests.conftest import RGB, THREE, write_release, write_shards

MODEL = {
    "backbone": "test_efficientnet", "backbone_weights": "none", "channels": 8, "head": "separable",
    "atrous_rates": [1, 2, 3],
}  # fmt: skip
TRAINING = {"steps": 3, "batch_size": 2, "crop_px": [32, 64], "device": "cpu", "workers": 0, "ema_decay": 0.5}


def config(model: dict[str, Any] | None = None, **training: Any) -> Config:
    return load_config(None, {"model": {**MODEL, **(model or {})}, "training": {**TRAINING, **training}})


class Started(Exception):
    """Raised in place of training, with what the loop would have got."""

    def __init__(self, *arguments: Any) -> None:
        self.network, self.stretches, self.validation, _, self.objective, self.settings = arguments[:6]
        self.batches = self.stretches[0].batches
        self.weights = self.objective.criterion.class_weights_K


def start(c: Config, shards: Shards, work: Path, init: Release | None = None) -> Started:
    def stop(*arguments: Any, **_: Any) -> None:
        raise Started(*arguments)

    work.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Started) as caught:
        patch.setattr(stage, "train", stop)
        train_candidate(c, shards, work, init)
    return caught.value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Path]:
    """Shards, and the folder of a candidate that was trained on them."""
    folder = tmp_path_factory.mktemp("train")
    shards = write_shards(folder / "shards")
    (folder / "work").mkdir()
    train_candidate(config(), shards, folder / "work")
    return shards, folder / "work"


def test_the_archive_is_the_average_of_the_last_step(made: tuple[Shards, Path]) -> None:
    shards, work = made
    release = load_release(work / "model.tar.gz")
    _, tensors = checkpoint.newest(work / "checkpoints") or (0, {})
    shipped = load_tensors(release.members[WEIGHTS])
    assert shipped and not any(name.startswith("auxiliary_heads.") for name in shipped)
    assert all(torch.equal(value, tensors[f"average.{name}"]) for name, value in shipped.items())
    assert any(not torch.equal(value, tensors[f"network.{name}"]) for name, value in shipped.items())
    assert not (work / "model.onnx").exists()


def test_it_says_what_it_is_and_what_it_was_trained_on(made: tuple[Shards, Path]) -> None:
    shards, work = made
    release = load_release(work / "model.tar.gz")
    model = release.model
    assert release.label_set == THREE and release.members["LICENSE-DATA"] == THREE.terms.encode()
    assert model["training"] == {
        "source": "test", "steps": 3, "data_fingerprints": shards.fingerprints, "started_from": "none"
    }  # fmt: skip
    assert model["train_class_pixels"] == shards.class_pixels["train"]
    assert model["export_agreement"] >= 0.9999 and model["temperature"] > 0
    counted = {k: v for k, v in load_tensors(release.members[WEIGHTS]).items() if k not in ("mean", "std")}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert model["parameters"] == sum(v.numel() for k, v in counted.items() if not k.endswith(buffers))
    assert model["config"]["training"]["steps"] == 3 and "device" not in model["config"]["training"]
    assert model["preprocessing"]["mean"] == [120.0] * 3  # from scratch: the data's own, not ImageNet's
    sheet = cv2.imread(str(work / "contact_sheet.jpg"))
    assert sheet.shape == (2 * 2 * 120, 4 * 240, 3)  # six samples in two rows, each image over label


def test_the_shipped_graph_scores_what_validation_saw(made: tuple[Shards, Path]) -> None:
    shards, work = made
    predictor, split = Predictor(load_release(work / "model.tar.gz"), 1), shards.split("val")
    right = valid = 0
    for i in range(len(split)):
        image, label = split.read(i)
        right += int((predictor(image) == label)[label != 255].sum())
        valid += int((label != 255).sum())
    told = [r for r in read_json_lines(work / "history.jsonl") if r.get("split") == "val"][-1]
    assert told["step"] == 3 and told["pixel_accuracy"] == pytest.approx(right / valid, abs=1e-3)


def test_it_starts_from_a_release(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, work = made
    release = load_release(work / "model.tar.gz")
    network = start(config(seed=9), shards, tmp_path / "w", release).network
    state = network.state_dict()
    for name, value in load_tensors(release.members[WEIGHTS]).items():
        assert torch.equal(state[name], value), name
    assert any(name.startswith("auxiliary_heads.") for name in state)  # which no release has: they are new
    scratch = start(config(seed=9), shards, tmp_path / "s").network.state_dict()
    assert any(not torch.equal(scratch[name], state[name]) for name in scratch)


@pytest.mark.parametrize(
    ("change", "todo"),
    [
        ({"channels": 16}, "--model.channels 8"),
        ({"fusion": "concat"}, "--model.fusion skfusion"),
        ({"head": "dense"}, "--model.head separable"),
        ({"low_levels": [4]}, "--model.low-levels 8 4"),
    ],
)
def test_a_release_of_another_architecture_is_refused(
    made: tuple[Shards, Path], tmp_path: Path, change: dict[str, Any], todo: str
) -> None:
    shards, work = made
    release = load_release(work / "model.tar.gz")
    with pytest.raises(ConfigError, match="training.init_from: release .* has another architecture") as caught:
        train_candidate(config(change), shards, tmp_path, release)
    assert str(caught.value).endswith(f"to go on with that release's: {todo}")


def test_other_classes_get_a_new_classifier_and_the_archive_says_so(made: tuple[Shards, Path], tmp_path: Path) -> None:
    """As many classes would fit the tensors and mean something else."""
    shards, work = made
    release = load_release(work / "model.tar.gz")
    train_candidate(config(), replace(shards, label_set=RGB), tmp_path, release)
    told = load_release(tmp_path / "model.tar.gz").model["training"]
    assert told["started_from"] == f"release {release.digest}" and "decoder.classifier" in told["made_anew"]


@pytest.mark.parametrize("classes", [THREE, RGB])
def test_a_checkpoint_as_the_start_brings_the_terms_of_its_data(
    made: tuple[Shards, Path], tmp_path: Path, classes: LabelSet
) -> None:
    """A model must not lose them by being trained further, nor by being trained further twice."""
    shards, work = made
    (path,) = (work / "checkpoints").glob("*.safetensors")
    theirs = replace(classes, terms="Other terms.")
    train_candidate(config(init_from=str(path)), replace(shards, label_set=theirs), tmp_path)
    release = load_release(tmp_path / "model.tar.gz")
    told = release.model["training"]
    assert told["started_from"] == f"checkpoint {sha256_file(path)}"
    assert ("decoder.classifier" in told.get("made_anew", [])) == (classes is RGB)
    terms = f"Other terms.\n\nStarted from {told['started_from']}, whose data terms are:\n{THREE.terms}"
    assert release.members["LICENSE-DATA"].decode() == terms
    (again,) = (tmp_path / "checkpoints").glob("*.json")
    assert read_json(again)["of"]["terms"] == terms


def test_early_strides_reach_the_network_the_archive_and_the_card(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, work = made
    model = {"early_strides": [2, 1], "output_stride": 8, "low_levels": [2]}
    train_candidate(config(model), shards, tmp_path)
    usual, fine = (load_release(folder / "model.tar.gz") for folder in (work, tmp_path))
    architecture = fine.model["architecture"]
    assert (architecture["early_strides"], architecture["output_stride"]) == ([2, 1], 8)
    assert Predictor(fine, 1).logits(np.zeros((32, 64, 3), np.uint8)).shape[-2:] == (16, 32)
    scores = {
        "source": "test", "split": "val", "images": 1, "miou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": 0.5,
        "runtime": "", "data_fingerprint": "", "class_iou": {}, "classes": [],
    }  # fmt: skip
    assert "at output stride 8 (early strides 2 and 1)" in card(fine, scores)
    assert "early strides" not in card(usual, scores)


def test_a_teacher_of_other_classes_is_refused_and_one_of_the_same_is_named(
    made: tuple[Shards, Path], tmp_path: Path
) -> None:
    shards, work = made
    teacher = load_release(work / "model.tar.gz")
    with pytest.raises(ConfigError, match=r"knows other classes \(road, sky, car\); expected red, green, blue"):
        train_candidate(config(), replace(shards, label_set=RGB), tmp_path, teacher=teacher)
    (tmp_path / "taught").mkdir()
    train_candidate(config(distill_weight=5.0), shards, tmp_path / "taught", teacher=teacher)
    made_of = load_release(tmp_path / "taught" / "model.tar.gz")
    assert made_of.model["training"]["taught_by"] == f"release {teacher.digest}"
    assert f"Taught by release {teacher.digest}" in made_of.members["LICENSE-DATA"].decode()


@pytest.mark.parametrize("model", [{"atrous_rates": [1, 2, 3], "low_levels": [4]}, {"low_levels": [16, 4]}])
def test_a_stride_that_a_later_phase_can_not_have_is_refused_before_the_first_step(
    made: tuple[Shards, Path], tmp_path: Path, model: dict[str, Any]
) -> None:
    shards, _ = made
    stride, later = (8, 16) if "atrous_rates" in model else (16, 8)
    c = config({"output_stride": stride, **model}, phases=[{"after": 0.5, "output_stride": later}])
    with pytest.raises(ConfigError):
        train_candidate(c, shards, tmp_path)
    assert not (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory: you tried", "CUDA out of memory"])
def test_no_memory_says_what_to_change_on_every_device(
    made: tuple[Shards, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    shards, _ = made

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(stage, "train", full)
    with pytest.raises(RoadsegError, match="no memory for 2 crops of 32x64 at once in fp32 on cpu.*set one of"):
        train_candidate(config(), shards, tmp_path)


def test_a_held_out_split_is_for_scoring_alone(
    made: tuple[Shards, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = made
    only = replace(shards, shards={"train": shards.shards["train"], "holdout": shards.shards["val"]})
    given: list[Any] = []
    monkeypatch.setattr(stage, "write_candidate", lambda *arguments: given.append(arguments))
    train_candidate(config(), only, tmp_path)
    assert [f.name for f in given[0][4].frames] == [f.name for f in shards.split("train").frames]


def test_phases_cut_the_run_and_the_last_stride_ships(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    phases = [{"after": 0.34, "crop_px": [16, 32]}, {"after": 0.67, "output_stride": 8}]
    c = config({"low_levels": [4], "atrous_rates": [2, 4, 6]}, phases=phases)
    stretches = start(c, shards, tmp_path / "cut").stretches
    assert [(s.first, s.last, s.output_stride) for s in stretches] == [(0, 1, 16), (1, 2, 16), (2, 3, 8)]
    assert next(stretches[1].batches(1)).image_BHWC.shape == (2, 16, 32, 3)
    (tmp_path / "whole").mkdir()
    train_candidate(c, shards, tmp_path / "whole")
    assert load_release(tmp_path / "whole" / "model.tar.gz").model["architecture"]["output_stride"] == 8


def test_weights_that_are_no_safetensors_are_refused(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    release = load_release(write_release(tmp_path / "model.tar.gz", THREE, weights=b"\x80\x04N."))
    with pytest.raises(ArchiveError, match="weights.safetensors is not readable"):
        train_candidate(config(), shards, tmp_path, release)


def test_enet_weights_are_those_of_train(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    assert start(config(), shards, tmp_path / "a").weights is None
    weights = start(config(class_weights="enet"), shards, tmp_path / "b").weights
    valid = [500, 400, 60]
    assert weights.tolist() == pytest.approx([1 / math.log(1.02 + n / sum(valid)) for n in valid])


def test_length_is_steps_or_epochs(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    for n, (length, steps) in enumerate([({"steps": 7}, 7), ({"steps": None, "epochs": 2}, 6), ({"steps": None}, 180)]):
        started = start(config(**length), shards, tmp_path / str(n))
        assert started.settings.steps == steps and started.settings.validate_every == max(1, math.ceil(steps / 10))
    epochs = start(config(steps=None, epochs=1, batch_size=4), shards, tmp_path / "e")
    assert epochs.settings.steps == 2  # 6 frames: the second batch reaches into the next epoch


def test_every_split_but_train_is_validated_on(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    three = replace(shards, shards={**shards.shards, "holdout": shards.shards["val"]})
    assert start(config(), three, tmp_path).validation.keys() == {"val", "holdout"}


def test_without_train_there_is_nothing_to_learn_from(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    only_val = replace(shards, shards={"val": shards.shards["val"]})
    with pytest.raises(ConfigError, match="the data set has no train split; evaluate a release on it instead"):
        train_candidate(config(), only_val, tmp_path)


@pytest.mark.parametrize("name", ["toaster", "", "meta", "cuda:x"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as e:
        config(device=name)
    assert "training.device" in str(e.value)


def test_class_uniform_needs_shards_that_know_where_classes_lie(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    (shard,) = shards.shards["train"]

    def placed(centroids: tuple[tuple[int, int, int], ...]) -> Shards:
        frames = tuple(replace(frame, centroids=centroids) for frame in shard.frames)
        return replace(shards, shards={**shards.shards, "train": (replace(shard, frames=frames),)})

    with pytest.raises(ConfigError, match="training.class_uniform: 0.5"):
        train_candidate(config(class_uniform=0.5), placed(()), tmp_path)
    batches = start(config(class_uniform=0.5, steps=9), placed(((1, 3, 4), (2, 30, 50))), tmp_path / "w").batches(0)
    samples = [sample for batch in batches for sample in batch.samples]
    assert sum(sample.center is not None for sample in samples) == len(samples) / 2 == 9
    assert {sample.center for sample in samples if sample.center} == {(3, 4), (30, 50)}


def test_mixed_sources_keep_their_weights(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    (shard,) = shards.shards["train"]
    frames = tuple(replace(f, part="town" if i < 2 else "camvid") for i, f in enumerate(shard.frames))
    mixed = replace(
        shards,
        shards={**shards.shards, "train": (replace(shard, frames=frames),)},
        part_weights={"town": 1.0, "camvid": 1.0},
    )
    batches = start(config(steps=12), mixed, tmp_path / "w").batches(0)
    drawn = [sample.index for batch in batches for sample in batch.samples]
    assert len(drawn) == 24 and sum(index < 2 for index in drawn) == 12


def test_what_this_device_can_not_do_is_refused(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, _ = made
    for settings in ({"augment_device": "cuda"}, {"frames_on_gpu": "always"}):
        with pytest.raises(ConfigError, match=f"training.{next(iter(settings))}: .*training .*on cpu"):
            train_candidate(config(**settings), shards, tmp_path)


def test_frames_on_the_gpu_count_when_memory_runs_out(
    made: tuple[Shards, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = made

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stage, "train", run_out)
    with pytest.raises(RoadsegError) as e:
        train_candidate(config(), shards, tmp_path)
    assert "no memory for" in e.value.found and "frames_on_gpu" not in e.value.todo
    monkeypatch.setattr(stage, "_loader_plan", lambda *_: LoaderPlan(True, True, 0, "all"))
    with pytest.raises(RoadsegError) as e:
        train_candidate(config(), shards, tmp_path)
    assert "training.frames_on_gpu never" in e.value.todo


def test_the_contact_sheet_is_the_same_for_the_same_seed(made: tuple[Shards, Path], tmp_path: Path) -> None:
    shards, work = made
    sheets = []
    for n, seed in enumerate([0, 0, 1]):
        start(config(seed=seed), shards, tmp_path / str(n))
        sheets.append((tmp_path / str(n) / "contact_sheet.jpg").read_bytes())
    assert sheets[0] == sheets[1] == (work / "contact_sheet.jpg").read_bytes() != sheets[2]


def test_label_sets_with_many_ids_for_a_class_keep_their_names() -> None:
    several = LabelSet("s", (*THREE.classes, replace(THREE.classes[0], name="parking", id=9)))
    assert several.names == THREE.names and np.flatnonzero(several.id_to_train == 0).tolist() == [7, 9]
