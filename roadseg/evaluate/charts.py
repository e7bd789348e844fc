"""Charts as inline SVG, without scripts and without fonts of their own.

Colours come from the page: custom properties `--series-0` .. `--series-5`, `--heat`, `--grid`, ... of report.html, so
that one drawing serves light, dark and paper. Lines differ in dash and marker as well as in colour (the colours are
Okabe and Ito's, told apart by colour-blind readers), the heat map in the lightness of one hue. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 2")
_SERIES = 6  # colours in the page
_CHAR = 6.6  # width of a character at 12 px, a little generous
_LABEL_CHARS = 22  # longer names are cut in the heat map; the tooltip has them whole


@dataclass(frozen=True)
class Line:
    """A series; points with a value that is not finite are left out. `marked` draws each point."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


def bar(value: float | None, mark: float | None = None) -> Markup:
    """A horizontal bar for `value` in 0..1 and a tick at `mark`, as wide as its container; silent to screen readers."""
    parts = [Markup('<rect class="track" width="100" height="12"/>')]
    if value is not None:
        parts.append(Markup('<rect class="value" width="{}" height="12"/>').format(_num(100 * value)))
    if mark is not None:
        at = _num(100 * mark)
        parts.append(Markup('<path class="mark" d="M{} -2v16"/>').format(at))
    return Markup(
        '<svg class="bar" viewBox="0 -2 100 16" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(parts))


def difference_bar(value: float, limit: float) -> Markup:
    """A bar to the right of the middle for a gain and to the left for a loss; `limit` > 0 fills its half."""
    width = 50 * min(1.0, abs(value) / limit)
    return Markup(
        '<svg class="bar" viewBox="0 -2 100 16" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="{}" x="{}" width="{}" height="12"/><path class="mark" d="M50 -2v16"/></svg>'
    ).format("gain" if value >= 0 else "loss", _num(50 - width if value < 0 else 50), _num(width))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high, low < high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def lines(series: Sequence[Line], *, label: str, x_label: str, percent: bool = False) -> Markup:
    """A line chart from zero, or empty where no series has a point.

    label: what a screen reader says instead. percent: values are 0..1 and the axis says %, ending at 100.
    """
    finite = [Line(s.name, [p for p in s.points if math.isfinite(p[1])], s.marked) for s in series]
    drawn = [s for s in finite if s.points]
    if not drawn:
        return Markup("")
    xs = [x for s in drawn for x, _ in s.points]
    top = max(y for s in drawn for _, y in s.points)
    x_low = 0.0 if 0 <= min(xs) <= 0.2 * max(xs) else min(xs)
    x_high = max(xs) if max(xs) > x_low else x_low + 1
    x_ticks = [t for t in ticks(x_low, x_high) if x_low <= t <= x_high + 0.03 * (x_high - x_low)]
    x_high = max(x_high, x_ticks[-1])
    y_ticks = ticks(min(0.0, *(y for s in drawn for _, y in s.points)), 1.0 if percent else top if top > 0 else 1.0)
    legend, legend_height = _legend(drawn)
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1], 12 + legend_height)
    body = [legend, *_axes(frame, x_ticks, y_ticks, x_label, percent)]
    body += [_polyline(i, s, frame) for i, s in enumerate(drawn)]
    return Markup('<svg class="lines" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _Frame.WIDTH, _num(frame.bottom + 40), label, Markup("").join(body)
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
    """The entries in as many rows as they need, and the height they take; nothing for a single series."""
    if len(series) == 1:
        return Markup(""), 0.0
    parts, x, y = [], float(_Frame.LEFT), 14.0
    for i, s in enumerate(series):
        width = 44 + _CHAR * len(s.name)
        if x + width > _Frame.WIDTH and x > _Frame.LEFT:
            x, y = float(_Frame.LEFT), y + 18
        stroke = Markup('<path class="line s{}" stroke-dasharray="{}" d="M{} {}h26"/>').format(
            i % _SERIES, _dash(i), _num(x), _num(y - 4)
        )
        mark = _marker(i, x + 13, y - 4) if s.marked else Markup("")
        text = Markup('<text x="{}" y="{}">{}</text>').format(_num(x + 32), _num(y), s.name)
        parts += [stroke, mark, text]
        x += width
    return Markup("").join(parts), y


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, percent: bool
) -> list[Markup]:
    parts = []
    for t in y_ticks:
        y = _num(frame.y(t))
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
                _num(frame.x(t)), _num(frame.bottom + 17), text
            )
        )
    middle = (frame.LEFT + frame.RIGHT) / 2
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _num(middle), _num(frame.bottom + 34), x_label
        )
    )
    return parts


def _polyline(index: int, series: Line, frame: _Frame) -> Markup:
    at = [(frame.x(x), frame.y(y)) for x, y in series.points]
    path = "M" + "L".join(f"{_num(x)} {_num(y)}" for x, y in at)
    line = Markup('<path class="line s{}" stroke-dasharray="{}" d="{}"/>').format(index % _SERIES, _dash(index), path)
    marks = [_marker(index, x, y) for x, y in at] if series.marked or len(at) == 1 else []
    return Markup("").join([line, *marks])


def _dash(index: int) -> str:
    return _DASHES[index % len(_DASHES)]


def _marker(index: int, x: float, y: float) -> Markup:
    """A dot, a square, a triangle or a diamond."""
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "m-3.2 -3.2h6.4v6.4h-6.4z",
        "m0 -4.2l4.2 7.4h-8.4z",
        "m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    )
    return Markup('<path class="dot s{}" d="M{} {}{}"/>').format(
        index % _SERIES, _num(x), _num(y), shapes[index % len(shapes)]
    )


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str], colors: Sequence[str]) -> Markup:
    """A confusion matrix, rows truth and columns prediction, each row as shares of its pixels.

    names, colors (CSS): one a class. Up to 24 classes each cell says its share in %; beyond that only its shade and
    its tooltip do. Shares below 0.05 % are blank. A row without pixels says that it is absent.
    """
    n = len(names)
    cell = 36 if n <= 24 else max(10, 860 // n)
    font = min(12, 0.8 * cell)
    longest = _CHAR * font / 12 * min(_LABEL_CHARS, max((len(s) for s in names), default=0))
    left, top = longest + 26, 0.82 * longest + 40
    labels = [_heat_labels(names[i], colors[i], i, cell, left, top, font) for i in range(n)]
    rows = [_heat_row(i, counts[i], names, left, top + i * cell, cell, font) for i in range(n)]
    grid = "".join(f"M{_num(left)} {_num(top + k * cell)}h{n * cell}" for k in range(n + 1))
    grid += "".join(f"M{_num(left + k * cell)} {_num(top)}v{n * cell}" for k in range(n + 1))
    diagonal = "".join(f"M{_num(left + k * cell)} {_num(top + k * cell)}h{cell}v{cell}h-{cell}z" for k in range(n))
    corner = Markup('<text class="tick" x="0" y="{}">truth ↓</text><text class="tick" x="0" y="{}">predicted →</text>')
    width, height = left + n * cell + 0.6 * longest + 4, top + n * cell + 4
    return Markup(
        '<svg class="heat" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="Confusion matrix">'
        '{}{}<path class="grid" d="{}"/>{}<path class="diagonal" d="{}"/></svg>'
    ).format(
        corner.format(_num(top - 8), _num(top - 26)),
        Markup("").join(labels),
        grid,
        Markup("").join(rows),
        diagonal,
        w=_num(width),
        h=_num(height),
    )


def _heat_row(
    i: int, counts: Sequence[int], names: Sequence[str], left: float, y: float, cell: float, font: float
) -> Markup:
    total = sum(counts)
    if not total:
        return Markup('<text class="absent" x="{}" y="{}" dy="4" font-size="{}">{}</text>').format(
            _num(left + 8), _num(y + cell / 2), _num(font), "no pixel of it in the truth"
        )
    cells = []
    for j, count in enumerate(counts):
        what = f"{names[i]}, taken for {names[j]}" if i != j else names[i]
        if count / total >= 0.0005:
            cells.append(_cell(what, count, total, left + j * cell, y, cell, written=len(names) <= 24))
    return Markup("").join(cells)


def _heat_labels(name: str, color: str, i: int, cell: float, left: float, top: float, font: float) -> Markup:
    """The class beside its row and, turned, above its column, with its colour at both."""
    short = name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 1] + "…"
    middle = (i + 0.5) * cell
    x, y, swatch = left + middle, top + middle, min(10, cell - 2)
    return Markup(
        '<text x="{}" y="{}" dy="4" font-size="{f}" text-anchor="end">{name}</text>'
        '<rect class="swatch" x="{}" y="{}" width="{s}" height="{s}" fill="{c}"/>'
        '<text transform="translate({} {}) rotate(-55)" font-size="{f}">{name}</text>'
        '<rect class="swatch" x="{}" y="{}" width="{s}" height="{s}" fill="{c}"/>'
    ).format(
        *map(_num, (left - 22, y, left - 16, y - swatch / 2, x + 3, top - 22, x - swatch / 2, top - 16)),
        f=_num(font),
        s=_num(swatch),
        name=short,
        c=color,
    )


def _cell(what: str, count: int, total: int, x: float, y: float, size: float, written: bool) -> Markup:
    share = count / total
    shade = math.sqrt(share)  # so that 1 % can be seen beside 99 %
    text = Markup("")
    if written:
        percent = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
        text = Markup('<text class="{}" x="{}" y="{}" dy="4">{}</text>').format(
            "n hi" if shade > 0.65 else "n", _num(x + size / 2), _num(y + size / 2), percent
        )
    return Markup(
        '<g><title>{}: {}% ({} pixels)</title><rect x="{}" y="{}" width="{s}" height="{s}" fill-opacity="{}"/>{}</g>'
    ).format(what, f"{100 * share:.2f}", f"{count:,}", _num(x), _num(y), f"{shade:.2f}", text, s=_num(size))


def _num(value: float) -> str:
    """One decimal at most: a tenth of a pixel is enough, and keeps the file small."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
