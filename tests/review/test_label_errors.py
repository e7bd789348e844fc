"""Wrong labels are found from a model's predictions; right ones are not suspect."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from roadseg.errors import UsageError
from roadseg.images.decode import Limits
from roadseg.labels import CITYSCAPES
from roadseg.review.label_errors import find_suspects, render, table
from tests.conftest import RGB, write_frames
from tests.html_page import assert_inert

pytest.importorskip("cleanlab")


class FakePredictor:
    """A correct predictor with random confidence per pixel: the bright channel is the class."""

    label_set = RGB

    def __init__(self, *offsets: float) -> None:
        self.release = SimpleNamespace(temperature=1.0, class_offsets=np.array(offsets or [0, 0, 0], np.float32))

    def logits(self, image: np.ndarray) -> np.ndarray:
        small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA).astype(np.float32)
        scores_KHW = small.transpose(2, 0, 1)[: RGB.num_classes] / 40
        return np.ascontiguousarray(scores_KHW + self.release.class_offsets[:, None, None])


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and train ids: three columns of noise, each with another bright channel."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(96)[None] // 32, 64, axis=0).astype(np.uint8)
    image = rng.integers(0, 120, (64, 96, 3))
    rows, columns = np.indices(label.shape)
    image[rows, columns, label] += 130
    return image.astype(np.uint8), label


def tree(folder: Path, wrong: set[int]) -> Any:
    frames = []
    for i in range(12):
        image, label = scene(i)
        if i in wrong:
            label = label.copy()
            label[8:40, 36:60] = 2  # an object of class 1 labelled as class 2
        frames.append((image, label))
    return write_frames(folder, RGB, {"val": frames})


def test_images_with_wrong_objects_come_first_with_class_pairs(tmp_path: Path) -> None:
    manifest = tree(tmp_path, {3, 7})
    found = find_suspects(FakePredictor(), manifest, tmp_path, Limits(), "val")  # type: ignore[arg-type]
    names = [s.sample.name for s in found]
    expected = [manifest.split("val")[i].name for i in (3, 7)]
    assert sorted(names[:2]) == sorted(expected)
    assert all(s.share < 0.01 for s in found[2:])
    labelled, predicted, share = found[0].pairs[0]
    assert (labelled, predicted) == (RGB.names[2], RGB.names[1]) and share > 0.03
    assert found[0].mask.any() and f"labeled {labelled}, predicted {predicted}" in table(found)


def test_class_offsets_do_not_change_confidence(tmp_path: Path) -> None:
    manifest = tree(tmp_path, {3})
    plain, shifted = (
        find_suspects(predictor, manifest, tmp_path, Limits(), "val")  # type: ignore[arg-type]
        for predictor in (FakePredictor(), FakePredictor(-4, 0, 6))
    )
    assert [(s.sample.name, round(s.share, 3)) for s in plain] == [(s.sample.name, round(s.share, 3)) for s in shifted]


def test_the_page_lists_suspects_and_is_inert(tmp_path: Path) -> None:
    manifest = tree(tmp_path, {3})
    found = find_suspects(FakePredictor(), manifest, tmp_path, Limits(), "val")  # type: ignore[arg-type]
    evil = replace(found[0].sample, name="<img onerror=alert(1)>")
    page = render("<b>t</b>", [replace(found[0], sample=evil), *found[1:]], manifest, tmp_path, Limits())
    assert_inert(page)
    assert page.count("data:image/jpeg") == 2 * len(found) and "<img onerror" not in page
    assert f"labeled {RGB.names[2]}, predicted {RGB.names[1]}" in page


def test_correct_labels_are_not_suspect(tmp_path: Path) -> None:
    found = find_suspects(FakePredictor(), tree(tmp_path, set()), tmp_path, Limits(), "val")  # type: ignore[arg-type]
    assert all(s.share < 0.01 for s in found)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    predictor = FakePredictor()
    predictor.label_set = CITYSCAPES
    with pytest.raises(UsageError) as e:
        find_suspects(predictor, tree(tmp_path, set()), tmp_path, Limits(), "val")  # type: ignore[arg-type]
    assert e.value.where == "test val" and "--config" in e.value.todo


def test_a_missing_cleanlab_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError) as e:
        find_suspects(FakePredictor(), tree(tmp_path, set()), tmp_path, Limits(), "val")  # type: ignore[arg-type]
    assert "roadseg[doctor]" in e.value.todo
