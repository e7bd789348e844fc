"""Image statistics compared with NumPy, and their invariances."""

from dataclasses import astuple

import cv2
import numpy as np
import pytest

from roadseg.ingest.image_stats import image_stats, sharpness


def scene(seed: int, width: int = 256, height: int = 128) -> np.ndarray:
    """uint8 [height, width, 3]: patches with hard borders in three sizes, for detail at every scale."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (height // s + 1, width // s + 1, 3), np.uint8) for s in (32, 8, 2)]
    full = [cv2.resize(x, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.float32) for x in layers]
    return (0.5 * full[0] + 0.3 * full[1] + 0.2 * full[2]).astype(np.uint8)


def test_exposure_matches_numpy_without_reduction():
    image = scene(0)
    image[:16], image[16:40] = 0, 255
    stats = image_stats(image)
    assert stats.mean_rgb == pytest.approx(image.reshape(-1, 3).mean(0), abs=1e-6)
    assert stats.std_rgb == pytest.approx(image.reshape(-1, 3).std(0), abs=1e-6)
    assert stats.luma == pytest.approx((image @ np.array([0.299, 0.587, 0.114])).mean(), abs=1e-4)
    luma = np.rint(image @ np.array([0.299, 0.587, 0.114]))
    assert stats.dark == pytest.approx((luma <= 8).mean(), abs=1e-3) and stats.dark > 0.12
    assert stats.bright == pytest.approx((luma >= 247).mean(), abs=1e-3) and stats.bright > 0.18


@pytest.mark.parametrize("width,height", [(2048, 1024), (1920, 1208), (641, 479), (1500, 200), (90, 1400)])
def test_reducing_keeps_the_mean(width, height):
    image = cv2.GaussianBlur(scene(1, width, height), (0, 0), 3)
    assert image_stats(image).mean_rgb == pytest.approx(image.reshape(-1, 3).mean(0), abs=2.5)


@pytest.mark.parametrize("width,height", [(1, 1), (1, 300), (3000, 1), (255, 127), (513, 257)])
def test_any_image_size_is_accepted(width, height):
    stats = image_stats(np.full((height, width, 3), 77, np.uint8))
    assert stats.mean_rgb == (77, 77, 77) and stats.std_rgb == (0, 0, 0)
    assert (stats.dark, stats.bright, stats.sharpness) == (0, 0, 0) and stats.descriptor == bytes([128]) * (48 * 24)


def test_sharpness_is_the_ratio_of_squared_differences():
    image = scene(2, 1024, 64)
    green = image[..., 1].astype(np.float64)
    near, far = (np.square(green[:, d:] - green[:, :-d]).mean() for d in (2, 8))
    assert sharpness(image) == pytest.approx(near / far, rel=1e-9)


def test_blur_lowers_sharpness_but_exposure_hardly_does():
    image = scene(3, 512, 256)
    sharp = [sharpness(cv2.GaussianBlur(image, (0, 0), s) if s else image) for s in (0, 1, 2, 4)]
    assert sharp == sorted(sharp, reverse=True) and sharp[2] < 0.5 * sharp[0]
    assert sharpness(image // 2) == pytest.approx(sharp[0], rel=0.02)


def test_blur_is_relative_to_the_image_width():
    image = scene(4, 512, 256)
    double = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    assert sharpness(double) == pytest.approx(sharpness(image), rel=0.05)


def test_the_descriptor_depends_on_content_not_contrast():
    image = scene(5, 512, 256)
    first, second, other = (
        np.frombuffer(image_stats(i).descriptor, np.uint8).astype(float)
        for i in (image, image // 2 + 60, scene(6, 512, 256))
    )
    assert len(first) == 48 * 24 and first.std() > 20
    assert np.corrcoef(first, second)[0, 1] > 0.98 and np.corrcoef(first, other)[0, 1] < 0.4


def test_image_stats_are_small_and_deterministic():
    image = scene(7, 2048, 1024)
    assert image_stats(image) == image_stats(image.copy())
    assert len(image_stats(image).descriptor) <= 1500 and len(astuple(image_stats(image))) == 6
