"""All finding codes with their severity, and how the config changes it.

`data.allow` turns errors into warnings and leaves the affected data out; `data.forbid` turns warnings into
errors. docs/data-doctor.md explains every code; a test compares it with this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from roadseg.errors import ConfigError

Severity = Literal["error", "warning"]
# What an allowed error leaves out of the manifest:
#   "pair"    the pair, from any split
#   "train"   the pair, from train only
#   "pixels"  nothing; the pixels count as void
#   "instances"  the instance map; the pair stays
#   "file"    nothing more: the file has no pair anyway
#   "nothing"
LeavesOut = Literal["pair", "train", "pixels", "instances", "file", "nothing"]


@dataclass(frozen=True)
class Finding:
    """A problem in the data. An error stops ingest, a warning does not.

    split: "train and val" if it concerns two, "" if none. files: one entry per file, "path" or "path: details".
    count: the number in `message`, mostly len(files).
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
    """severity: the default. leaves_out: applied once the finding is allowed, or if it is a warning."""

    severity: Severity
    means: str
    leaves_out: LeavesOut = "nothing"


CODES: dict[str, Code] = {
    # files and their names
    "missing-label": Code("error", "an image without a label", "file"),
    "missing-image": Code("error", "a label without an image", "file"),
    "doubled-file": Code("error", "several files with the same name, so that the pair is ambiguous", "file"),
    "bad-name": Code("error", "a file name with control characters or invalid UTF-8", "file"),
    "empty-split": Code("error", "a split whose folder has no images", "file"),
    "case-clash": Code("warning", "file names of one split that differ only in case"),
    "no-labels": Code("warning", "a test split without labels, or with placeholders"),
    "source-note": Code("warning", "a choice that the source made, such as files it left out"),
    "missing-instances": Code("warning", "labels without an instance map while other labels have one"),
    # one pair
    "unreadable-image": Code("error", "an image file that is empty, damaged, too large, or not an image", "pair"),
    "unreadable-label": Code("error", "a label file that is empty, damaged, too large, or not a mask", "pair"),
    "unreadable-instances": Code("error", "an instance map that can't be read", "instances"),
    "swapped": Code("error", "image and label swapped", "pair"),
    "same-file": Code("error", "the same file as image and as label", "pair"),
    "size-differs": Code("error", "image, label or instance map of different sizes", "pair"),
    # what the labels' values mean
    "train-ids": Code("error", "train ids where the data set's own ids are expected", "pair"),
    "label-ids": Code("error", "Cityscapes label ids where train ids are expected", "pair"),
    "instance-ids": Code("error", "instance ids (class x 1000 + number) where class ids are expected", "pair"),
    "binary-mask": Code("error", "masks of 0 and 255 where class ids are expected", "pair"),
    "color-mask": Code("error", "RGB color masks where class ids are expected", "pair"),
    "id-mask": Code("error", "id masks where colors are expected", "pair"),
    "mixed-masks": Code("warning", "palette and gray masks in one split"),
    "interpolated-mask": Code("error", "masks resized with interpolation, smoothed, or saved as JPEG", "pair"),
    "undeclared-void": Code("error", "undeclared 255 in labels, which mostly means void", "pixels"),
    "unknown-id": Code("error", "ids that are not in the label set", "pixels"),
    "unknown-color": Code("error", "colors that are not in the label set", "pixels"),
    "void-as-class": Code("warning", "void or padding stored as the id of a learned class"),
    # what the labels hold
    "all-void": Code("error", "labels that are entirely void", "train"),
    "one-class": Code("warning", "labels with a single class"),
    "class-missing": Code("warning", "a class without a single pixel in a split"),
    "class-drift": Code("warning", "a split whose class distribution differs from train's"),
    # the same thing twice
    "duplicate-across-splits": Code("error", "the same pixels in two splits"),
    "duplicate-in-split": Code("warning", "the same pixels twice in a split"),
    "contradicting-labels": Code("error", "the same pixels with different labels"),
    "near-duplicate": Code("warning", "frames of two splits that look almost the same"),
    "near-duplicate-in-split": Code("warning", "frames of a split that look almost the same"),
    "same-sequence": Code("warning", "one sequence in two splits"),
    "same-city": Code("warning", "one city in two splits"),
    # images that stand out
    "exif-rotated": Code("warning", "images that are upright only after applying their EXIF orientation"),
    "too-dark": Code("warning", "images that are much darker than the others"),
    "too-bright": Code("warning", "images that are much brighter than the others"),
    "blurred": Code("warning", "images that are much less sharp than the others"),
    "odd-size": Code("warning", "images whose size or shape differs from nearly all others"),
    "odd-color": Code("warning", "images whose colors differ strongly from the others"),
}  # fmt: skip


def severity_of(code: str, allow: Collection[str] = (), forbid: Collection[str] = ()) -> Severity:
    """The severity under a config. Raises KeyError for an unknown code."""
    if code in forbid:
        return "error"
    return "warning" if code in allow else CODES[code].severity


def require_codes(allow: Iterable[str], forbid: Iterable[str]) -> None:
    """Raise ConfigError that lists all unknown codes and all that are both allowed and forbidden."""
    allow, forbid = list(allow), list(forbid)
    wrong = [f"data.allow: {_unknown(c)}" for c in allow if c not in CODES]
    wrong += [f"data.forbid: {_unknown(c)}" for c in forbid if c not in CODES]
    wrong += [f"{c} is both in data.allow and in data.forbid" for c in allow if c in forbid]
    if wrong:
        raise ConfigError("; ".join(wrong), expected="codes of docs/data-doctor.md")


def _unknown(code: str) -> str:
    near = difflib.get_close_matches(code, CODES, n=2)
    return f"unknown code {code!r}" + (f", perhaps you meant {' or '.join(near)}" if near else "")


def with_severity(
    findings: Iterable[Finding], allow: Collection[str] = frozenset(), forbid: Collection[str] = frozenset()
) -> list[Finding]:
    """The findings with the config's severity. Raises ConfigError as `require_codes` does."""
    require_codes(allow, forbid)
    return [
        replace(f, severity=severity_of(f.code, allow, forbid)) if f.code in allow or f.code in forbid else f
        for f in findings
    ]


def plural(count: int, noun: str, several: str = "") -> str:
    """ "1 class", "2,000 classes". several: the plural if it is not the noun plus "s"."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"
