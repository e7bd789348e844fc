"""Offsets that make label maps score best: found, and left out where they don't help."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from roadseg.config.sections import load_config
from roadseg.data.shards.index import Shards, Split
from roadseg.errors import RoadsegError
from roadseg.files import read_json
from roadseg.metrics.iou import scores
from roadseg.release.archive import load_release
from roadseg.release.card import card
from roadseg.release.graph import WEIGHTS
from roadseg.train import checkpoint, stage
from roadseg.train.calibration import class_offsets
from roadseg.train.calibration.class_offsets import add_class_offsets, fit_offsets
from roadseg.train.distributed.process_group import ALONE
from roadseg.train.recipe import recipe_of
from tests.conftest import THREE, write_shards

CPU = torch.device("cpu")


def miou(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (labels_N, logits_NK.argmax(1)), 1)
    found: float = scores(confusion, THREE)["miou"]
    return found


def drawn(seed: int, pixels: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Logits that know the class but are in doubt, of a frequent, a rarer and a rare class."""
    rng = np.random.default_rng(seed)
    labels_N = rng.choice(3, pixels, p=[0.8, 0.15, 0.05])
    logits_NK = rng.normal(0, 1, (pixels, 3)) + 1.2 * np.eye(3)[labels_N] + [1.5, 0, -1]
    return logits_NK.astype(np.float32), labels_N


@settings(max_examples=100, deadline=None, derandomize=True)  # two gaps may lie nearer than candidates are told apart
@given(st.integers(0, 10_000), st.integers(0, 2))
def test_one_class_moves_to_its_best_offset_and_no_further(seed: int, k: int) -> None:
    logits_NK, labels_N = drawn(seed, 90)  # so few that every gap is tried
    if not (labels_N == k).any():
        return
    rise = class_offsets._rise(logits_NK, labels_N, k)
    others = np.delete(logits_NK, k, 1).max(1)
    changes = np.sort(others - logits_NK[:, k])  # where one pixel more becomes k
    tried = np.concatenate([[changes[0] - 1], (changes[1:] + changes[:-1]) / 2, [changes[-1] + 1]])
    scored = np.array([miou(logits_NK + x * np.eye(3)[k], labels_N) for x in tried])
    assert miou(logits_NK + rise * np.eye(3)[k], labels_N) == pytest.approx(scored.max(), abs=1e-6)
    spacing = np.diff(changes, prepend=changes[0] - 1, append=changes[-1] + 1).max()
    assert abs(rise) <= np.abs(tried[scored >= scored.max() - 1e-9]).min() + spacing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_they_are_never_worse(seed: int) -> None:
    logits_NK, labels_N = drawn(seed)
    offsets_K = fit_offsets(logits_NK, labels_N, THREE)
    assert miou(logits_NK + offsets_K, labels_N) >= miou(logits_NK, labels_N)


def test_a_rare_class_that_is_never_the_likeliest_is_found() -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.choice(3, 20_000, p=[0.7, 0.28, 0.02])
    # The posterior itself: cars are told from the rest by a score that never makes them likelier than road.
    logits_NK = np.log(np.array([0.7, 0.28, 0.02])) + 1.5 * np.eye(3)[labels_N]
    logits_NK = (logits_NK + rng.normal(0, 0.3, logits_NK.shape)).astype(np.float32)
    offsets_K = fit_offsets(logits_NK, labels_N, THREE)
    assert (logits_NK.argmax(1) == 2).mean() < 0.001
    assert offsets_K[2] > 0 and miou(logits_NK + offsets_K, labels_N) > miou(logits_NK, labels_N) + 0.25


def test_what_is_right_already_stays() -> None:
    labels_N = np.arange(900) % 3
    assert not fit_offsets(5 * np.eye(3, dtype=np.float32)[labels_N], labels_N, THREE).any()


def test_classes_without_a_label_and_no_pixels_at_all_stay() -> None:
    logits_NK, labels_N = drawn(1)
    seen = labels_N != 2
    assert fit_offsets(logits_NK[seen], labels_N[seen], THREE)[2] == 0
    assert not fit_offsets(logits_NK[:0], labels_N[:0], THREE).any()


class Colours(nn.Module):
    """Logits at stride 1: how near a pixel's colour is to each class's in the test scenes."""

    def __init__(self, *bias: float) -> None:
        super().__init__()
        classifier = nn.Conv2d(3, 3, 1)
        colours_K3 = torch.tensor([[90.0, 90, 90], [150, 180, 220], [200, 30, 30]])
        classifier.weight.data = colours_K3[:, :, None, None] / 500
        classifier.bias.data = torch.tensor(bias) - colours_K3.square().sum(1) / 1000
        self.decoder = SimpleNamespace(classifier=classifier)
        self.classifier = classifier
        self.mean = torch.zeros(1)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.decoder.classifier(image.float())
        return found

    def __deepcopy__(self, memo: object) -> Colours:
        copy = Colours(0, 0, 0)
        copy.load_state_dict(self.state_dict())
        return copy.eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_spoiled_bias_is_put_right(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = Colours(0, 0, -30).eval()
    bias = network.classifier.bias
    assert bias is not None
    before = bias.detach().clone()
    with caplog.at_level(logging.INFO):
        offsets = add_class_offsets(
            network, shards.split("train"), {"val": shards.split("val")}, THREE, False, tmp_path / "offsets.json"
        )
    assert offsets["car"] > 11
    moved = (bias.detach() - before).tolist()
    assert moved == pytest.approx([offsets.get(name, 0.0) for name in THREE.names], abs=1e-3)
    found = read_json(tmp_path / "offsets.json")
    assert found["offsets"] == offsets and found["train"]["after"] > found["train"]["before"] + 0.1
    assert found["miou"]["val"] > found["train"]["before"]
    assert "class offsets: car +" in caplog.text and "val mIoU 0." in caplog.text


def test_offsets_that_do_not_help_elsewhere_are_dropped(
    shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Colours(0, 0, 0).eval()
    bias = network.classifier.bias
    assert bias is not None
    before = bias.detach().clone()
    monkeypatch.setattr(class_offsets, "fit_offsets", lambda *_: np.array([90, 0, 0], np.float32))
    with caplog.at_level(logging.INFO):
        assert add_class_offsets(network, shards.split("train"), {}, THREE, False, tmp_path / "offsets.json") == {}
    assert torch.equal(bias, before) and "class offsets: none" in caplog.text
    found = read_json(tmp_path / "offsets.json")
    assert found["offsets"] == {} and found["train"]["after"] < found["train"]["before"]


def test_they_are_fitted_to_one_half_of_train_and_judged_by_the_other(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[tuple[object, list[int], int, bool]] = []
    original = class_offsets.sampled_pixels  # type: ignore[attr-defined]

    def spy(network: nn.Module, split: Split, frames: np.ndarray, pixels: int, *rest: Any) -> tuple[Tensor, Tensor]:
        looked_at.append((split, frames.tolist(), pixels, rest[1]))
        return original(network, split, frames, pixels, *rest)

    monkeypatch.setattr(class_offsets, "sampled_pixels", spy)
    train = shards.split("train")
    validation = {"val": shards.split("val"), "holdout": shards.split("val")}
    add_class_offsets(Colours(0, 0, -30).eval(), train, validation, THREE, True, tmp_path / "offsets.json")
    assert all(split is train and bf16 for split, _, _, bf16 in looked_at)
    assert [frames for _, frames, _, _ in looked_at] == [[0, 2, 4], [1, 3, 5]]
    assert read_json(tmp_path / "offsets.json")["miou"].keys() == {"val", "holdout"}
    looked_at.clear()
    monkeypatch.setattr(class_offsets, "FRAMES", 4)
    monkeypatch.setattr(class_offsets, "MOST_LOGITS", 240)
    add_class_offsets(Colours(0, 0, -30).eval(), train, {}, THREE, False, tmp_path / "offsets.json")
    assert [frames for _, frames, _, _ in looked_at] == [[0, 3], [1, 5]]
    assert {pixels for _, _, pixels, _ in looked_at} == {20}  # 240 logits: of 3 classes and 4 frames


def test_a_gpu_without_memory_left_hands_over_to_the_cpu(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, calls = class_offsets.sampled_pixels, []  # type: ignore[attr-defined]

    def full(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments[5])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(class_offsets, "sampled_pixels", full)
    network, scored, validate = Colours(0, 0, -30).eval(), [], class_offsets.validate  # type: ignore[attr-defined]

    def kept(run: Colours, *arguments: Any) -> Any:
        scored.append((run, *arguments[2:4]))
        return validate(run, *arguments)

    monkeypatch.setattr(class_offsets, "validate", kept)
    train, path = shards.split("train"), tmp_path / "offsets.json"
    assert add_class_offsets(network, train, {"val": shards.split("val")}, THREE, True, path)["car"] > 11
    assert calls == [True, False, False] and "they are fitted on the CPU" in caplog.text
    [(run, device, bf16)] = scored  # what is scored is the copy on the CPU, with the offsets
    assert run is not network and (device, bf16) == (torch.device("cpu"), False)
    assert torch.equal(run.decoder.classifier.bias, network.decoder.classifier.bias)


def test_no_memory_on_the_cpu_is_told_with_what_to_do(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(class_offsets, "sampled_pixels", full)
    with pytest.raises(RoadsegError) as e:
        add_class_offsets(Colours(0, 0, -30).eval(), shards.split("train"), {}, THREE, False, tmp_path / "offsets.json")
    assert e.value.where == "training.class_offsets" and "DefaultCPUAllocator" in e.value.found and e.value.todo


def test_one_frame_is_too_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert add_class_offsets(Colours(0, 0, 0), range(1), {}, THREE, False, tmp_path / "offsets.json") == {}  # type: ignore[arg-type]
    assert "two frames of train" in caplog.text and not (tmp_path / "offsets.json").exists()


def test_a_training_ships_them_in_the_classifiers_bias(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_offsets, "_miou", lambda logits, *_: float(logits[0, 1] > 50))  # judged to help
    monkeypatch.setattr(class_offsets, "fit_offsets", lambda *_: np.array([0, 100, 0.5], np.float32))
    model = {
        "backbone": "test_efficientnet", "backbone_weights": "none", "channels": 8, "head": "separable",
        "atrous_rates": [1, 2, 3],
    }  # fmt: skip
    training = {"steps": 2, "batch_size": 2, "crop_px": [32, 64], "device": "cpu", "workers": 0, "class_offsets": True}
    stage.train_candidate(load_config(None, {"model": model, "training": training}), shards, tmp_path)
    release = load_release(tmp_path / "model.tar.gz")
    assert release.model["training"]["class_offsets"] == {"sky": 100.0, "car": 0.5}
    scores = {
        "source": "test", "split": "val", "images": 1, "miou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": 0.5,
        "runtime": "", "data_fingerprint": "", "class_iou": {}, "classes": [],
    }  # fmt: skip
    assert "on frames of train (not in probabilities): sky +100.00, car +0.50" in card(release, scores)
    assert release.class_offsets.tolist() == [0, 100, 0.5]
    plain = stage.train_candidate  # without them the temperature is the same: it is that of the scores
    other = tmp_path / "without"
    other.mkdir()
    plain(load_config(None, {"model": model, "training": {**training, "class_offsets": False}}), shards, other)
    without = load_release(other / "model.tar.gz")
    assert without.temperature == pytest.approx(release.temperature, rel=1e-3) and not without.class_offsets.any()
    # A teacher's scores are learned without its offsets.
    taught = load_config(None, {"model": model, "training": training})
    recipe = recipe_of(taught, num_classes=3, device_type="cpu", frames=6)
    objective = stage._objective(recipe, shards, release, CPU, ALONE)
    assert objective.distillation is not None
    bias = objective.distillation._teacher.decoder.classifier.bias
    assert torch.allclose(bias, load_tensors(without.members[WEIGHTS])["decoder.classifier.bias"], atol=1e-4)
    # And so are its weights gone on from: another training fits offsets anew.
    started = stage._start(recipe, shards, release)
    assert torch.allclose(started.network.decoder.classifier.bias, bias, atol=1e-4)
    _, tensors = checkpoint.newest(tmp_path / "checkpoints") or (0, {})
    shipped = load_tensors(release.members[WEIGHTS])
    changed = {name for name, value in shipped.items() if not torch.equal(value, tensors[f"average.{name}"])}
    assert changed == {"decoder.classifier.bias"}
    apart = shipped["decoder.classifier.bias"] - tensors["average.decoder.classifier.bias"]
    assert apart.tolist() == pytest.approx([0, 100, 0.5], abs=1e-4)
    assert release.model["export_agreement"] > 0.999
    assert read_json(tmp_path / "log" / "class_offsets.json")["miou"].keys() == {"val"}
