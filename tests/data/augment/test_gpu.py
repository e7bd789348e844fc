"""Batches of crops against a slow float64 reference and OpenCV; the Triton kernel against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

from roadseg.data.augment.cpu import Augmentation, CropParams, apply, generator, sample_params
from roadseg.data.augment.gpu import BatchParams, batch_params, blurred, cut_crops, cut_crops_plain
from roadseg.labels import IGNORE

FILL = (1, 2, 3)
HEIGHT, WIDTH = 60, 90
FORMS = {
    "larger": Augmentation((24, 33), (1.0, 2.0)),
    "smaller": Augmentation((24, 33), (0.5, 1.0)),
    "much smaller": Augmentation((24, 33), (0.15, 0.5)),
    "padded": Augmentation((70, 100), (0.6, 1.5)),
    "turned": Augmentation((24, 33), (0.5, 2.0), rotate_deg=15.0),
}


def frame(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth enough for an error of a pixel's thousandth not to show, and labels in blocks."""
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), (0, 0), 1.5)
    return cv2.convertScaleAbs(image, alpha=2.0, beta=-128), np.kron(
        rng.integers(0, 19, (HEIGHT // 6, WIDTH // 6)), np.ones((6, 6), int)
    ).astype(np.uint8)


def draws(a: Augmentation, n: int = 5) -> list[CropParams]:
    return [sample_params(a, generator(7, i), HEIGHT, WIDTH) for i in range(n)]


def flatten(
    frames: Sequence[tuple[np.ndarray, np.ndarray]], drawn: Sequence[CropParams]
) -> tuple[torch.Tensor, BatchParams]:
    """All frames in one buffer with odd gaps between them, and the parameters of their boxes in it."""
    parts: list[np.ndarray] = []
    image_at, label_at = [], []
    for (image, label), d in zip(frames, drawn, strict=True):
        first = d.box[0] * WIDTH + d.box[1]
        for array, at, channels in ((image, image_at, 3), (label, label_at, 1)):
            parts.append(np.full(7 + len(parts), 99, np.uint8))
            at.append(sum(p.size for p in parts) + channels * first)
            parts.append(array.ravel())
    return torch.from_numpy(np.concatenate(parts)), batch_params(drawn, image_at, label_at, [WIDTH] * len(drawn))


def box_of(d: CropParams, array: np.ndarray) -> np.ndarray:
    return array[d.box[0] : d.box[0] + d.box[2], d.box[1] : d.box[1] + d.box[3]]


def reference(d: CropParams, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One pixel after another, from the frame's own coordinates, in float64."""
    out, ids = np.full((*d.crop_px, 3), FILL, np.uint8), np.full(d.crop_px, IGNORE, np.uint8)
    pixels, labels = box_of(d, image).astype(float), box_of(d, label)
    height, width = labels.shape
    for y, x in np.ndindex(*d.crop_px):
        u, v = d.affine @ [x, y, 1]
        column, row = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if not (0 <= column < width and 0 <= row < height):
            continue
        ids[y, x] = labels[row, column]
        total = np.zeros(3)
        for i, j in np.ndindex(d.taps, d.taps):
            su, sv = d.affine @ [x + (j + 0.5) / d.taps - 0.5, y + (i + 0.5) / d.taps - 0.5, 1]
            su, sv = min(max(su, 0), width - 1), min(max(sv, 0), height - 1)
            left, top = int(su), int(sv)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = pixels[top, left] * (left + 1 - su) + pixels[top, right] * (su - left)
            lower = pixels[bottom, left] * (left + 1 - su) + pixels[bottom, right] * (su - left)
            total += upper * (top + 1 - sv) + lower * (sv - top)
        out[y, x] = np.clip(np.rint(d.color.astype(float) @ [*(total / d.taps**2), 1]), 0, 255)
    return out, ids


@pytest.mark.parametrize("form", FORMS)
def test_crops_equal_the_float64_reference(form: str) -> None:
    drawn = draws(FORMS[form], 3)
    frames = [frame(i) for i in range(3)]
    flat, s = flatten(frames, drawn)
    image, label = cut_crops(flat, s, drawn[0].crop_px, FILL)
    assert image.dtype == label.dtype == torch.uint8
    for row, (d, (frame_image, frame_label)) in enumerate(zip(drawn, frames, strict=True)):
        want_image, want_label = reference(d, frame_image, frame_label)
        assert (label[row].numpy() == want_label).mean() > 0.999
        far = np.abs(image[row].numpy().astype(int) - want_image) > 1
        assert far.mean() < 0.001


@pytest.mark.parametrize("form", ["larger", "smaller", "padded", "turned"])
def test_crops_are_close_to_those_by_opencv(form: str) -> None:
    drawn, (frame_image, frame_label) = draws(FORMS[form]), frame()
    flat, s = flatten([(frame_image, frame_label)] * len(drawn), drawn)
    image, label = cut_crops(flat, s, drawn[0].crop_px, FILL)
    for row, d in enumerate(drawn):
        want_image, want_label = apply(d, box_of(d, frame_image), box_of(d, frame_label), FILL)
        inside = cv2.erode((want_label != IGNORE).astype(np.uint8), np.ones((3, 3))) > 0
        far = np.abs(image[row].numpy().astype(int) - want_image).max(axis=2) > 4
        assert far[inside].mean() < 0.01  # OpenCV rotates in steps of 1/32 pixel
        assert (label[row].numpy() != want_label).mean() < 0.05  # halves fall either way
        assert abs((label[row] == IGNORE).float().mean().item() - (want_label == IGNORE).mean()) < 0.01


def test_strong_downscaling_is_close_to_the_area_mean() -> None:
    drawn, (frame_image, frame_label) = draws(replace(FORMS["much smaller"], scale=(0.2, 0.25))), frame()
    flat, s = flatten([(frame_image, frame_label)] * len(drawn), drawn)
    image, _ = cut_crops(flat, s, drawn[0].crop_px, FILL)
    for row, d in enumerate(drawn):
        assert d.taps > 1
        want, _ = apply(d, box_of(d, frame_image), box_of(d, frame_label), FILL)
        assert np.abs(image[row].numpy().astype(int) - want).mean() < 4


def test_blur_is_gaussian_and_only_for_its_rows() -> None:
    image = torch.from_numpy(np.stack([frame(i)[0] for i in range(3)]))
    sigmas = np.array([0.3, 0.9, 1.5], np.float32)
    for got, before, sigma in zip(blurred(image, sigmas), image.numpy(), sigmas, strict=True):
        want = cv2.GaussianBlur(before, (0, 0), float(sigma), borderType=cv2.BORDER_REPLICATE)
        assert np.abs(got.numpy().astype(int) - want).max() <= 1
    drawn = [replace(d, blur_px=b) for d, b in zip(draws(FORMS["larger"], 3), (0.0, 1.2, 0.0), strict=True)]
    flat, s = flatten([frame()] * 3, drawn)
    got, _ = cut_crops(flat, s, drawn[0].crop_px, FILL)
    sharp, _ = cut_crops(flat, replace(s, blur_px=s.blur_px * 0), drawn[0].crop_px, FILL)
    assert [torch.equal(a, b) for a, b in zip(got, sharp, strict=True)] == [True, False, True]
    assert torch.equal(got[1:2], blurred(sharp[1:2], s.blur_px[1:2]))


def compare_with_plain(kernel: ModuleType, form: str, device: str) -> None:
    drawn = draws(FORMS[form], 4)
    flat, s = flatten([frame(i) for i in range(4)], drawn)
    tensors = [t.to(device) for t in (flat, torch.from_numpy(s.layout), torch.from_numpy(s.transforms))]
    image, label = kernel.cut_crops(*tensors, drawn[0].crop_px, FILL)
    want_image, want_label = cut_crops_plain(*tensors, drawn[0].crop_px, FILL)  # type: ignore[call-arg]
    far = (image.int() - want_image.int()).abs()
    assert far.max() <= 1 or (far > 1).float().mean() < 1e-3
    assert (far > 0).float().mean() < 0.01 and (label != want_label).float().mean() < 1e-3


INTERPRETED = """
from test_gpu import FORMS, compare_with_plain
from roadseg.data.augment import gpu_kernel
for form in FORMS:
    compare_with_plain(gpu_kernel, form, "cpu")
    print(form)
"""


def test_the_kernel_equals_plain_pytorch_in_tritons_interpreter() -> None:
    """In a new process: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(FORMS), done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_equals_plain_pytorch_on_a_gpu(form: str) -> None:
    from roadseg.data.augment import gpu_kernel

    compare_with_plain(gpu_kernel, form, "cuda")
