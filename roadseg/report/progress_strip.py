"""Predictions of the same frames at successive validations, side by side.

Each picture is a grid with one row per frame: frame, truth and prediction, in cells of equal size GAP_PX apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roadseg.errors import ImageError
from roadseg.images.decode import read_image
from roadseg.report.page import picture

GAP_PX = 4
_COLUMNS = 3
_WIDTHS_PX = (360, 240, 160)  # column widths to try, until the size limit is met


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Join panels, uint8 [h, w, 3] RGB, in cells of the largest panel's size."""
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (0, 1))
    across = len(rows[0])
    sheet = np.zeros((len(rows) * (height + GAP_PX) - GAP_PX, across * (width + GAP_PX) - GAP_PX, 3), np.uint8)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            top, left = i * (height + GAP_PX), j * (width + GAP_PX)
            sheet[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return sheet


def name_of(step: int) -> str:
    return f"step-{step:08d}.jpg"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def progress_strip(folder: Path, limit_bytes: int = 1_100_000) -> list[tuple[str, bytes]]:
    """(caption, JPEG) of the frames, their truth and the prediction at each step; [] without pictures.

    Frames and truth come from the last picture; they are the same in all. The total is at most `limit_bytes`
    (base64 in a page adds a third): columns get narrower first, then steps are left out.
    """
    columns = _columns(folder)
    for width in _WIDTHS_PX:
        strip = [(caption, picture(column, width, 80)) for caption, column in columns]
        if _bytes(strip) <= limit_bytes:
            return strip
    while len(strip) > _COLUMNS and _bytes(strip) > limit_bytes:
        strip = strip[:2] + strip[2:-1:2] + strip[-1:] if len(strip) > _COLUMNS + 1 else strip[:2] + strip[-1:]
    return strip if _bytes(strip) <= limit_bytes else []


def _columns(folder: Path) -> list[tuple[str, np.ndarray]]:
    found: list[tuple[str, np.ndarray]] = []
    last = None
    for path in sorted(folder.glob("step-*.jpg"), key=step_of):
        with contextlib.suppress(ImageError, OSError):  # a damaged picture must not prevent the report
            sheet = read_image(path)
            cell = (sheet.shape[1] + GAP_PX) // _COLUMNS
            last = [sheet[:, i * cell : (i + 1) * cell - GAP_PX] for i in range(_COLUMNS)]
            found.append((f"Step {step_of(path):,}", last[-1]))
    return [("Frame", last[0]), ("Truth", last[1]), *found] if last else []


def _bytes(strip: Sequence[tuple[str, bytes]]) -> int:
    return sum(len(data) for _, data in strip)
