"""Compare two data profiles: one row per quantity, and one verdict.

PSI, the population stability index, sums (b - a) ln(b / a) over shares of bins. Below 0.1 counts as the same
population, above 0.25 as a different one (Siddiqi, "Credit Risk Scorecards", 2006). Separability is how well the
nearest neighbors of a frame's embedding predict its data set: 0.5 is chance, 1 always.
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
NEIGHBORS = 5
_ENOUGH_FRAMES = 20  # with fewer, ten bins show mostly chance
_ORDER: tuple[Verdict, ...] = ("not compared", "same", "shifted", "different")


@dataclass(frozen=True)
class Row:
    """One compared quantity. a, b: summary of each side. score: PSI or separability, None if not compared."""

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
    """The worst verdict of the rows."""
    return max((r.verdict for r in rows), key=_ORDER.index)


def psi(a: np.ndarray, b: np.ndarray) -> float:
    """PSI of two histograms with the same bins. Half a count is added to every bin, so that the PSI is finite."""
    p, q = ((h + 0.5) / (h.sum() + 0.5 * len(h)) for h in (np.asarray(a, float), np.asarray(b, float)))
    return float(((q - p) * np.log(q / p)).sum())


def _judge(score: float, shifted: float, different: float) -> Verdict:
    return "different" if score > different else "shifted" if score > shifted else "same"


def _classes(a: Profile, b: Profile) -> Row:
    names = [n for n in a.class_pixels if n in b.class_pixels]
    odd = sorted(set(a.class_pixels) ^ set(b.class_pixels))
    if not names:
        return Row("classes", "", "", "PSI", None, "not compared", "no class in common")
    # Pixels of a frame are not independent. Scale to the number of frames, so that the half counts matter.
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
    bins = min(BINS, max(2, min(len(a), len(b)) // 5))  # at least five frames per bin, or chance alone reaches 0.25
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, bins + 1)[1:-1]))
    counts = (np.bincount(np.searchsorted(edges, v), minlength=len(edges) + 1) for v in (a, b))
    score = psi(*counts)
    # Two samples of one population have a PSI of (1/n + 1/m) times a chi-square with bins - 1 degrees of freedom.
    # In 99 of 100 cases it is below `chance`; only the excess counts as drift.
    freedom = len(edges)
    chance = (freedom + 3 * (2 * freedom) ** 0.5) * (1 / len(a) + 1 / len(b))
    return Row(name, left, right, "PSI", score, _judge(score - chance, SHIFTED, DIFFERENT), QUANTITIES[name])


def _embedding(a: Profile, b: Profile) -> Row:
    if not a.embedded_by or a.embedded_by != b.embedded_by:
        missing = (
            "no network for embeddings" if not (a.embedded_by or b.embedded_by) else "embedded by different networks"
        )
        return Row("backbone's view", "", "", "separability", None, "not compared", missing)
    if min(len(a.embeddings), len(b.embeddings)) < _ENOUGH_FRAMES:
        note = f"fewer than {_ENOUGH_FRAMES} frames"
        return Row("backbone's view", "", "", "separability", None, "not compared", note)
    score = separability(a.embeddings, b.embeddings)
    left, right = (f"{len(x.embeddings)} frames" for x in (a, b))
    result = _judge(score, SEPARABLE_SHIFTED, SEPARABLE_DIFFERENT)
    return Row(
        "backbone's view",
        left,
        right,
        "separability",
        score,
        result,
        "0.5: indistinguishable; 1: always distinguishable",
    )


def separability(a: np.ndarray, b: np.ndarray) -> float:
    """ROC AUC of predicting a frame's set by the share of b among its nearest neighbors.

    a: float [N, D]. b: float [M, D]. Neighbors are weighted by set size; a frame is not its own neighbor.
    """
    x = np.concatenate([a, b]).astype(np.float64)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9)
    of_b = np.arange(len(x)) >= len(a)
    squares = (x**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBORS]
    # A frame's own set offers one neighbor less. Without weights, equal sets would score below 0.5.
    weights = np.where(of_b, 1 / len(b), 1 / len(a))
    votes = (weights * of_b)[nearest].sum(axis=1) / weights[nearest].sum(axis=1)
    return _auc(votes[~of_b], votes[of_b])


def _auc(low: np.ndarray, high: np.ndarray) -> float:
    above = (high[:, None] > low).mean()
    ties = (high[:, None] == low).mean()
    return float(above + 0.5 * ties)


def table(rows: Sequence[Row], a: str, b: str) -> str:
    """Format the rows for a terminal, with the verdict last."""
    head = ("", "A", "B", "drift", "", "")
    cells = [head] + [
        (r.quantity, r.a, r.b, f"{r.measure} {r.score:.2f}" if r.score is not None else "", r.verdict, r.note)
        for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    meaning = {
        "same": "B matches A",
        "shifted": "B differs somewhat from A: evaluate on B before trusting a score from A",
        "different": "B is a different population: label some of it and train on it",
        "not compared": "nothing could be compared",
    }
    worst = verdict(rows)
    return "\n".join([f"A  {a}", f"B  {b}", "", *lines, "", f"verdict  {worst}: {meaning[worst]}"])
