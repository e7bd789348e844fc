"""Offsets that make label maps score best: found, and left out where they don't help."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import THREE, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from roadseg.config import load_config
from roadseg.data.shards import Shards
from roadseg.files import read_json
from roadseg.metrics.iou import scores
from roadseg.release.archive import WEIGHTS, load_release
from roadseg.release.card import card
from roadseg.train import checkpoint, class_offsets, stage
from roadseg.train.class_offsets import add_class_offsets, fit_offsets

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


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2))
def test_one_class_moves_to_its_best_offset(seed: int, k: int) -> None:
    logits_NK, labels_N = drawn(seed)
    if not (labels_N == k).any():
        return
    rise = class_offsets._rise(logits_NK, labels_N, k)
    one_hot = np.eye(3)[k]
    tried = np.linspace(-8, 8, 1601)
    best = max(miou(logits_NK + x * one_hot, labels_N) for x in tried)
    # Candidates lie at quantiles of 300 gaps; a pixel more or less is what may be between two of them.
    assert miou(logits_NK + rise * one_hot, labels_N) >= best - 0.01


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
            network, shards.split("train"), {"val": shards.split("val")}, THREE, CPU, False, tmp_path / "offsets.json"
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
        assert add_class_offsets(network, shards.split("train"), {}, THREE, CPU, False, tmp_path / "offsets.json") == {}
    assert torch.equal(bias, before) and "class offsets: none" in caplog.text
    found = read_json(tmp_path / "offsets.json")
    assert found["offsets"] == {} and found["train"]["after"] < found["train"]["before"]


def test_one_frame_is_too_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert add_class_offsets(Colours(0, 0, 0), range(1), {}, THREE, CPU, False, tmp_path / "offsets.json") == {}  # type: ignore[arg-type]
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
    assert "best mIoU on frames of train: sky +100.00, car +0.50" in card(release, scores)
    _, tensors = checkpoint.newest(tmp_path / "checkpoints") or (0, {})
    shipped = load_tensors(release.members[WEIGHTS])
    changed = {name for name, value in shipped.items() if not torch.equal(value, tensors[f"average.{name}"])}
    assert changed == {"decoder.classifier.bias"}
    apart = shipped["decoder.classifier.bias"] - tensors["average.decoder.classifier.bias"]
    assert apart.tolist() == pytest.approx([0, 100, 0.5], abs=1e-4)
    assert release.model["export_agreement"] > 0.999
    assert read_json(tmp_path / "log" / "class_offsets.json")["miou"].keys() == {"val"}
