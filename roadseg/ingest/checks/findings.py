"""What can be wrong with a data set: every code, its severity, and what config makes of it.

`data.allow` demotes errors to warnings, and what they concern is left out; `data.forbid` makes
warnings errors. docs/data-doctor.md tells each code at length, and a test keeps it in step.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from roadseg.errors import ConfigError

Severity = Literal["error", "warning"]
# What an error that is allowed leaves out of the manifest:
#   "pair"    the pair, from any split
#   "train"   the pair, from train only
#   "pixels"  nothing; the pixels count as void
#   "instances"  the instance map; the pair stays
#   "file"    a file that made no pair, so there is nothing more to leave out
#   "nothing"
LeavesOut = Literal["pair", "train", "pixels", "instances", "file", "nothing"]


@dataclass(frozen=True)
class Finding:
    """Something wrong (error: refuses) or doubtful (warning: goes on) in the data.

    split: where, "train and val" if between two, "" if in none. files: one entry each, beginning with a
    path, what was found there after ": ". count: of what `message` counts, mostly len(files).
    """

    code: str
    severity: Severity
    split: str
    files: tuple[str, ...]
    count: int
    message: str
    fix: str


@dataclass(frozen=True)
class Code:
    """severity: unless config says otherwise. leaves_out: once allowed, or as a warning."""

    severity: Severity
    means: str
    leaves_out: LeavesOut = "nothing"


CODES: dict[str, Code] = {
    # files and their names
    "missing-label": Code("error", "an image without a label", "file"),
    "missing-image": Code("error", "a label without an image", "file"),
    "doubled-file": Code("error", "one name given to several files, so that a pair can't be told", "file"),
    "bad-name": Code("error", "a file name with control characters or bytes that are no UTF-8", "file"),
    "empty-split": Code("error", "a split whose folder holds no pictures", "file"),
    "case-clash": Code("warning", "names of one split that differ in upper and lower case only"),
    "no-labels": Code("warning", "a test split without labels, or with placeholders"),
    "source-note": Code("warning", "what a source takes or leaves out by itself"),
    "missing-instances": Code("warning", "labels without an instance map where others have one"),
    # one pair
    "unreadable-image": Code("error", "an image that is empty, damaged, hostile, or none", "pair"),
    "unreadable-label": Code("error", "a label that is empty, damaged, hostile, or none", "pair"),
    "unreadable-instances": Code("error", "an instance map that can't be read", "instances"),
    "swapped": Code("error", "image and label exchanged", "pair"),
    "same-file": Code("error", "one file given as image and as label", "pair"),
    "size-differs": Code("error", "image, label or instance map of different sizes", "pair"),
    # what the labels' values mean
    "train-ids": Code("error", "train ids where the data set's own ids are expected", "pair"),
    "label-ids": Code("error", "Cityscapes label ids where train ids are expected", "pair"),
    "instance-ids": Code("error", "instance ids (class x 1000 + number) where class ids are expected", "pair"),
    "binary-mask": Code("error", "masks of 0 and 255 where class ids are expected", "pair"),
    "color-mask": Code("error", "masks of RGB colours where class ids are expected", "pair"),
    "id-mask": Code("error", "masks of ids where colours are expected", "pair"),
    "mixed-masks": Code("warning", "a split whose masks are stored in different ways"),
    "interpolated-mask": Code("error", "masks resized with interpolation, smoothed, or saved as JPEG", "pair"),
    "undeclared-void": Code("error", "255 in the labels of a label set that lacks it: mostly void", "pixels"),
    "unknown-id": Code("error", "ids that the label set lacks", "pixels"),
    "unknown-color": Code("error", "colours that the label set lacks", "pixels"),
    "void-as-class": Code("warning", "void or padding that holds the id of a learned class"),
    # what the labels hold
    "all-void": Code("error", "labels with nothing but void", "train"),
    "one-class": Code("warning", "labels with a single class"),
    "class-missing": Code("warning", "a class that a split has no pixel of"),
    "class-drift": Code("warning", "a split whose classes are distributed differently than train's"),
    # the same thing twice
    "duplicate-across-splits": Code("error", "the same pixels in two splits"),
    "duplicate-in-split": Code("warning", "the same pixels twice in a split"),
    "contradicting-labels": Code("error", "the same pixels with different labels"),
    "near-duplicate": Code("warning", "frames of two splits that look almost the same"),
    "near-duplicate-in-split": Code("warning", "frames of a split that look almost the same"),
    "same-sequence": Code("warning", "one sequence in two splits"),
    "same-city": Code("warning", "one city in two splits"),
    # images that stand out
    "exif-rotated": Code("warning", "photographs stored on their side, upright only by their EXIF data"),
    "too-dark": Code("warning", "images far darker than the others"),
    "too-bright": Code("warning", "images far brighter than the others"),
    "blurred": Code("warning", "images far less sharp than the others"),
    "odd-size": Code("warning", "images of another size than nearly all others"),
    "odd-color": Code("warning", "images whose colours are far from the others'"),
}  # fmt: skip


def severity_of(code: str, allow: Collection[str] = (), forbid: Collection[str] = ()) -> Severity:
    """What `code` is under a config. KeyError for a code that there isn't: ours to repair."""
    if code in forbid:
        return "error"
    return "warning" if code in allow else CODES[code].severity


def require_codes(allow: Iterable[str], forbid: Iterable[str]) -> None:
    """Raises ConfigError that lists every code that there isn't or that is both allowed and forbidden."""
    allow, forbid = list(allow), list(forbid)
    wrong = [f"data.allow: {_unknown(c)}" for c in allow if c not in CODES]
    wrong += [f"data.forbid: {_unknown(c)}" for c in forbid if c not in CODES]
    wrong += [f"{c} is both in data.allow and in data.forbid" for c in allow if c in forbid]
    if wrong:
        raise ConfigError("; ".join(wrong), expected="codes of docs/data-doctor.md")


def _unknown(code: str) -> str:
    near = difflib.get_close_matches(code, CODES, n=2)
    return f"there is no code {code!r}" + (f", perhaps you meant {' or '.join(near)}" if near else "")


def with_severity(
    findings: Iterable[Finding], allow: Collection[str] = frozenset(), forbid: Collection[str] = frozenset()
) -> list[Finding]:
    """The findings with the severity that config gives them. Raises as `require_codes` does."""
    require_codes(allow, forbid)
    return [
        replace(f, severity=severity_of(f.code, allow, forbid)) if f.code in allow or f.code in forbid else f
        for f in findings
    ]


def plural(count: int, noun: str, several: str = "") -> str:
    """ "1 class", "2,000 classes". several: the plural where it isn't the noun with an s."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"
