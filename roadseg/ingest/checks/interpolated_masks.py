"""Detect masks whose values were mixed by interpolation, smoothing or JPEG compression."""

from __future__ import annotations

import numpy as np

from roadseg.data.masks.form import UNKNOWN

# Threshold of `interpolated_share`. Measured on CamVid, four Cityscapes labels and 500 of the town at 256x128: at most
# 0.058 for original masks and 0.137 after reduction to 64x32 by nearest neighbor; at least 0.144 after linear, area
# or cubic resizing by 0.5 to 2, after blurring, and after JPEG of quality 95.
INTERPOLATED_SHARE = 0.14
_ROWS = 128
_FEWEST_CHANGES = 200  # with fewer, a few thin objects would decide
_MOST_CHANGED = (
    0.5  # share of neighbors that differ; noise and one-pixel stripes have no areas whose edges could be mixed
)


def interpolated_share(ids: np.ndarray) -> float:
    """Share (0..1) of value changes along sampled rows of uint8 or uint16 [H, W] that pass an intermediate value.

    An intermediate pixel lies strictly between its left and right neighbors, or is UNKNOWN between two different
    values (color masks, where ids have no order). 0 if there are too few or too many changes to decide.
    """
    rows = ids[:: max(1, len(ids) // _ROWS)]
    changed = rows[:, 1:] != rows[:, :-1]
    changes = int(np.count_nonzero(changed))
    if not _FEWEST_CHANGES <= changes <= _MOST_CHANGED * changed.size:
        return 0.0
    both = changed[:, :-1] & changed[:, 1:]
    # Only these few are looked at further. np.nonzero on two dimensions takes 20 times as long.
    at, left = np.divmod(np.flatnonzero(both), both.shape[1])
    a, b, c = rows[at, left], rows[at, left + 1], rows[at, left + 2]
    steps = ((a < b) & (b < c)) | ((a > b) & (b > c)) | ((b == UNKNOWN) & (a != c))
    return int(np.count_nonzero(steps)) / changes
