"""Charts of loss, scores and speed over the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from roadseg.report import charts
from roadseg.report.page import finite

_POINTS = 300  # most points of a line, for training runs of any length
_HALF_LIFE = 0.04  # of the smoothed loss, as a share of the run

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


def training_curves(history: Rows, timing: Rows) -> list[tuple[str, Markup]]:
    """(caption, chart) of loss, validation scores, learning rate and speed, as far as the rows have them.

    history: {step, loss, learning_rate} and {step, split, miou, pixel_accuracy}. timing: {step, images_per_s,
    waiting_share}, in the order they were written.
    """
    steps = sorted((r for r in history if "loss" in r and "split" not in r), key=lambda r: r["step"])
    scores = _scores(sorted((r for r in history if "split" in r), key=lambda r: r["step"]))
    speed = _without_repeated_steps(timing)
    figures = [
        ("Training loss", _loss(steps)),
        (
            "Validation during training",
            charts.lines(scores, label=_alt_text("Validation", scores), x_label="step", percent=True),
        ),
        ("Learning rate", _one_line("Learning rate", _binned(_pairs(steps, "learning_rate")))),
        ("Images a second", _one_line("Images a second", _binned(_pairs(speed, "images_per_s")))),
        (
            "Share of the time waiting for data",
            _one_line("Waiting", _binned(_pairs(speed, "waiting_share")), percent=True),
        ),
    ]
    return [(caption, chart) for caption, chart in figures if chart]


def _loss(steps: Rows) -> Markup:
    pairs = _pairs(steps, "loss")
    size = math.ceil(len(pairs) / _POINTS)
    raw = f"means of up to {size} steps" if size > 1 else "each step"
    both = [charts.Line("smoothed", _binned(_smoothed(pairs))), charts.Line(raw, _binned(pairs), thin=True)]
    return charts.lines(both, label=_alt_text("Training loss", both[:1]), x_label="step")


def _smoothed(pairs: Points) -> Points:
    """Exponential moving average; a value's weight halves after the share _HALF_LIFE of all values."""
    keep = 0.5 ** (1 / max(1.0, _HALF_LIFE * len(pairs)))
    total = weight = 0.0
    smooth = []
    for x, y in pairs:
        total, weight = keep * total + y, keep * weight + 1
        smooth.append((x, total / weight))
    return smooth


def _scores(checks: Rows) -> list[charts.Line]:
    lines = []
    for key, text in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        for split in sorted({str(r["split"]) for r in checks}):
            rows = _pairs((r for r in checks if str(r["split"]) == split), key)
            lines.append(charts.Line(f"{split} {text}", rows, marked=len(rows) <= 40))
    return lines


def _without_repeated_steps(timing: Rows) -> list[Mapping[str, Any]]:
    """Drop rows of a killed run whose steps a later run repeated."""
    kept: list[Mapping[str, Any]] = []
    for row in reversed(timing):
        if not kept or row["step"] < kept[-1]["step"]:
            kept.append(row)
    return kept[::-1]


def _one_line(name: str, rows: Points, percent: bool = False) -> Markup:
    line = charts.Line(name, rows)
    return charts.lines([line], label=_alt_text(name, [line]), x_label="step", percent=percent)


def _alt_text(what: str, series: Sequence[charts.Line]) -> str:
    """Alternative text of a chart: the first and last value of each line."""
    ends = [
        f"{s.name} goes from {s.points[0][1]:.3g} at step {s.points[0][0]:,.0f}"
        f" to {s.points[-1][1]:.3g} at step {s.points[-1][0]:,.0f}"
        for s in series
        if s.points
    ]
    return f"{what} by step: " + "; ".join(ends)


def _pairs(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [(float(r["step"]), v) for r in rows if (v := finite(r.get(key))) is not None]


def _binned(pairs: Points) -> Points:
    """Means of consecutive points, at most _POINTS of them."""
    size = math.ceil(len(pairs) / _POINTS)
    bins = [pairs[i : i + size] for i in range(0, len(pairs), size)] if pairs else []
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
