import cv2
import numpy as np
import pytest

from roadseg.data.masks.form import UNKNOWN
from roadseg.ingest.checks.interpolated_masks import INTERPOLATED_SHARE, interpolated_share


def regions(high: int = 240, wide: int = 320, seed: int = 0) -> np.ndarray:
    """uint8 [H, W]: sixty overlapping discs of the ids 0..11."""
    rng = np.random.default_rng(seed)
    label = np.zeros((high, wide), np.uint8)
    for _ in range(60):
        centre = int(rng.integers(0, wide)), int(rng.integers(0, high))
        cv2.circle(label, centre, int(rng.integers(8, 50)), int(rng.integers(0, 12)), -1)
    return label


def plainly(ids: np.ndarray) -> float:
    """The definition, pixel by pixel, over all rows."""
    changes = steps = 0
    for row in ids.tolist():
        changes += sum(a != b for a, b in zip(row, row[1:], strict=False))
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            steps += a < b < c or a > b > c or (b == UNKNOWN and a != b != c != a)
    return steps / changes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_share_matches_its_definition(dtype):
    ids = cv2.GaussianBlur(regions(100), (3, 3), 0).astype(dtype)  # as many rows as are sampled
    if dtype is np.uint16:
        ids[::3, ::5] = UNKNOWN
    assert interpolated_share(ids) == pytest.approx(plainly(ids), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_interpolated_masks_are_distinguished_from_originals(seed):
    label = regions(seed=seed)
    assert interpolated_share(label) < INTERPOLATED_SHARE / 2
    assert (
        interpolated_share(cv2.resize(label, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_NEAREST))
        < INTERPOLATED_SHARE
    )
    jpeg = cv2.imdecode(cv2.imencode(".jpg", label)[1], cv2.IMREAD_UNCHANGED)
    halved = cv2.resize(label, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    doubled = cv2.resize(label, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    for mixed in (jpeg, halved, doubled, cv2.GaussianBlur(label, (3, 3), 0)):
        assert interpolated_share(mixed) > INTERPOLATED_SHARE


def test_too_few_or_too_many_changes_give_zero():
    assert interpolated_share(np.zeros((4, 1), np.uint8)) == 0.0
    ramp = np.repeat(np.arange(100, dtype=np.uint8), 3)[None]
    ramp[:, ::7] += 1
    assert plainly(ramp) > 0 and interpolated_share(ramp) == 0.0  # fewer than 200 changes
    assert interpolated_share(np.tile(np.arange(240, dtype=np.uint8), (9, 1))) == 0.0  # no two equal neighbors
    assert (
        interpolated_share(np.tile(np.repeat(np.arange(0, 240, 2, dtype=np.uint8), 3), (9, 1))) == 0.0
    )  # no intermediate values
