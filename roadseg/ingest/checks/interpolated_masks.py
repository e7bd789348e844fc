"""Whether a mask's values are mixtures of their neighbours, as interpolation, smoothing and JPEG leave them."""

from __future__ import annotations

import numpy as np

from roadseg.data.masks.form import UNKNOWN

# Of `blended`. Measured on CamVid, four Cityscapes labels and 500 of the town at 256x128: masks as they
# are 0.058 at most, reduced to a quarter by nearest neighbour 0.137 (of 64x32 pixels then); resized
# linearly, by area or cubically to 0.5 to 2 times, blurred, or through JPEG of quality 95, 0.144 at least.
INTERPOLATED_SHARE = 0.14
_ROWS = 128
_FEWEST_CHANGES = 200  # below, a few thin things would decide
_MOST_CHANGED = 0.5  # of all neighbours; noise and stripes of a pixel are no areas whose edges could be mixed


def interpolated_share(ids: np.ndarray) -> float:
    """Of the changes of value along sampled rows of uint8 or uint16 [H, W], the share that is a step on the way.

    A step is a pixel whose value lies strictly between its left and right neighbour's, or is UNKNOWN
    between two others (of colours, where values have no order). 0 where changes are too few or too many to tell.
    """
    rows = ids[:: max(1, len(ids) // _ROWS)]
    changed = rows[:, 1:] != rows[:, :-1]
    changes = int(np.count_nonzero(changed))
    if not _FEWEST_CHANGES <= changes <= _MOST_CHANGED * changed.size:
        return 0.0
    both = changed[:, :-1] & changed[:, 1:]
    # Few, so the rest is done on these alone. np.nonzero of two dimensions takes 20 times as long.
    at, left = np.divmod(np.flatnonzero(both), both.shape[1])
    a, b, c = rows[at, left], rows[at, left + 1], rows[at, left + 2]
    steps = ((a < b) & (b < c)) | ((a > b) & (b > c)) | ((b == UNKNOWN) & (a != c))
    return int(np.count_nonzero(steps)) / changes
