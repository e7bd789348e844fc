"""Centroids against a plain reference in float, tile by tile."""

from __future__ import annotations

import numpy as np
import pytest

from roadseg.labels import IGNORE
from roadseg.transform.centroids import class_centroids


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    label = np.full((height, width), IGNORE, np.uint8)
    for _ in range(40):
        y, x, r = rng.integers(0, height), rng.integers(0, width), rng.integers(1, height // 4)
        label[y : y + r, x : x + r] = rng.integers(0, 12)
    return label


@pytest.mark.parametrize(("height", "width"), [(64, 128), (100, 100), (128, 64), (37, 300)])
def test_a_centroid_is_the_pixel_of_its_class_nearest_to_the_mean(height: int, width: int) -> None:
    for seed in range(5):
        label = blobs(seed, height, width)
        found = class_centroids(label)
        assert found and len(found) == len(set(found))
        side = (height * width / 8) ** 0.5
        rows, columns = max(1, round(height / side)), max(1, round(width / side))
        assert 4 <= rows * columns <= 16
        expected = {}
        for i in range(rows):
            for j in range(columns):
                top, bottom = height * i // rows, height * (i + 1) // rows
                left, right = width * j // columns, width * (j + 1) // columns
                for c in set(label[top:bottom, left:right].ravel().tolist()) - {IGNORE}:
                    pixels = np.argwhere(label[top:bottom, left:right] == c)
                    away = np.hypot(*(pixels - pixels.mean(axis=0)).T)
                    expected[i, j, c] = away.min(), (pixels.mean(axis=0) + (top, left)), (top, bottom, left, right)
        assert len(found) == len(expected)
        for (c, y, x), (_, (nearest, mean, box)) in zip(found, sorted(expected.items()), strict=True):
            assert label[y, x] == c and box[0] <= y < box[1] and box[2] <= x < box[3]
            # A mean that rounds to a pixel of the class is that pixel, half a pixel away at most.
            assert np.hypot(y - mean[0], x - mean[1]) <= max(nearest, 0.5**0.5) + 1e-9


def test_a_ring_s_centroid_lies_on_the_ring() -> None:
    label = np.full((1024, 2048), IGNORE, np.uint8)
    label[100:400, 100:400] = 3
    label[110:390, 110:390] = 4
    label[120:380, 120:380] = IGNORE
    assert {c for c, _, _ in class_centroids(label)} == {3, 4}
    assert all(label[y, x] == c for c, y, x in class_centroids(label))


def test_small_areas_and_void_have_no_centroid() -> None:
    label = np.full((1024, 2048), IGNORE, np.uint8)
    label[0:7, 0:9] = 2  # 63 pixels in a tile of 512x512
    assert class_centroids(label) == ()
    label[7, 0] = 2
    assert [c for c, _, _ in class_centroids(label)] == [2]
    assert class_centroids(np.zeros((1, 1), np.uint8)) == ((0, 0, 0),)
    assert class_centroids(np.full((5, 5), IGNORE, np.uint8)) == ()
