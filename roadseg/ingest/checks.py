"""Every check of the data: all findings at once, each with what, where, how many, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from roadseg.data.manifest import Sample
from roadseg.errors import DataError
from roadseg.images import Limits
from roadseg.ingest.duplicates import duplicates
from roadseg.ingest.findings import Finding, plural
from roadseg.ingest.pairs import Pair, split_order
from roadseg.ingest.reading import Seen, read_all
from roadseg.labels import IGNORE, LabelSet

_SHOWN_FILES = 3
_MANY_IDS = 8  # so many different ids, none above the train ids, are train ids and not chance

# code of a problem with one file: what is counted, what to do
_FILE_PROBLEMS = {
    "unreadable-image": ("image", "that can't be read", "fetch it again, or take it out with its label"),
    "unreadable-label": ("label", "that can't be read", "export it again as a PNG of ids, or take the pair out"),
    "unreadable-instances": ("instance map", "that can't be read", "fetch it again, or remove it"),
    "swapped": ("pair", "with image and label swapped", "exchange the two files"),
    "size-differs": ("file", "of another size than the label", "export image and label at one size, upright"),
    "unknown-id": ("label", "with ids that the label set lacks", ""),
}


def check(
    root: Path, pairs: Sequence[Pair], label_set: LabelSet, limits: Limits, workers: int = 0, unlabelled: str = ""
) -> tuple[tuple[Sample, ...], list[Finding]]:
    """Decodes every file of `pairs` and returns the sound samples, sorted, and what was found.

    unlabelled: a split that may be void throughout, because its public labels are placeholders.
    """
    seen = read_all(root, pairs, label_set, limits, workers)
    splits = split_order(s.pair.split for s in seen)
    findings: list[Finding] = []
    for split in splits:
        of_split = [s for s in seen if s.pair.split == split]
        findings += _file_problems(split, of_split, label_set)
        findings += _void(split, of_split, placeholder=split == unlabelled)
        findings += _missing_classes(split, of_split, label_set)
    findings += _shared_sequences(pairs, splits)
    findings += duplicates(seen)
    sound = (s for s in seen if not s.problems and s.histogram)
    return tuple(sorted((_sample(s) for s in sound), key=lambda s: (s.split, s.name))), findings


def _sample(s: Seen) -> Sample:
    p = s.pair
    return Sample(
        p.split, p.name, p.sequence, p.image, p.label, p.instances, s.width, s.height,
        s.image_sha256, s.label_sha256, s.image_bytes, s.label_bytes, s.histogram,
    )  # fmt: skip


def _file_problems(split: str, seen: Sequence[Seen], label_set: LabelSet) -> list[Finding]:
    findings = []
    train_ids = _look_like_train_ids(seen, label_set)
    if train_ids:
        labels = tuple(s.pair.label for s in seen if s.ids)
        message = f"the labels of {split} hold only 0..{label_set.num_classes - 1} and 255: they are train ids"
        fix = f"use the masks with the ids of {label_set.name} (*_labelIds.png, not *_labelTrainIds.png)"
        if label_set.name != "cityscapes":
            fix = "give masks with the ids of the label set, or list the train ids as its ids"
        findings.append(Finding("train-ids", "error", split, labels, len(labels), message, fix))
    for code, (noun, what, fix) in _FILE_PROBLEMS.items():
        entries = tuple(f"{path}: {text}" for s in seen for c, path, text in s.problems if c == code)
        if not entries or (code == "unknown-id" and train_ids):
            continue
        message = f"{plural(len(entries), noun)} of {split} {what}"
        unknown = {i for s in seen for i in s.ids} - label_set.known_ids
        fix = fix or _unknown_fix(unknown, label_set)
        findings.append(Finding(code, "error", split, entries, len(entries), message, fix))
    return findings


def _look_like_train_ids(seen: Sequence[Seen], label_set: LabelSet) -> bool:
    """True if no id of the split is one that only an ids mask has, while some id or the spread gives it away."""
    count, ids = label_set.num_classes, frozenset[int]().union(*(s.ids for s in seen))
    if all(c.id == c.train_id for c in label_set.trained) or not ids <= {*range(count), IGNORE}:
        return False
    return (IGNORE in ids and IGNORE not in label_set.known_ids and len(ids) > 2) or len(ids - {IGNORE}) >= _MANY_IDS


def _unknown_fix(unknown: set[int], label_set: LabelSet) -> str:
    if max(unknown) >= 1000:
        return "ids from 1000 are instance ids (class x 1000 + number): give the masks of class ids"
    known = sorted(label_set.known_ids)
    span = f"{known[0]}..{known[-1]}" if known == list(range(known[0], known[-1] + 1)) else ", ".join(map(str, known))
    text = f"{label_set.name} has the ids {span}; repair the masks, or declare the ids (data.source folder, data.labels"
    return text + "; 255 mostly marks void: `ignore: [255]`)" if 255 in unknown else text + ")"


def _void(split: str, seen: Sequence[Seen], *, placeholder: bool) -> list[Finding]:
    labelled = [s for s in seen if s.histogram and not any(c == "unknown-id" for c, _, _ in s.problems)]
    void = tuple(s.pair.label for s in labelled if not any(s.histogram[:-1]))
    single = tuple(s.pair.label for s in labelled if sum(n > 0 for n in s.histogram[:-1]) == 1)
    findings = []
    if void and placeholder and len(void) == len(labelled):
        message = f"all labels of {split} are void: placeholders, as the public ones are"
        fix = f"nothing; {split} can be predicted, not scored"
        findings.append(Finding("all-void", "warning", split, void, len(void), message, fix))
    elif void:
        message = f"{plural(len(void), 'label')} of {split} with nothing but void"
        fix = "label them, or take the pairs out: nothing can be learned or scored there"
        findings.append(Finding("all-void", "error", split, void, len(void), message, fix))
    if single:
        message = f"{plural(len(single), 'label')} of {split} with a single class"
        findings.append(Finding("one-class", "warning", split, single, len(single), message, "look whether it is true"))
    return findings


def _missing_classes(split: str, seen: Sequence[Seen], label_set: LabelSet) -> list[Finding]:
    histograms = [s.histogram[:-1] for s in seen if s.histogram]
    totals = [sum(column) for column in zip(*histograms, strict=True)]
    missing = [name for name, total in zip(label_set.names, totals, strict=False) if not total]
    if not missing or not any(totals):
        return []
    message = f"{split} has no pixel of {len(missing)} of {plural(len(totals), 'class').replace('classs', 'classes')}: "
    fix = "they can't be learned from it" if split == "train" else f"scores on {split} leave them out"
    return [Finding("class-missing", "warning", split, (), len(missing), message + ", ".join(missing), fix)]


def _shared_sequences(pairs: Sequence[Pair], splits: Sequence[str]) -> list[Finding]:
    sequences = {split: {p.sequence for p in pairs if p.split == split and p.sequence} for split in splits}
    findings = []
    for a, b in combinations(splits, 2):
        shared = tuple(sorted(sequences[a] & sequences[b]))
        if shared:
            images = sum(p.split == b and p.sequence in shared for p in pairs)
            message = f"{plural(len(shared), 'sequence')} in both {a} and {b} ({plural(images, 'image')} of {b})"
            fix = f"a score on {b} flatters; data.holdout_sequences makes an honest split out of train"
            findings.append(Finding("same-sequence", "warning", f"{a} and {b}", shared, len(shared), message, fix))
    return findings


def refusal(root: Path, findings: Sequence[Finding]) -> DataError:
    """One error that lists every finding that is an error, by code, with the first few files of each."""
    errors = sorted((f for f in findings if f.severity == "error"), key=lambda f: f.code)
    blocks = [f"  {f.code}: {f.message}\n{listed(f, '      ')}    to repair: {f.fix}" for f in errors]
    listing = "\n".join(blocks)  # ends the sentence, so what to do next stands in it and not in todo
    return DataError(
        f"{plural(len(errors), 'error')} in the data\n{listing}\nRepair them and run again; "
        "nothing is learned from data with errors.",
        where=str(root),
    )


def listed(finding: Finding, indent: str) -> str:
    lines = [f"{indent}{name}\n" for name in finding.files[:_SHOWN_FILES]]
    if len(finding.files) > _SHOWN_FILES:
        lines.append(f"{indent}and {len(finding.files) - _SHOWN_FILES:,} more\n")
    return "".join(lines)
