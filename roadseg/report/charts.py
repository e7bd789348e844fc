"""Line and bar charts as inline SVG, without scripts or embedded fonts.

Colors come from the page: custom properties `--series-0` .. `--series-5`, `--heat`, `--grid`, ... of style.css, so
that one drawing serves light, dark and print. Lines differ in dash and marker as well as in color (the colors are
Okabe and Ito's, which color-blind readers can distinguish), heat maps in the lightness of one hue. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

_DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 2")
SERIES = 6  # number of series colors in style.css
CHAR = 6.6  # width in px of a character at 12 px, rounded up


@dataclass(frozen=True)
class Line:
    """A series; points with a value that is not finite are left out. `marked` draws each point.

    thin: faint, below the others and in gray, for the raw values of a smoothed line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False
    thin: bool = False


def bar(value: float | None, mark: float | None = None) -> Markup:
    """A horizontal bar for `value` in 0..1 with a tick at `mark`; fills its container, hidden from screen readers."""
    parts = [Markup('<rect class="track" width="100" height="12"/>')]
    if value is not None:
        parts.append(Markup('<rect class="value" width="{}" height="12"/>').format(num(100 * value)))
    if mark is not None:
        at = num(100 * mark)
        parts.append(Markup('<path class="mark" d="M{} -2v16"/>').format(at))
    return Markup(
        '<svg class="bar" viewBox="0 -2 100 16" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(parts))


def bars(values: Sequence[float | None]) -> Markup:
    """Thin horizontal bars for values in 0..1, one below the other in the series' colors; None leaves a gap."""
    rects = [
        Markup('<rect class="s{}" y="{}" width="{}" height="6"/>').format(i % SERIES, 8 * i, f"{100 * v:.2f}")
        for i, v in enumerate(values)
        if v is not None
    ]
    height = 8 * len(values) - 2
    return Markup(
        '<svg class="stack" viewBox="0 0 100 {h}" style="height:{h}px" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="{h}"/>{}</svg>'
    ).format(Markup("").join(rects), h=height)


def difference_bar(value: float, limit: float) -> Markup:
    """A bar to the right of the middle for a gain and to the left for a loss; `limit` > 0 fills its half."""
    width = 50 * min(1.0, abs(value) / limit)
    return Markup(
        '<svg class="bar" viewBox="0 -2 100 16" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="{}" x="{}" width="{}" height="12"/><path class="mark" d="M50 -2v16"/></svg>'
    ).format("gain" if value >= 0 else "loss", num(50 - width if value < 0 else 50), num(width))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high, low < high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def lines(series: Sequence[Line], *, label: str, x_label: str, percent: bool = False) -> Markup:
    """A line chart from zero, or empty where no series has a point.

    label: text for screen readers. percent: values are 0..1 and shown as 0..100 %.
    """
    finite = [replace(s, points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    visible = [s for s in sorted(finite, key=lambda s: s.thin) if s.points]
    if not visible:
        return Markup("")
    xs = [x for s in visible for x, _ in s.points]
    top = max(y for s in visible for _, y in s.points)
    x_low = 0.0 if 0 <= min(xs) <= 0.2 * max(xs) else min(xs)
    x_high = max(xs) if max(xs) > x_low else x_low + 1
    x_ticks = [t for t in ticks(x_low, x_high) if x_low <= t <= x_high + 0.03 * (x_high - x_low)]
    x_high = max(x_high, x_ticks[-1])
    y_ticks = ticks(min(0.0, *(y for s in visible for _, y in s.points)), 1.0 if percent else top if top > 0 else 1.0)
    legend, legend_height = _legend(visible)
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1], 12 + legend_height)
    body = [legend, *_axes(frame, x_ticks, y_ticks, x_label, percent)]
    body += [_polyline(i, s, frame) for thin in (True, False) for i, s in enumerate(visible) if s.thin == thin]
    return Markup('<svg class="lines" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _Frame.WIDTH, num(frame.bottom + 40), label, Markup("").join(body)
    )


@dataclass(frozen=True)
class _Frame:
    """The plotting area: data limits, and its top edge below the legend."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    top: float

    WIDTH = 480
    LEFT = 54
    RIGHT = 458
    HEIGHT = 190

    @property
    def bottom(self) -> float:
        return self.top + self.HEIGHT

    def x(self, value: float) -> float:
        return self.LEFT + (self.RIGHT - self.LEFT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return self.bottom - self.HEIGHT * (value - self.y_low) / (self.y_high - self.y_low)


def _legend(series: Sequence[Line]) -> tuple[Markup, float]:
    """The legend, wrapped into rows, and its height; empty for a single series."""
    if len(series) == 1:
        return Markup(""), 0.0
    parts, x, y = [], float(_Frame.LEFT), 14.0
    for i, s in enumerate(series):
        width = 44 + CHAR * len(s.name)
        if x + width > _Frame.WIDTH and x > _Frame.LEFT:
            x, y = float(_Frame.LEFT), y + 18
        stroke = _stroke(i, s, f"M{num(x)} {num(y - 4)}h26")
        mark = _marker(i, x + 13, y - 4) if s.marked else Markup("")
        text = Markup('<text x="{}" y="{}">{}</text>').format(num(x + 32), num(y), s.name)
        parts += [stroke, mark, text]
        x += width
    return Markup("").join(parts), y


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, percent: bool
) -> list[Markup]:
    parts = []
    for t in y_ticks:
        y = num(frame.y(t))
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(frame.LEFT, y, frame.RIGHT))
        text = f"{100 * t:.0f}%" if percent else f"{t:g}" if abs(t) >= 1e-3 or t == 0 else f"{t:.0e}"
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" dy="4" text-anchor="end">{}</text>').format(
                frame.LEFT - 7, y, text.replace("e-0", "e-")
            )
        )
    for t in x_ticks:
        text = f"{t:,.0f}" if t == round(t) else f"{t:g}"
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                num(frame.x(t)), num(frame.bottom + 17), text
            )
        )
    middle = (frame.LEFT + frame.RIGHT) / 2
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            num(middle), num(frame.bottom + 34), x_label
        )
    )
    return parts


def _polyline(index: int, series: Line, frame: _Frame) -> Markup:
    at = [(frame.x(x), frame.y(y)) for x, y in series.points]
    path = "M" + "L".join(f"{num(x)} {num(y)}" for x, y in at)
    line = _stroke(index, series, path)
    marks = [_marker(index, x, y) for x, y in at] if series.marked or (len(at) == 1 and not series.thin) else []
    return Markup("").join([line, *marks])


def _stroke(index: int, series: Line, path: str) -> Markup:
    if series.thin:
        return Markup('<path class="line thin" d="{}"/>').format(path)
    dash = _DASHES[index % len(_DASHES)]
    return Markup('<path class="line s{}" stroke-dasharray="{}" d="{}"/>').format(index % SERIES, dash, path)


def _marker(index: int, x: float, y: float) -> Markup:
    """A dot, a square, a triangle or a diamond."""
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "m-3.2 -3.2h6.4v6.4h-6.4z",
        "m0 -4.2l4.2 7.4h-8.4z",
        "m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    )
    return Markup('<path class="dot s{}" d="M{} {}{}"/>').format(
        index % SERIES, num(x), num(y), shapes[index % len(shapes)]
    )


def num(value: float) -> str:
    """At most one decimal: a tenth of a pixel is precise enough and keeps the file small."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
