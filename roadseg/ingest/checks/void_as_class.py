"""Detect void or padding written as 0 where 0 is the id of a learned class.

Uses labels only: a band of 0 along one edge of every label, or 0 where the class cannot be (road at the top of the
image, sky at the bottom). Plausible positions are not detected, such as a hood labeled as road, a band of road at
the bottom or of sky at the top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from roadseg.data.masks.form import MaskForm
from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.measure import GRID_COLUMNS, GRID_ROWS, MeasuredPair
from roadseg.labels import IGNORE, LabelClass

_ALWAYS, _NO_BAND = 0.99, 0.6  # share of labels with 0 in every cell of the band, and in some cell next to it
_FEWEST_FOR_BAND = 8  # labels; with fewer, a band may be a coincidence
_FEWEST, _SHARE = 3, 0.05  # labels with 0 in impossible places: least number, least share
_FEWEST_CELLS = 2
_ROADLESS, _SKYLESS = (
    4,
    6,
)  # of 16 rows, from the top without road, from the bottom without sky; true for CamVid and the town
_GROUND = frozenset(("flat", "ground", "terrain", "grass", "pavement", "floor"))
_ROAD = frozenset(("road", "roads", "street", "lane", "lanes", "roadway", "carriageway", "drivable", "asphalt"))


def void_as_class(where: str, split: str, measured: Sequence[MeasuredPair], form: MaskForm) -> list[Finding]:
    """At most one warning for one split and part, named `where` in the message.

    No false warning on CamVid, four Cityscapes frames and 500 of the town (benchmarks/planted_faults.py).
    """
    zero = _class_of_zero(form)
    labelled = [s for s in measured if s.places]
    if zero is None or not labelled:
        return []
    places = np.frombuffer(b"".join(s.places for s in labelled), np.uint8).reshape(-1, GRID_ROWS, GRID_COLUMNS)
    zeros_NHW = places == zero.train_id
    sides = _bands(zeros_NHW, zero)
    strange = [] if sides else _out_of_place(zeros_NHW, labelled, zero)
    if not sides and not strange:
        return []
    entries = tuple(s.pair.label for s in labelled) if sides else tuple(strange)
    if sides:
        message = f"{zero.name}, whose value in the masks is 0, lies along the {' and '.join(sides)} edge of "
        message += f"{'all' if len(entries) > 1 else 'the'} {plural(len(entries), 'label')} of {where}, as padding does"
    else:
        zone = "bottom" if "sky" in _words(zero) else "top"
        message = f"{plural(len(entries), 'label')} of {where} without void, but with {zero.name}, whose value in the "
        message += f"masks is 0, at the {zone} of the picture: void may have been written as 0"
    fix = "look at some; write void and padding as an id that is ignored, such as 255"
    return [Finding("void-as-class", "warning", split, entries, len(entries), message, fix)]


def _class_of_zero(form: MaskForm) -> LabelClass | None:
    """The learned class that 0 stands for: id 0, black in color masks, or the background of polygons."""
    id_ = 0 if form.kind == "ids" else form.background
    for c in form.label_set.classes:
        if c.color == (0, 0, 0) if form.kind == "colors" else c.id == id_:
            return c if c.train_id != IGNORE else None
    return None


def _bands(zeros_NHW: np.ndarray, zero: LabelClass) -> list[str]:
    """Edges with a band of 0 in all labels that ends at one line; not the edges that the class may really fill."""
    if len(zeros_NHW) < _FEWEST_FOR_BAND:
        return []
    always = zeros_NHW.mean(axis=0)
    sides = {"left": always.T, "right": always.T[::-1]}
    if "sky" not in _words(zero):
        sides["top"] = always
    if not _words(zero) & (_ROAD | _GROUND):
        sides["bottom"] = always[::-1]
    found = []
    for side, lines in sides.items():
        lowest = lines.min(axis=1)
        thick = int(np.argmin(lowest >= _ALWAYS))  # in lines from the edge; 0 also if all lines are 0
        if thick and lowest[thick] < _NO_BAND:
            found.append(side)
    return found


def _out_of_place(zeros_NHW: np.ndarray, measured: Sequence[MeasuredPair], zero: LabelClass) -> list[str]:
    if "sky" in _words(zero):
        zone = zeros_NHW[:, -_SKYLESS:]
    elif _words(zero) & _ROAD:
        zone = zeros_NHW[:, :_ROADLESS]
    else:
        return []
    cells = zone.sum(axis=(1, 2))
    found = [
        f"{s.pair.label}: {n} of {zone[0].size} places"
        for s, n in zip(measured, cells.tolist(), strict=True)
        if n >= _FEWEST_CELLS and not s.histogram[-1]
    ]
    return found if len(found) >= max(_FEWEST, _SHARE * len(measured)) else []


def _words(c: LabelClass) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z]+", c.name.lower()))
