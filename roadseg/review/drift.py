"""How far two data sets are apart: one row a quantity, and one verdict.

PSI, the population stability index, sums (b - a) ln(b / a) over shares of bins: below 0.1 is taken for
the same, above 0.25 for another population (Siddiqi, "Credit Risk Scorecards", 2006). Separability is
how often a frame's set is told right from another frame's by its nearest neighbours: 0.5 is not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from roadseg.review.data_profile import QUANTITIES, Profile

Verdict = Literal["same", "shifted", "different", "not compared"]
SHIFTED, DIFFERENT = 0.1, 0.25  # of PSI
SEPARABLE_SHIFTED, SEPARABLE_DIFFERENT = 0.7, 0.9
BINS = 10
NEIGHBOURS = 5
_ENOUGH_FRAMES = 20  # with fewer, ten bins say more about chance than about the data
_ORDER: tuple[Verdict, ...] = ("not compared", "same", "shifted", "different")


@dataclass(frozen=True)
class Row:
    """a, b: what stands for each side. score: PSI or separability, None where not compared."""

    quantity: str
    a: str
    b: str
    measure: str
    score: float | None
    verdict: Verdict
    note: str = ""


def compare(a: Profile, b: Profile) -> list[Row]:
    rows = [_classes(a, b)]
    rows += [_quantity(name, a.values[name], b.values[name]) for name in QUANTITIES]
    return [*rows, _embedding(a, b)]


def verdict(rows: Sequence[Row]) -> Verdict:
    """The worst of the rows."""
    return max((r.verdict for r in rows), key=_ORDER.index)


def psi(a: np.ndarray, b: np.ndarray) -> float:
    """Of two histograms with the same bins; every bin gets half a count, so that empty ones stay finite."""
    p, q = ((h + 0.5) / (h.sum() + 0.5 * len(h)) for h in (np.asarray(a, float), np.asarray(b, float)))
    return float(((q - p) * np.log(q / p)).sum())


def _judge(score: float, shifted: float, different: float) -> Verdict:
    return "different" if score > different else "shifted" if score > shifted else "same"


def _classes(a: Profile, b: Profile) -> Row:
    names = [n for n in a.class_pixels if n in b.class_pixels]
    odd = sorted(set(a.class_pixels) ^ set(b.class_pixels))
    if not names:
        return Row("classes", "", "", "PSI", None, "not compared", "no class in common")
    # Pixels of a frame are no independent draws: as many counts as frames keep the half counts meaningful.
    p, q = (np.array([x.class_pixels[n] for n in names], float) for x in (a, b))
    p, q = (h / max(h.sum(), 1) * x.images * len(names) for h, x in ((p, a), (q, b)))
    score = psi(p, q)
    share_a, share_b = p / max(p.sum(), 1), q / max(q.sum(), 1)
    most = sorted(range(len(names)), key=lambda i: -abs(share_b[i] - share_a[i]))[:3]
    moved = ", ".join(f"{names[i]} {share_a[i]:.1%} to {share_b[i]:.1%}" for i in most)
    note = moved + (f"; in one of the two only: {', '.join(odd)}" if odd else "")
    result = _judge(score, SHIFTED, DIFFERENT)
    if odd and result == "same":
        result = "shifted"
    left, right = (f"{sum(n > 0 for n in x.class_pixels.values())} classes" for x in (a, b))
    return Row("classes", left, right, "PSI", score, result, note)


def _quantity(name: str, a: np.ndarray, b: np.ndarray) -> Row:
    left, right = (f"{np.median(v):.1f}" if len(v) else "" for v in (a, b))
    if min(len(a), len(b)) < _ENOUGH_FRAMES:
        return Row(name, left, right, "PSI", None, "not compared", f"fewer than {_ENOUGH_FRAMES} frames")
    bins = min(BINS, max(2, min(len(a), len(b)) // 5))  # five frames a bin, or chance alone reaches 0.25
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, bins + 1)[1:-1]))
    counts = (np.bincount(np.searchsorted(edges, v), minlength=len(edges) + 1) for v in (a, b))
    score = psi(*counts)
    # Two samples of one population have a PSI of (1/n + 1/m) times a chi-square of bins - 1, which stays
    # below this in 99 of 100 cases; only what is above it is drift.
    freedom = len(edges)
    chance = (freedom + 3 * (2 * freedom) ** 0.5) * (1 / len(a) + 1 / len(b))
    return Row(name, left, right, "PSI", score, _judge(score - chance, SHIFTED, DIFFERENT), QUANTITIES[name])


def _embedding(a: Profile, b: Profile) -> Row:
    if not a.embedded_by or a.embedded_by != b.embedded_by:
        missing = (
            "no network to see them with" if not (a.embedded_by or b.embedded_by) else "seen by different networks"
        )
        return Row("backbone's view", "", "", "separability", None, "not compared", missing)
    if min(len(a.embeddings), len(b.embeddings)) < _ENOUGH_FRAMES:
        note = f"fewer than {_ENOUGH_FRAMES} frames"
        return Row("backbone's view", "", "", "separability", None, "not compared", note)
    score = separability(a.embeddings, b.embeddings)
    left, right = (f"{len(x.embeddings)} frames" for x in (a, b))
    result = _judge(score, SEPARABLE_SHIFTED, SEPARABLE_DIFFERENT)
    return Row("backbone's view", left, right, "separability", score, result, "0.5: can't be told apart; 1: always")


def separability(a: np.ndarray, b: np.ndarray) -> float:
    """Area under the ROC of "which set": a frame's score is the share of b among its nearest neighbours.

    a float [N, D], b float [M, D]. Neighbours are weighed by the sets' sizes; a frame is not its own.
    """
    x = np.concatenate([a, b]).astype(np.float64)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9)
    of_b = np.arange(len(x)) >= len(a)
    squares = (x**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS]
    # A frame's own set has one frame less to offer: without this, equal sets would look told apart wrongly.
    weights = np.where(of_b, 1 / len(b), 1 / len(a))
    votes = (weights * of_b)[nearest].sum(axis=1) / weights[nearest].sum(axis=1)
    return _auc(votes[~of_b], votes[of_b])


def _auc(low: np.ndarray, high: np.ndarray) -> float:
    above = (high[:, None] > low).mean()
    ties = (high[:, None] == low).mean()
    return float(above + 0.5 * ties)


def table(rows: Sequence[Row], a: str, b: str) -> str:
    """Lines for a terminal, with the verdict last."""
    head = ("", "A", "B", "drift", "", "")
    cells = [head] + [
        (r.quantity, r.a, r.b, f"{r.measure} {r.score:.2f}" if r.score is not None else "", r.verdict, r.note)
        for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    meaning = {
        "same": "B looks like A",
        "shifted": "B has moved away from A: evaluate on it before trusting a score from A",
        "different": "B is another population than A: label some of it and train on it",
        "not compared": "nothing could be compared",
    }
    worst = verdict(rows)
    return "\n".join([f"A  {a}", f"B  {b}", "", *lines, "", f"verdict  {worst}: {meaning[worst]}"])
