"""The table of a sweep: mean and spread over seeds, paired differences and verdicts, as text, HTML and JSON.

Scores are in 0..1, differences too; texts give percent and points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from roadseg.report import charts
from roadseg.report.page import fill, percent, points

CONFIDENCE = 0.95
BETTER, WORSE, UNCLEAR = "better", "worse", "too small to tell"
BASE, SAME, ONE_SEED, OTHER_DATA, FAILED = "base", "the same training", "one seed: no interval", "other data", "failed"
MOVED, MOVED_MOST = 3, "moved most"  # classes named a row, and the column of them
_TEMPLATE = Path(__file__).parents[1] / "report" / "sweep.html"


@dataclass(frozen=True)
class Result:
    """Result of one run of a setting with a seed, or `error`, why it failed.

    train_key: names the training. miou: by split. class_iou: by split and class, None for an absent class; {} when
    nothing was evaluated. fingerprints: of the scored data, by split. train_seconds: making train's output, export
    included, over all starts. images_per_s: of the training steps. parameters:
    of the network that ships.
    """

    name: str
    setting: str
    seed: int
    error: str = ""
    train_key: str = ""
    miou: Mapping[str, float | None] = field(default_factory=dict)
    class_iou: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    train_seconds: float | None = None
    images_per_s: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Spread:
    """Over seeds. deviation: the sample standard deviation (n - 1), None for a single value."""

    mean: float
    deviation: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean difference over the seeds that both have, with its interval; one pair has no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """A setting. difference, by split: to the base row's same seeds. moved: (class, difference of means), by `by`."""

    setting: str
    verdict: str
    miou: Mapping[str, Spread]
    difference: Mapping[str, Difference]
    class_iou: Mapping[str, Mapping[str, Spread]]
    moved: Sequence[tuple[str, float]]
    train_seconds: Spread | None
    images_per_s: Spread | None
    parameters: int | None
    runs: Sequence[Result]


# ---- statistics -----------------------------------------------------------------------------


def spread(values: Iterable[float | None]) -> Spread | None:
    """None without values."""
    given = [v for v in values if v is not None]
    if not given:
        return None
    deviation = statistics.stdev(given) if len(given) > 1 else None
    return Spread(statistics.fmean(given), deviation, min(given), max(given), len(given))


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """ours - base over the seeds of both, with Student's t interval of the mean at CONFIDENCE; None without a pair."""
    gains = [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]
    if not gains:
        return None
    mean, n = statistics.fmean(gains), len(gains)
    if n == 1:
        return Difference(mean, None, None, 1)
    half = student_t(n - 1) * statistics.stdev(gains) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's distribution for `confidence`."""
    low, high = 0.0, 1.0
    while _mass_within(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass_within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _mass_within(t: float, degrees: int) -> float:
    """P(|T| <= t) for whole degrees of freedom: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def verdict(difference: Difference) -> str:
    """One word for whether the whole interval is on one side of zero."""
    if difference.low is None or difference.high is None:
        return ONE_SEED
    return BETTER if difference.low > 0 else WORSE if difference.high < 0 else UNCLEAR


# ---- rows -----------------------------------------------------------------------------------


def rows(results: Sequence[Result], base: str, by: str) -> list[Row]:
    """A row a setting, the best mean mIoU of the split `by` first, settings without any last."""
    by_setting: dict[str, list[Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
    base_runs = _done(by_setting.get(base, []))
    made = [_row(setting, runs, base_runs, setting == base, by) for setting, runs in by_setting.items()]
    return sorted(made, key=lambda row: -row.miou[by].mean if by in row.miou else math.inf)


def _done(runs: Sequence[Result]) -> list[Result]:
    return [run for run in runs if not run.error]


def _row(setting: str, runs: Sequence[Result], base_runs: Sequence[Result], is_base: bool, by: str) -> Row:
    done = _done(runs)
    splits = list(dict.fromkeys(split for run in done for split in run.miou))
    same_data = [s for s in splits if _fingerprints(done, s) == _fingerprints(base_runs, s)]
    differences = {} if is_base else {s: paired(_by_seed(done, s), _by_seed(base_runs, s)) for s in same_data}
    classes = _class_spreads(done)
    return Row(
        setting,
        _verdict(done, base_runs, is_base, differences, by),
        {s: found for s in splits if (found := spread(run.miou.get(s) for run in done))},
        {s: d for s, d in differences.items() if d},
        classes,
        [] if is_base or by not in same_data else _moved(classes.get(by, {}), _class_spreads(base_runs).get(by, {})),
        spread(run.train_seconds for run in done),
        spread(run.images_per_s for run in done),
        next((run.parameters for run in done if run.parameters is not None), None),
        list(runs),
    )


def _verdict(
    done: Sequence[Result],
    base_runs: Sequence[Result],
    is_base: bool,
    differences: Mapping[str, Difference | None],
    by: str,
) -> str:
    if not done:
        return FAILED
    if is_base:
        return BASE
    base_keys = {run.seed: run.train_key for run in base_runs if run.train_key}
    if all(base_keys.get(run.seed) == run.train_key for run in done):
        return SAME
    if base_runs and by not in differences and _fingerprints(done, by) != _fingerprints(base_runs, by):
        return OTHER_DATA
    return verdict(found) if (found := differences.get(by)) else "no base to compare with"


def _fingerprints(runs: Sequence[Result], split: str) -> set[str]:
    return {run.fingerprints.get(split, "") for run in runs}


def _by_seed(runs: Sequence[Result], split: str) -> dict[int, float]:
    return {run.seed: miou for run in runs if (miou := run.miou.get(split)) is not None}


def _class_spreads(runs: Sequence[Result]) -> dict[str, dict[str, Spread]]:
    out: dict[str, dict[str, Spread]] = {}
    for split in dict.fromkeys(s for run in runs for s in run.class_iou):
        names = dict.fromkeys(name for run in runs for name in run.class_iou.get(split, {}))
        found = {name: spread(run.class_iou.get(split, {}).get(name) for run in runs) for name in names}
        out[split] = {name: value for name, value in found.items() if value}
    return out


def _moved(ours: Mapping[str, Spread], base: Mapping[str, Spread]) -> list[tuple[str, float]]:
    gains = [(name, ours[name].mean - base[name].mean) for name in ours if name in base]
    return sorted(gains, key=lambda gain: -abs(gain[1]))[:MOVED]


# ---- texts ----------------------------------------------------------------------------------


def spread_text(value: Spread | None) -> str:
    """`44.52 ± 0.61 (43.9 to 45.1, n 3)` in percent; a single value alone."""
    if value is None:
        return "–"
    if value.deviation is None:
        return f"{100 * value.mean:.2f}"
    return (
        f"{100 * value.mean:.2f} ± {100 * value.deviation:.2f} "
        f"({100 * value.low:.1f} to {100 * value.high:.1f}, n {value.n})"
    )


def difference_text(value: Difference | None) -> str:
    """`+0.80 (−0.40 to +2.00)`, in points."""
    if value is None:
        return ""
    between = "" if value.low is None else f" ({points(value.low)} to {points(value.high)})"
    return points(value.mean) + between


def splits_of(table: Sequence[Row], by: str) -> list[str]:
    """Every split that was scored, `by` first."""
    return sorted(dict.fromkeys(s for row in table for s in row.miou), key=lambda s: (s != by, s))


def _cells(row: Row, splits: Sequence[str], by: str, moved: bool) -> list[str]:
    seconds, rate = row.train_seconds, row.images_per_s
    return [
        *(spread_text(row.miou.get(split)) for split in splits),
        difference_text(row.difference.get(by)),
        row.verdict,
        *([", ".join(f"{name} {points(gain)}" for name, gain in row.moved)] if moved else ()),
        f"{seconds.mean:,.0f}" if seconds else "–",
        f"{rate.mean:,.0f}" if rate else "–",
        f"{row.parameters:,}" if row.parameters is not None else "–",
    ]


def _heads(splits: Sequence[str], by: str, moved: bool) -> list[str]:
    mious = [f"mIoU of {split} (%)" for split in splits]
    columns = [f"to the base on {by} (points)", "verdict", *([MOVED_MOST] if moved else ())]
    return [*mious, *columns, "train s", "images/s", "parameters"]


def _any_moved(table: Sequence[Row]) -> bool:
    """Whether any row has class differences; scores of training alone have none."""
    return any(row.moved for row in table)


METHOD = (
    "After ±: standard deviation over seeds, then the least and the largest. A difference is the mean over the seeds "
    "that a setting and the base both have; its interval is Student's at 95 %, so of twenty settings that change "
    "nothing one will look better or worse by chance."
)


def markdown(title: str, table: Sequence[Row], by: str, scored: str, note: str = "") -> str:
    """A Markdown table of the rows, with failed runs below it. scored: which scores they are; note: what is missing."""
    splits, moved = splits_of(table, by), _any_moved(table)
    heads = ["setting", *_heads(splits, by, moved)]
    lines = [f"# {title}", "", *([note, ""] if note else []), scored + " " + METHOD, ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [
        "| " + " | ".join(_plain(c) for c in [row.setting, *_cells(row, splits, by, moved)]) + " |" for row in table
    ]
    failed = [run for row in table for run in row.runs if run.error]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {run.name} ({_plain(run.setting)}, seed {run.seed}): {_plain(run.error)}" for run in failed]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def page(title: str, table: Sequence[Row], by: str, scored: str, note: str = "", *, reports: bool = True) -> str:
    """The same as one offline HTML page, with every run and its scores. reports: whether each run has its own."""
    splits, moved = splits_of(table, by), _any_moved(table)
    gains = [abs(d.mean) for row in table if (d := row.difference.get(by))]
    limit = max(gains, default=0.0) or 1.0
    shown = [
        {
            "setting": row.setting,
            "kind": {BETTER: "up", WORSE: "down"}.get(row.verdict, ""),
            "cells": _cells(row, splits, by, moved),
            "bar": charts.difference_bar(d.mean, limit) if (d := row.difference.get(by)) else Markup(""),
        }
        for row in table
    ]
    runs = sorted((run for row in table for run in row.runs), key=lambda run: run.name)
    return fill(
        _TEMPLATE,
        title=title,
        runs_caption="mIoU of every run" + "; its report is in WORKSPACE/runs/NAME" * reports,
        note=note,
        scored=scored,
        method=METHOD,
        heads=_heads(splits, by, moved),
        verdict_at=len(splits) + 1,
        texts=["Setting", "verdict", MOVED_MOST],
        rows=shown,
        splits=splits,
        runs=[(run, [percent(run.miou.get(split), 2) for split in splits]) for run in runs],
        tiles=_tiles(table, by),
    )


def _tiles(table: Sequence[Row], by: str) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the best row, the base, and the differences found."""
    scored = [row for row in table if by in row.miou]
    tiles = [("Best", percent(scored[0].miou[by].mean, 2), scored[0].setting)] if scored else []
    tiles += [("Base", percent(row.miou[by].mean, 2), row.setting) for row in scored if row.verdict == BASE]
    for word in (BETTER, WORSE, UNCLEAR):
        tiles.append((word.capitalize(), str(sum(row.verdict == word for row in table)), "settings"))
    return tiles
