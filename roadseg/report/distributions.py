"""Histograms and heat maps as inline SVG, in the colors of style.css; all text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from roadseg.report.charts import SERIES, num, ticks

_LEVELS = 6  # shades of a map that a reader can distinguish


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    LEFT = 8
    RIGHT = 412
    ROW = 44
    GAP = 24

    def share(self, value: float) -> float:
        """Position along the axis, 0 at the left end and 1 at the right, clipped."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return min(1.0, max(0.0, (self._scaled(max(value, self.low)) - low) / (high - low)))

    def x(self, value: float) -> float:
        return self.LEFT + (self.RIGHT - self.LEFT) * self.share(value)

    def marks(self) -> list[float]:
        """Round values along the axis."""
        if not self.log:
            return [t for t in ticks(self.low, self.high) if self.low <= t <= self.high]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(powers) <= 4 else (1,)
        return [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def histograms(
    rows: Sequence[tuple[str, Sequence[float]]], *, label: str, x_label: str, log: bool = False, bins: int = 48
) -> Markup:
    """One histogram a row on a common axis, each scaled to its own highest bin.

    rows: (name, finite values), in the series' colors. log: logarithmic axis; values of 0 and below are drawn at
    the smallest positive value. label: text for screen readers. Empty where no row has a value.
    """
    everything = [v for _, values in rows for v in values if not log or v > 0]
    if not everything:
        return Markup("")
    low, high = min(everything), max(everything)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    axis = _Axis(low, high, log)
    bottom = len(rows) * (axis.ROW + axis.GAP)
    body = [_histogram(i, name, values, axis, bins) for i, (name, values) in enumerate(rows)]
    tick = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
    body += [tick.format(num(axis.x(t)), bottom + 16, f"{t:,.6g}") for t in axis.marks()]
    body.append(tick.format(num((axis.LEFT + axis.RIGHT) / 2), bottom + 34, x_label))
    return Markup('<svg class="lines" viewBox="0 0 420 {}" role="img" aria-label="{}">{}</svg>').format(
        bottom + 40, label, Markup("").join(body)
    )


def _histogram(index: int, name: str, values: Sequence[float], axis: _Axis, bins: int) -> Markup:
    counts = [0] * bins
    for v in values:
        counts[min(bins - 1, int(axis.share(v) * bins))] += 1
    bottom, tallest, width = (index + 1) * (axis.ROW + axis.GAP), max(1, *counts), (axis.RIGHT - axis.LEFT) / bins
    steps = "".join(
        # Outliers must stay visible: a bin that is not empty is at least 2 px high.
        f"M{num(axis.LEFT + k * width)} {bottom}v-{num(max(2.0, axis.ROW * n / tallest))}h{num(width - 1)}V{bottom}z"
        for k, n in enumerate(counts)
        if n
    )
    return Markup(
        '<text x="{left}" y="{}">{}</text><path class="fill s{}" d="{}"/><path class="grid" d="M{left} {}H{}"/>'
    ).format(bottom - axis.ROW - 6, name, index % SERIES, steps, bottom, axis.RIGHT, left=axis.LEFT)


def location_map(shares: np.ndarray, label: str, aspect: float) -> Markup:
    """A heat map of positions in the frame: float [H, W] >= 0, shaded relative to its highest value.

    aspect: width / height of the frame, which may differ from the grid's.
    """
    height, width = shares.shape
    top = float(shares.max(initial=0.0))
    level = np.ceil(shares / top * _LEVELS).astype(int) if top > 0 else np.zeros((height, width), int)
    paths = []
    for k in range(1, _LEVELS + 1):
        if runs := _runs(level == k):
            path = "".join(f"M{x} {y}h{n}v1h-{n}z" for x, y, n in runs)
            paths.append(Markup('<path fill-opacity="{}" d="{}"/>').format(f"{k / _LEVELS:.2f}", path))
    return Markup(
        '<svg class="place" viewBox="0 0 {} {}" preserveAspectRatio="none" style="aspect-ratio: {}" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(width, height, f"{aspect:.3f}", label, Markup("").join(paths))


def _runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(x, y, length) of the runs of True in the rows of bool [H, W]."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    return [(int(x), int(y), int(e - x)) for y, x, e in zip(rows, starts, ends, strict=True)]
