"""Predictions of the same frames at successive validations, side by side.

A picture is a grid: a row a frame with frame, truth and prediction, cells of one size, GAP_PX between them.
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
_WIDTHS_PX = (360, 240, 160)  # of a shown column, as far as the limit allows


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Panels, uint8 [h, w, 3] RGB, in cells as large as the largest of them."""
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

    Frames and truth are those of the last picture, as they are the same in all. At most `limit_bytes` in all
    (a page holds them as base64, a third more): first by narrower columns, then by fewer steps.
    """
    columns = _columns(folder)
    for width in _WIDTHS_PX:
        shown = [(caption, picture(column, width, 80)) for caption, column in columns]
        if _bytes(shown) <= limit_bytes:
            return shown
    while len(shown) > _COLUMNS and _bytes(shown) > limit_bytes:
        shown = shown[:2] + shown[2:-1:2] + shown[-1:] if len(shown) > _COLUMNS + 1 else shown[:2] + shown[-1:]
    return shown if _bytes(shown) <= limit_bytes else []


def _columns(folder: Path) -> list[tuple[str, np.ndarray]]:
    found: list[tuple[str, np.ndarray]] = []
    last = None
    for path in sorted(folder.glob("step-*.jpg"), key=step_of):
        with contextlib.suppress(ImageError, OSError):  # a damaged picture is no reason to have no report
            sheet = read_image(path)
            cell = (sheet.shape[1] + GAP_PX) // _COLUMNS
            last = [sheet[:, i * cell : (i + 1) * cell - GAP_PX] for i in range(_COLUMNS)]
            found.append((f"Step {step_of(path):,}", last[-1]))
    return [("Frame", last[0]), ("Truth", last[1]), *found] if last else []


def _bytes(shown: Sequence[tuple[str, bytes]]) -> int:
    return sum(len(data) for _, data in shown)
