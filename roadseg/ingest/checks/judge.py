"""Run all checks of the data and collect their findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from roadseg.data.manifest import Sample
from roadseg.data.masks.form import MaskForm
from roadseg.errors import DataError
from roadseg.images.decode import Limits
from roadseg.ingest.checks.exact_copies import with_pixel_digests
from roadseg.ingest.checks.findings import CODES, Finding, plural, require_codes, with_severity
from roadseg.ingest.checks.label_values import value_findings
from roadseg.ingest.checks.near_duplicates import NearPair, duplicates, near_pairs
from roadseg.ingest.checks.outliers import histogram_drift, outliers
from roadseg.ingest.checks.void_as_class import void_as_class
from roadseg.ingest.measure import MeasuredPair, Task, measure_all, worker_pool
from roadseg.ingest.sources.pairs import Pair, split_order
from roadseg.labels import LabelSet

_MAX_LISTED_FILES = 3
_CITY = re.compile(r"(.*[^\W\d_])_\d{6}")  # of a sequence named as Cityscapes names them, aachen_000000

# code of a problem with one file: what is counted, what to do
_FILE_PROBLEMS = {
    "unreadable-image": ("image", "that can't be read", "fetch it again, or take it out with its label"),
    "unreadable-label": ("label", "that can't be read", "export it again as a PNG of ids, or take the pair out"),
    "unreadable-instances": ("instance map", "that can't be read", "fetch it again, or remove it"),
    "swapped": ("pair", "with image and label swapped", "exchange the two files"),
    "size-differs": ("file", "of another size than the label", "export image and label at one size, upright"),
}
_NO_PAIR = frozenset(code for code, c in CODES.items() if c.leaves_out == "pair")


@dataclass(frozen=True)
class Checked:
    """Result of `check`.

    samples: pairs without errors, sorted by split and name. findings: about the files' content. measured: all
    pairs. near: equal or nearly equal images, the most similar first.
    """

    samples: tuple[Sample, ...]
    findings: list[Finding]
    measured: list[MeasuredPair]
    near: list[NearPair]


def check(
    root: Path,
    pairs: Sequence[Pair],
    label_set: LabelSet,
    forms: Mapping[str, MaskForm],
    limits: Limits,
    workers: int = 0,
    unlabelled: Collection[tuple[str, str]] = (),
    allow: Collection[str] = frozenset(),
    forbid: Collection[str] = frozenset(),
    pool: ProcessPoolExecutor | None = None,
) -> Checked:
    """Decode every file of `pairs`, check the contents, and leave out what is wrong.

    workers: 0 for one per core; ignored if a pool is given, which `worker_pool` must have made for this task.
    unlabelled: (split, part) whose labels may be entirely void, because the public ones are placeholders.
    allow, forbid: codes, see `with_severity`; raises ConfigError for unknown ones. What an allowed error affects is
    left out of the samples as CODES defines.
    """
    require_codes(allow, forbid)
    task = Task(root, forms, limits, label_set.num_classes)
    with nullcontext(pool) if pool else worker_pool(task, len(pairs), workers) as processes:
        measured = with_pixel_digests(root, limits, measure_all(task, pairs, processes), processes)
    splits = split_order(s.pair.split for s in measured)
    findings: list[Finding] = []
    causes: dict[str, str] = {}
    for split in splits:
        of_split = [s for s in measured if s.pair.split == split]
        for part in sorted({s.pair.part for s in of_split}):
            of_part = [s for s in of_split if s.pair.part == part]
            values, causes_here = _value_findings(split, part, of_part, forms[part])
            findings += values
            causes |= causes_here
            findings += _void(split, part, _labelled(of_part, causes), placeholder=(split, part) in unlabelled)
        findings += _file_problems(split, of_split, causes)
        findings += _same_files(split, of_split)
        findings += _missing_classes(split, _labelled(of_split, causes), label_set)
    findings += _shared_sequences(pairs, splits)
    near = near_pairs(measured)
    findings += duplicates(measured, near) + outliers(measured) + histogram_drift(measured, label_set)
    sound = [sample for s in measured if (sample := _sample(s, causes.get(s.pair.label, ""))) is not None]
    samples = tuple(sorted(sound, key=lambda s: (s.split, s.name)))
    return Checked(samples, with_severity(findings, allow, forbid), measured, near)


def _value_findings(
    split: str, part: str, measured: Sequence[MeasuredPair], form: MaskForm
) -> tuple[list[Finding], dict[str, str]]:
    where = f"{split} of {part}" if part else split
    findings, causes = value_findings(where, split, measured, form)
    rest = [s for s in measured if s.pair.label not in causes and not _problem_paths(s, "swapped")]
    return findings + void_as_class(where, split, rest, form), causes


def _labelled(measured: Sequence[MeasuredPair], causes: Mapping[str, str]) -> list[MeasuredPair]:
    """Pairs whose label is readable and has no value problem."""
    return [s for s in measured if s.histogram and s.pair.label not in causes and not _problem_paths(s, "swapped")]


def _problem_paths(s: MeasuredPair, code: str) -> tuple[str, ...]:
    """The paths of the pair's files that have a problem of this code."""
    return tuple(path for c, path, _ in s.problems if c == code)


def _sample(s: MeasuredPair, cause: str) -> Sample | None:
    """None for a pair that CODES leaves out. cause: the code of the label's value problem, "" if none."""
    p = s.pair
    wrong = {path for code, path, _ in s.problems if CODES[code].leaves_out in ("pair", "instances")}
    if wrong & {p.image, p.label} or cause in _NO_PAIR or not s.histogram or _is_one_file(s):
        return None
    if p.split == "train" and not any(s.histogram[:-1]):
        return None
    instances = "" if p.instances in wrong else p.instances
    return Sample(
        split=p.split,
        name=p.name,
        sequence=p.sequence,
        image=p.image,
        label=p.label,
        instances=instances,
        width=s.width,
        height=s.height,
        image_sha256=s.image_sha256,
        label_sha256=s.label_sha256,
        image_bytes=s.image_bytes,
        label_bytes=s.label_bytes,
        histogram=s.histogram,
        part=p.part,
    )


def _file_problems(split: str, measured: Sequence[MeasuredPair], causes: Mapping[str, str]) -> list[Finding]:
    """causes: labels with a value problem, whose reading problems are not reported again."""
    findings = []
    for code, (noun, what, fix) in _FILE_PROBLEMS.items():
        problems = [(s, path, text) for s in measured for c, path, text in s.problems if c == code]
        if code != "swapped":  # swapped files explain all other problems of the pair
            problems = [t for t in problems if not _problem_paths(t[0], "swapped")]
        if code == "unreadable-label":
            problems = [t for t in problems if t[1] not in causes]
        if not problems:
            continue
        turned = code == "size-differs" and [
            s for s, path, _ in problems if path == s.pair.image and _is_quarter_turn(s)
        ]
        if turned:
            fix += "; a label that was drawn on the picture as stored has to be turned as its EXIF data says"
        entries = tuple(
            f"{path}: {text}{_turn_text(s) if turned and s in turned else ''}" for s, path, text in problems
        )
        message = f"{plural(len(entries), noun)} of {split} {what}"
        if code == "swapped" and len(entries) == len(measured) > 1:
            message = f"all {plural(len(entries), 'pair')} of {split} with image and label swapped: the folders are"
            fix = "exchange the two folders"
        findings.append(Finding(code, CODES[code].severity, split, entries, len(entries), message, fix))
    return findings


def _same_files(split: str, measured: Sequence[MeasuredPair]) -> list[Finding]:
    """Findings of masks copied into the image folder, or of images and labels read from one folder."""
    entries = tuple(f"{s.pair.image} = {s.pair.label}" for s in measured if _is_one_file(s))
    if not entries:
        return []
    message = (
        f"{plural(len(entries), 'image')} of {split} that {'is its' if len(entries) == 1 else 'are their'} own label"
    )
    fix = "put the photographs in their place; see that images and labels are not read from one folder"
    return [Finding("same-file", "error", split, entries, len(entries), message, fix)]


def _is_one_file(s: MeasuredPair) -> bool:
    return bool(s.image_sha256) and s.image_sha256 == s.label_sha256


def _is_quarter_turn(s: MeasuredPair) -> bool:
    """True if a label of another shape has equally many pixels, which nearly always is a quarter turn."""
    return sum(s.histogram) == s.width * s.height


def _turn_text(s: MeasuredPair) -> str:
    if s.orientation >= 5:
        return f"; the photograph is stored on its side, and upright by its EXIF orientation {s.orientation}"
    return "; a quarter turn apart"


def _void(split: str, part: str, measured: Sequence[MeasuredPair], *, placeholder: bool) -> list[Finding]:
    where = f"{split} of {part}" if part else split
    labelled = [s for s in measured if not _problem_paths(s, "unknown-id") and not _problem_paths(s, "unknown-color")]
    void = tuple(s.pair.label for s in labelled if not any(s.histogram[:-1]))
    single = tuple(s.pair.label for s in labelled if sum(n > 0 for n in s.histogram[:-1]) == 1)
    findings = []
    if void and placeholder and len(void) == len(labelled):
        message = f"all labels of {where} are void: placeholders, as the public ones are"
        fix = f"nothing; {split} can be predicted, not scored"
        findings.append(Finding("no-labels", "warning", split, void, len(void), message, fix))
    elif void:
        message = f"{plural(len(void), 'label')} of {where} with nothing but void"
        fix = "label them, or take the pairs out: nothing can be learned or scored there"
        findings.append(Finding("all-void", "error", split, void, len(void), message, fix))
    if single:
        message = f"{plural(len(single), 'label')} of {where} with a single class"
        findings.append(Finding("one-class", "warning", split, single, len(single), message, "look whether it is true"))
    return findings


def _missing_classes(split: str, measured: Sequence[MeasuredPair], label_set: LabelSet) -> list[Finding]:
    totals = [sum(column) for column in zip(*(s.histogram[:-1] for s in measured), strict=True)]
    missing = [name for name, total in zip(label_set.names, totals, strict=False) if not total]
    if not missing or not any(totals):
        return []
    message = f"{split} has no pixel of {len(missing)} of {plural(len(totals), 'class', 'classes')}: "
    fix = "they can't be learned from it" if split == "train" else f"scores on {split} leave them out"
    return [Finding("class-missing", "warning", split, (), len(missing), message + ", ".join(missing), fix)]


def _shared_sequences(pairs: Sequence[Pair], splits: Sequence[str]) -> list[Finding]:
    findings = []
    for a, b in combinations(splits, 2):
        of_a = {p.sequence for p in pairs if p.split == a and p.sequence}
        of_b = Counter(p.sequence for p in pairs if p.split == b and p.sequence)
        shared = of_a & of_b.keys()
        fix = f"a score on {b} flatters; data.holdout_sequences makes an honest split out of train"
        findings += _shared(
            "same-sequence", ("sequence", "sequences"), a, b, Counter({s: of_b[s] for s in shared}), fix
        )
        cities_a = {_city(s) for s in of_a} - {_city(s) for s in shared} - {""}
        cities_b: Counter[str] = Counter()
        for sequence, images in of_b.items():
            cities_b[_city(sequence)] += images
        both = Counter({city: cities_b[city] for city in cities_a & cities_b.keys()})
        fix = f"split by city, as Cityscapes does: a score on {b} says little about towns that were not seen"
        findings += _shared("same-city", ("city", "cities"), a, b, both, fix)
    return findings


def _city(sequence: str) -> str:
    """aachen for aachen_000000, "" for other names. The prefix of a mix's part is kept."""
    named = _CITY.fullmatch(sequence)
    return named.group(1) if named else ""


def _shared(code: str, nouns: tuple[str, str], a: str, b: str, images: Counter[str], fix: str) -> list[Finding]:
    """images: number of images of split b, by the shared sequence or city."""
    if not images:
        return []
    entries = tuple(sorted(images))
    message = f"{plural(len(entries), *nouns)} in both {a} and {b} ({plural(images.total(), 'image')} of {b})"
    return [Finding(code, "warning", f"{a} and {b}", entries, len(entries), message, fix)]


def refusal(root: Path | str, findings: Sequence[Finding], report: Path | None = None) -> DataError:
    """The error that lists all findings with severity error, by code, with the first files of each.

    report: the report with all files, if there is one.
    """
    errors = sorted((f for f in findings if f.severity == "error"), key=lambda f: f.code)
    blocks = [f"  {f.code}: {f.message}\n{format_files(f, '      ')}    to repair: {f.fix}" for f in errors]
    listing = "\n".join(blocks)  # a list ends the sentence, so the next step is part of it instead of `todo`
    return DataError(
        f"{plural(len(errors), 'error')} in the data\n{listing}\nRepair them and run again; training does not start "
        "on data with errors. To leave the affected data out instead, list the codes in data.allow."
        + (f"\nAll files, with images: {report}" if report else ""),
        where=str(root),
    )


def format_files(finding: Finding, indent: str) -> str:
    lines = [f"{indent}{name}\n" for name in finding.files[:_MAX_LISTED_FILES]]
    if len(finding.files) > _MAX_LISTED_FILES:
        lines.append(f"{indent}and {len(finding.files) - _MAX_LISTED_FILES:,} more\n")
    return "".join(lines)
