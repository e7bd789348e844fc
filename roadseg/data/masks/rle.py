"""Fill shapes as COCO defines them: polygons, and column-wise run lengths, compressed or not.

A patch is (x, y, mask): bool [h, w] whose upper left corner is at (x, y) of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from roadseg.data.masks.json_values import describe_value
from roadseg.errors import ImageError

Patch = tuple[int, int, np.ndarray]
_SUBPIXELS = 5  # grid steps per pixel on which pycocotools walks an outline
_NOTHING: Patch = (0, 0, np.zeros((0, 0), bool))


def fill_polygon(ring: np.ndarray, width: int, height: int) -> Patch:
    """The pixels of float64 [n, 2] (x, y), even-odd, exactly as pycocotools' rleFrPoly fills it.

    The outline is walked on a grid of 5 x 5 steps per pixel; wherever it crosses the middle of a pixel column,
    inside and outside swap from there downwards.
    """
    corners = np.trunc(_SUBPIXELS * ring + 0.5).astype(np.int64)
    u, v = _walk(corners, np.roll(corners, -1, axis=0))
    step = np.diff(u)
    left = np.where(step < 0, u[1:], u[1:] - 1)
    crossing = (step != 0) & (left % _SUBPIXELS == 2) & (left > 0) & (left < _SUBPIXELS * width)
    column = left[crossing] // _SUBPIXELS
    upper = np.minimum(v[1:], v[:-1])[crossing]
    row = np.ceil(np.clip((upper + 0.5) / _SUBPIXELS - 0.5, 0, height)).astype(np.int64)
    if not len(column):
        return _NOTHING
    x, y = int(column.min()), int(row.min())
    columns, rows = int(column.max()) - x + 1, int(row.max()) - y
    changes = np.bincount((column - x) * (rows + 1) + row - y, minlength=columns * (rows + 1))
    inside = np.cumsum(changes.reshape(columns, rows + 1), axis=1, dtype=np.uint8) & 1  # wraps at 256, which is even
    return x, y, inside[:, :rows].T.astype(bool)


def _walk(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u, v): every point of the outline along its edges' longer direction, ends included.

    Positions are computed from an edge's left or upper end, whatever its direction, because rounding depends on it.
    """
    delta = end - start
    steep = np.abs(delta[:, 1]) > np.abs(delta[:, 0])
    along, across = np.where(steep, 1, 0), np.where(steep, 0, 1)
    edge = np.arange(len(start))
    length = np.abs(delta).max(axis=1)
    backwards = delta[edge, along] < 0
    low, high = np.where(backwards[:, None], end, start), np.where(backwards[:, None], start, end)
    slope = (high - low)[edge, across] / np.maximum(length, 1)
    which = np.repeat(edge, length + 1)
    t = np.arange(len(which)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    t = np.where(backwards[which], length[which] - t, t)
    major = low[edge, along][which] + t
    minor = np.trunc(low[edge, across][which] + slope[which] * t + 0.5).astype(np.int64)
    return np.where(steep[which], minor, major), np.where(steep[which], major, minor)


def runs_of(segmentation: dict[str, Any], width: int, height: int, at: str) -> np.ndarray:
    """int64 run lengths of outside, inside, outside, ... down the columns, with the sum width x height.

    Raises ImageError, naming `at`, for anything else.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        given = f"{size[1]} x {size[0]}" if isinstance(size, list) and len(size) == 2 else describe_value(size)
        raise ImageError(f"{at}: run lengths are for {given[:40]} pixels", expected=f"the image's {width} x {height}")
    if isinstance(counts, str):
        runs = _decompressed(counts, at)
    elif isinstance(counts, list) and all(type(n) is int and 0 <= n <= width * height for n in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ImageError(
            f"{at}: counts is {describe_value(counts)}", expected="a list of run lengths or a compressed string"
        )
    if (runs < 0).any() or (runs > width * height).any() or runs.sum() != width * height:
        raise ImageError(f"{at}: the run lengths do not add up to {width} x {height} pixels")
    return runs


def _decompressed(counts: str, at: str) -> np.ndarray:
    """Decode COCO's compressed run lengths.

    A character (from "0" on) holds 5 bits of a number, low bits first; its sixth bit is set if more characters
    follow; bit 5 of the last one is the sign. From the fourth number on, numbers are differences to the one two
    before.
    """
    codes = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ImageError(f"{at}: counts is not a compressed run-length string", expected="one as pycocotools writes it")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() > 7:
        raise ImageError(f"{at}: counts has a number of over 40 bits", expected="a string as pycocotools writes it")
    numbers = np.add.reduceat((codes & 31) << 5 * place, first)
    numbers -= np.where(codes[last] & 16, np.int64(1) << 5 * (last - first + 1), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def fill_runs(runs: np.ndarray, height: int) -> Patch:
    """The patch of the columns that have pixels inside."""
    ends = np.cumsum(runs)
    starts, ends = (ends - runs)[1::2], ends[1::2]
    nonempty = ends > starts
    starts, ends = starts[nonempty], ends[nonempty]
    if not len(starts):
        return _NOTHING
    x = int(starts[0]) // height
    columns = int(ends[-1] - 1) // height - x + 1
    changes = np.zeros(columns * height + 1, np.int8)
    np.add.at(changes, starts - x * height, 1)
    np.add.at(changes, ends - x * height, -1)
    inside = np.cumsum(changes[:-1], dtype=np.int8).reshape(columns, height)
    return x, 0, inside.T.astype(bool)
