"""The data report: one offline HTML page with all findings and example images, also for refused data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.data.masks.form import MaskForm
from roadseg.images.decode import Limits
from roadseg.ingest.checks.findings import CODES, Finding, plural
from roadseg.ingest.checks.near_duplicates import NearPair
from roadseg.ingest.measure import GRID_COLUMNS, GRID_ROWS, MeasuredPair
from roadseg.ingest.report.examples import Frame, example_groups, frame_of, index, paths_of
from roadseg.ingest.report.thumbnails import thumbnails
from roadseg.ingest.sources.pairs import split_order
from roadseg.labels import LabelSet
from roadseg.report import charts, distributions
from roadseg.report.page import count, css_color, fill, percent

_LIMITS = Limits()
_SHEET_FRAMES = 12  # frames of a split
_ALL_SHEET_FRAMES = 36  # and of all splits
_PAIRS_ACROSS, _PAIRS_WITHIN = 12, 6  # near-duplicate pairs
_EXTREMES = 4
_FIRST_FILES, _FILES = 3, 200
_LISTED = 4_000  # files of all findings together
_ENTRY_CHARS = 400
_SIZES = 6
_APPEARANCE_CODES = {"too-dark", "too-bright", "blurred", "odd-size", "odd-color", "exif-rotated"}


@dataclass(frozen=True)
class _Quantity:
    """A quantity of an image. extremes: (name, True for the low end, the code of the matching finding or "")."""

    name: str
    unit: str
    of: Callable[[MeasuredPair], float]
    extremes: tuple[tuple[str, bool, str], ...]
    log: bool = False


def _brightness(s: MeasuredPair) -> float:
    assert s.stats is not None
    return s.stats.luma


def _contrast(s: MeasuredPair) -> float:
    assert s.stats is not None
    return sum(s.stats.std_rgb) / 3


def _sharpness(s: MeasuredPair) -> float:
    assert s.stats is not None
    return s.stats.sharpness


_MEASURES = (
    _Quantity(
        "Brightness", "mean luma, 0 black to 255 white", _brightness,
        (("Darkest", True, "too-dark"), ("Brightest", False, "too-bright")),
    ),
    _Quantity("Contrast", "standard deviation of the channels, of 255", _contrast, (("Flattest", True, ""),)),
    _Quantity(
        "Sharpness", "how much of the contrast is fine: 0.06 blurred, 1 noise", _sharpness,
        (("Least sharp", True, "blurred"),), log=True,
    ),
    _Quantity(
        "Size", "megapixels", lambda s: s.width * s.height / 1e6,
        (("Smallest", True, ""), ("Largest", False, "")), log=True,
    ),
)  # fmt: skip


def render(
    title: str,
    root: Path,
    label_set: LabelSet,
    forms: Mapping[str, MaskForm],
    measured: Sequence[MeasuredPair],
    findings: Sequence[Finding],
    near: Sequence[NearPair],
    limits: Limits = _LIMITS,
    pool: Executor | None = None,
) -> str:
    """The report as HTML.

    measured: the pairs of all splits, including broken ones. near: the most similar first. About 100 images are
    decoded from `root` under `limits`, in the pool if one is given; an unreadable one becomes a gray tile with the
    reason. Never raises because of a file's content.
    """
    ordered = sorted(measured, key=lambda s: (s.pair.split, s.pair.name))
    splits = {
        split: [s for s in ordered if s.pair.split == split] for split in split_order(s.pair.split for s in measured)
    }
    ordered_findings = sorted(findings, key=lambda f: (f.severity != "error", f.code, f.split))
    by_path = index(ordered)
    flags = _flags(ordered_findings, by_path)
    wrong = _wrong(ordered_findings, ordered, by_path)
    sheets = [(split, _sheet(of_split, wrong)) for split, of_split in splits.items()]
    sheets = [(split, frames[: max(2, _ALL_SHEET_FRAMES // len(sheets))]) for split, frames in sheets if frames]
    measures = [m for m in (_measure(m, splits, flags) for m in _MEASURES) if m]
    pairs = _pairs(near, by_path)
    behind = example_groups(ordered_findings, by_path, forms)
    frames = [f for _, examples in sheets for f in examples] + [f for _, examples, _ in behind for f in examples]
    frames += [f for m in measures for _, examples in m["extremes"] for f in examples] + [
        f for p in pairs for f in p["two"]
    ]
    return fill(
        Path(__file__).with_name("data_report.html"),
        title=title,
        refused=any(f.severity == "error" for f in ordered_findings),
        verdict=_verdict(ordered_findings),
        tiles=_tiles(ordered_findings, ordered, wrong, label_set),
        findings=_findings(ordered_findings),
        behind=behind,
        splits=[_split(split, of_split, wrong) for split, of_split in splits.items()],
        classes=[{"name": c.name, "color": css_color(c.color)} for c in label_set.trained],
        sheets=sheets,
        frequencies=_frequencies(splits, label_set),
        shifts=[f for f in ordered_findings if f.code == "class-drift"],
        places=_places(ordered, label_set),
        measures=measures,
        pairs=pairs,
        near_count=len(near),
        thumbnails=thumbnails(root, [w for f in frames for w in f.wanted], forms, label_set.palette, limits, pool),
    )


def _verdict(findings: Sequence[Finding]) -> tuple[str, str]:
    errors = sum(f.severity == "error" for f in findings)
    warnings = plural(len(findings) - errors, "warning")
    if errors:
        return "Refused.", f"{plural(errors, 'error')} and {warnings}. Nothing is learned from data with errors."
    if findings:
        return "No errors.", f"{warnings.capitalize()} to read before GPU time is spent."
    return "Fine.", "Every check passed."


def _tiles(
    findings: Sequence[Finding], measured: Sequence[MeasuredPair], wrong: Set[str], label_set: LabelSet
) -> list[tuple[str, str, str]]:
    errors = [f for f in findings if f.severity == "error"]
    warnings = [f for f in findings if f.severity != "error"]
    present = sum(any(column) for column in list(zip(*_histograms(measured), strict=True))[:-1])
    broken = sum(s.pair.image in wrong for s in measured)
    return [
        ("Errors", f"{len(errors):,}", _codes(errors)),
        ("Warnings", f"{len(warnings):,}", _codes(warnings)),
        (
            "Images",
            count(len(measured)),
            f"{broken:,} with errors" if broken else "all sound" if measured else "none paired",
        ),
        ("Classes", f"{present} of {label_set.num_classes}", "occur in the labels"),
        ("Labelled", percent(_labelled(measured)), "of all pixels; the rest is void"),
    ]


def _histograms(measured: Sequence[MeasuredPair]) -> list[tuple[int, ...]]:
    return [s.histogram for s in measured if s.histogram]


def _labelled(measured: Sequence[MeasuredPair]) -> float | None:
    """Share of pixels that are not void; None if no label could be read."""
    total = sum(map(sum, _histograms(measured)))
    return 1 - sum(h[-1] for h in _histograms(measured)) / total if total else None


def _codes(findings: Sequence[Finding]) -> str:
    return f"of {plural(len({f.code for f in findings}), 'kind')}" if findings else "none"


def _findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    format_files = min(_FILES, max(_FIRST_FILES + 10, _LISTED // max(1, len(findings))))
    return [
        {
            "finding": f,
            "means": CODES[f.code].means if f.code in CODES else "",
            "first": [_cut(e) for e in f.files[:_FIRST_FILES]],
            "more": [_cut(e) for e in f.files[_FIRST_FILES:format_files]],
            "rest": max(0, len(f.files) - format_files),
        }
        for f in findings
    ]


def _cut(entry: str) -> str:
    return entry if len(entry) <= _ENTRY_CHARS else entry[: _ENTRY_CHARS - 1] + "…"


def _flags(findings: Sequence[Finding], by_path: Mapping[str, MeasuredPair]) -> dict[str, list[str]]:
    """Codes of the findings about an image's appearance, by the image's path."""
    flags: dict[str, list[str]] = {}
    for f in findings:
        if f.code in _APPEARANCE_CODES:
            for entry in f.files:
                for path in paths_of(entry, by_path)[:1]:
                    if path in by_path:
                        flags.setdefault(by_path[path].pair.image, []).append(f.code)
    return flags


def _wrong(
    findings: Sequence[Finding], measured: Sequence[MeasuredPair], by_path: Mapping[str, MeasuredPair]
) -> set[str]:
    """Images that have a problem, or that are named by an error themselves or through their label."""
    named = {p for f in findings if f.severity == "error" for entry in f.files for p in paths_of(entry, by_path)}
    return {s.pair.image for s in measured if s.problems} | {by_path[p].pair.image for p in named if p in by_path}


def _split(split: str, measured: Sequence[MeasuredPair], wrong: Set[str]) -> dict[str, Any]:
    sizes = Counter(f"{s.width} × {s.height}" if s.width else "unreadable" for s in measured).most_common()
    return {
        "name": split,
        "images": f"{len(measured):,}",
        "problems": sum(s.pair.image in wrong for s in measured),
        "sequences": count(len({s.pair.sequence for s in measured} - {""})),
        "sizes": [(size, f"{n:,}") for size, n in sizes[:_SIZES]],
        "other_sizes": len(sizes[_SIZES:]),
        "formats": ", ".join(sorted({s.image_format for s in measured} - {""})),
        "masks": ", ".join(sorted({s.mask_mode for s in measured} - {""})),
        "image_bytes": _bytes(sum(s.image_bytes for s in measured)),
        "label_bytes": _bytes(sum(s.label_bytes for s in measured)),
        "labelled": percent(_labelled(measured)),
    }


def _bytes(n: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n} B"


def _sheet(measured: Sequence[MeasuredPair], wrong: Set[str]) -> list[Frame]:
    """Evenly spaced frames of the split; broken ones only if there are no others."""
    choice = [s for s in measured if s.pair.image not in wrong] or list(measured)
    at = sorted({round(i * (len(choice) - 1) / (_SHEET_FRAMES - 1)) for i in range(_SHEET_FRAMES)}) if choice else []
    return [frame_of(choice[i]) for i in at]


def _frequencies(splits: Mapping[str, Sequence[MeasuredPair]], label_set: LabelSet) -> dict[str, Any]:
    """One row per class with its share of labeled pixels and its number of images by split; void last."""
    tables = {}
    for split, measured in splits.items():
        if histograms := _histograms(measured):
            table = np.array(histograms, np.int64)
            tables[split] = (table.sum(axis=0), (table > 0).sum(axis=0), len(table))
    rows = []
    for k, c in enumerate([*label_set.trained, None]):
        cells: list[dict[str, Any]] = []
        for pixels, holding, images in tables.values():
            whole = int(pixels[:-1].sum() if c else pixels.sum())
            share = int(pixels[k]) / whole if whole else 0.0
            cells.append({"share": share, "text": _share(share), "images": int(holding[k]), "of": images})
        rows.append(
            {
                "name": c.name if c else "void",
                "color": css_color(c.color) if c else None,
                "cells": cells,
                "bars": charts.bars([cell["share"] ** 0.5 for cell in cells]),
            }
        )
    return {"splits": list(tables), "rows": rows}


def _share(share: float) -> str:
    return "0" if not share else percent(share, 1 if share >= 0.0995 else 2 if share >= 0.00995 else 3)


def _places(measured: Sequence[MeasuredPair], label_set: LabelSet) -> list[dict[str, Any]]:
    grids = [np.frombuffer(s.places, np.uint8) for s in measured if len(s.places) == GRID_ROWS * GRID_COLUMNS]
    if not grids:
        return []
    stack = np.stack(grids)
    sizes = Counter((s.width, s.height) for s in measured if s.width).most_common(1)
    width, height = sizes[0][0] if sizes else (2, 1)  # if no image is readable, the labels may still be
    aspect = min(4.0, max(0.5, width / height))
    maps = []
    for k, c in enumerate(label_set.trained):
        shares = (stack == k).mean(axis=0).reshape(GRID_ROWS, GRID_COLUMNS)
        peak = percent(float(shares.max()), 0 if shares.max() >= 0.1 else 1) if shares.any() else ""
        chart = distributions.location_map(shares, f"Where {c.name} lies in the frame", aspect)
        maps.append({"name": c.name, "color": css_color(c.color), "chart": chart, "peak": peak})
    return maps


def _measure(
    measure: _Quantity, splits: Mapping[str, Sequence[MeasuredPair]], flags: Mapping[str, Sequence[str]]
) -> dict[str, Any] | None:
    """Histograms of a quantity by split and its most extreme frames; None if all values are equal."""
    readable = {split: [s for s in measured if s.stats and s.width] for split, measured in splits.items()}
    everything = sorted((s for measured in readable.values() for s in measured), key=measure.of)
    if not everything or measure.of(everything[0]) == measure.of(everything[-1]):
        return None
    extremes = []
    for name, low, code in measure.extremes:
        ordered = everything if low else everything[::-1]
        found = [s for s in ordered if code in flags.get(s.pair.image, ())]
        chosen = found + [s for s in _varied(ordered) if s not in found]
        extremes.append((name, [_extreme(s, measure, flags) for s in chosen[:_EXTREMES]]))
    rows = [(split, [measure.of(s) for s in measured]) for split, measured in readable.items() if measured]
    middles = "; ".join(f"median of {split} {np.median(values):.3g}" for split, values in rows)
    spoken = f"{measure.name} of the images by split, {measure.unit}: {middles}"
    chart = distributions.histograms(rows, label=spoken, x_label=measure.unit, log=measure.log)
    return {"name": measure.name, "chart": chart, "extremes": extremes}


def _varied(ordered: Sequence[MeasuredPair]) -> list[MeasuredPair]:
    """The first few images, at most two of one known sequence, because neighbors look alike."""
    chosen: list[MeasuredPair] = []
    drives: Counter[tuple[str, str]] = Counter()
    for s in ordered:
        drives[s.pair.part, s.pair.sequence] += 1
        if not s.pair.sequence or drives[s.pair.part, s.pair.sequence] <= 2:
            chosen.append(s)
        if len(chosen) == _EXTREMES:
            break
    return chosen


def _extreme(s: MeasuredPair, measure: _Quantity, flags: Mapping[str, Sequence[str]]) -> Frame:
    size = f"{s.width} × {s.height}" if measure.name == "Size" else f"{measure.name.lower()} {measure.of(s):.3g}"
    return frame_of(s, f"{s.pair.split}, {size}", with_label=False, codes=tuple(flags.get(s.pair.image, ())))


def _pairs(near: Sequence[NearPair], by_path: Mapping[str, MeasuredPair]) -> list[dict[str, Any]]:
    """The most similar pairs, those across splits first."""
    across = [p for p in near if p.split_a != p.split_b][:_PAIRS_ACROSS]
    within = [p for p in near if p.split_a == p.split_b][:_PAIRS_WITHIN]
    examples = []
    for p in across + within:
        two = []
        for path, split, sequence in ((p.image_a, p.split_a, p.sequence_a), (p.image_b, p.split_b, p.sequence_b)):
            name = by_path[path].pair.name if path in by_path else path
            two.append(Frame(name, path, "", "", f"{split}, sequence {sequence}" if sequence else split))
        text = "the same, pixel for pixel" if p.exact else f"{percent(p.similarity)} alike"
        across_text = f"{p.split_a} and {p.split_b}" if p.split_a != p.split_b else f"both in {p.split_a}"
        examples.append({"two": two, "text": text, "where": across_text, "across": p.split_a != p.split_b})
    return examples
