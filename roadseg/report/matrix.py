"""The confusion matrix as inline SVG, in the colors of style.css; all text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from roadseg.report.charts import CHAR, num

_LABEL_CHARS = 22  # longer names are cut; the tooltip shows the full name


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], colors: Sequence[str]) -> Markup:
    """A confusion matrix, rows truth and columns prediction, each row as shares of its pixels.

    names, colors (CSS): one per class. Up to 24 classes, each cell shows its share in %; above, only the shade and
    the tooltip do. Shares below 0.05 % are blank. A row without pixels is marked as absent.
    """
    n = len(names)
    cell = 36 if n <= 24 else max(10, 860 // n)
    font = min(12, 0.8 * cell)
    longest = CHAR * font / 12 * min(_LABEL_CHARS, max((len(s) for s in names), default=0))
    left, top = longest + 26, 0.82 * longest + 40
    labels = [_heat_labels(names[i], colors[i], i, cell, left, top, font) for i in range(n)]
    rows = [_heat_row(i, counts[i], names, left, top + i * cell, cell, font) for i in range(n)]
    grid = "".join(f"M{num(left)} {num(top + k * cell)}h{n * cell}" for k in range(n + 1))
    grid += "".join(f"M{num(left + k * cell)} {num(top)}v{n * cell}" for k in range(n + 1))
    diagonal = "".join(f"M{num(left + k * cell)} {num(top + k * cell)}h{cell}v{cell}h-{cell}z" for k in range(n))
    corner = Markup('<text class="tick" x="0" y="{}">truth ↓</text><text class="tick" x="0" y="{}">predicted →</text>')
    width, height = left + n * cell + 0.6 * longest + 4, top + n * cell + 4
    return Markup(
        '<svg class="heat" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="Confusion matrix">'
        '{}{}<path class="grid" d="{}"/>{}<path class="diagonal" d="{}"/></svg>'
    ).format(
        corner.format(num(top - 8), num(top - 26)),
        Markup("").join(labels),
        grid,
        Markup("").join(rows),
        diagonal,
        w=num(width),
        h=num(height),
    )


def _heat_row(
    i: int, counts: Sequence[int], names: Sequence[str], left: float, y: float, cell: float, font: float
) -> Markup:
    total = sum(counts)
    if not total:
        return Markup('<text class="absent" x="{}" y="{}" dy="4" font-size="{}">{}</text>').format(
            num(left + 8), num(y + cell / 2), num(font), "no pixel of it in the truth"
        )
    cells = []
    for j, count in enumerate(counts):
        what = f"{names[i]}, taken for {names[j]}" if i != j else names[i]
        if count / total >= 0.0005:
            cells.append(_cell(what, count, total, left + j * cell, y, cell, written=len(names) <= 24))
    return Markup("").join(cells)


def _heat_labels(name: str, color: str, i: int, cell: float, left: float, top: float, font: float) -> Markup:
    """The class name beside its row and, rotated, above its column, each with its color."""
    short = name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 1] + "…"
    middle = (i + 0.5) * cell
    x, y, swatch = left + middle, top + middle, min(10, cell - 2)
    return Markup(
        '<text x="{}" y="{}" dy="4" font-size="{f}" text-anchor="end">{name}</text>'
        '<rect class="swatch" x="{}" y="{}" width="{s}" height="{s}" fill="{c}"/>'
        '<text transform="translate({} {}) rotate(-55)" font-size="{f}">{name}</text>'
        '<rect class="swatch" x="{}" y="{}" width="{s}" height="{s}" fill="{c}"/>'
    ).format(
        *map(num, (left - 22, y, left - 16, y - swatch / 2, x + 3, top - 22, x - swatch / 2, top - 16)),
        f=num(font),
        s=num(swatch),
        name=short,
        c=color,
    )


def _cell(what: str, count: int, total: int, x: float, y: float, size: float, written: bool) -> Markup:
    share = count / total
    shade = math.sqrt(share)  # square root, so that 1 % is visible beside 99 %
    text = Markup("")
    if written:
        percent = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
        text = Markup('<text class="{}" x="{}" y="{}" dy="4">{}</text>').format(
            "n hi" if shade > 0.65 else "n", num(x + size / 2), num(y + size / 2), percent
        )
    return Markup(
        '<g><title>{}: {}% ({} pixels)</title><rect x="{}" y="{}" width="{s}" height="{s}" fill-opacity="{}"/>{}</g>'
    ).format(what, f"{100 * share:.2f}", f"{count:,}", num(x), num(y), f"{shade:.2f}", text, s=num(size))
