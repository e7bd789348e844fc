"""Detect wrong values in labels from their counts: one cause a label, the most specific.

Plausible but wrong values, such as classes off by one, cannot be detected without a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from roadseg.data.masks.form import MaskForm
from roadseg.ingest.checks.findings import CODES, Finding, plural
from roadseg.ingest.checks.interpolated_masks import INTERPOLATED_SHARE
from roadseg.ingest.measure import MeasuredPair
from roadseg.labels import CITYSCAPES, IGNORE, LabelSet

_MAX_LISTED_IDS = 12
_FIRST_INSTANCE_ID = 1000  # class x 1000 + number, as in Cityscapes and BDD
_CITYSCAPES_USUAL = frozenset((7, 11, 21, 23, 26))  # road, building, vegetation, sky, car: in nearly every frame
_MANY_IDS = 8  # so many different ids without one above the train ids are not a coincidence
_BINARY = frozenset((0, 255))
_MORE_COLORS = re.compile(r"and ([\d,]+) more colours")
_STRAY_COLORS = 50  # in one label; JPEG compression makes hundreds


def causes(measured: Sequence[MeasuredPair], form: MaskForm) -> dict[str, str]:
    """Code of the value problem by label path; labels without a problem are left out.

    measured: the pairs of one split and one part, whose masks have this form.
    """
    found = {s.pair.label: code for s in measured if (code := _cause(s, form))}
    if form.kind != "ids":
        return found
    rest = [s for s in measured if s.id_pixels and s.pair.label not in found]
    ids = frozenset[int]().union(*(_ids(s) for s in rest))
    low = _mostly_above_train_ids(form.label_set) and _only_train_ids(ids, form.label_set)
    if low and len(ids - {IGNORE}) >= _MANY_IDS:
        pixels = sum((Counter(dict(s.id_pixels)) for s in rest), Counter[int]())
        if pixels[0] and pixels[0] >= pixels[_first_id(form.label_set)]:
            return found | {s.pair.label: "train-ids" for s in rest}
    binary = [s for s in rest if _ids(s) <= _BINARY]
    void_and_others = IGNORE in form.label_set.known_ids and ids & form.label_set.known_ids - _BINARY
    if void_and_others or _learned(IGNORE, form):
        return found
    if len(rest) >= 3 and len(binary) >= 0.9 * len(rest) and ids >= _BINARY:
        found |= {s.pair.label: "binary-mask" for s in binary}
    return found


def _ids(s: MeasuredPair) -> frozenset[int]:
    return frozenset(i for i, _ in s.id_pixels)


def _swapped(s: MeasuredPair) -> bool:
    return any(code == "swapped" for code, _, _ in s.problems)


def _learned(id_: int, form: MaskForm) -> bool:
    return any(c.id == id_ and c.train_id != IGNORE for c in form.label_set.classes)


def _cause(s: MeasuredPair, form: MaskForm) -> str:
    problems = {code: text for code, path, text in s.problems if path == s.pair.label}
    if _swapped(s) or form.kind not in ("ids", "colors"):
        return ""
    if "unreadable-label" in problems:
        if form.kind != "ids":
            return ""
        if problems["unreadable-label"].startswith("a mask saved as jpeg"):
            return "interpolated-mask"
        return "color-mask" if problems["unreadable-label"].startswith("a mask of RGB") else ""
    if s.interpolated > INTERPOLATED_SHARE:
        return "interpolated-mask"
    if form.kind == "ids":
        return _cause_of_ids(s, form.label_set)
    if "unknown-color" not in problems:
        return ""
    if s.mask_mode in ("grey", "grey16", "palette"):
        return "id-mask"
    more = _MORE_COLORS.search(problems["unknown-color"])
    return "interpolated-mask" if more and int(more.group(1).replace(",", "")) > _STRAY_COLORS else ""


def _cause_of_ids(s: MeasuredPair, label_set: LabelSet) -> str:
    ids, pixels = _ids(s), dict(s.id_pixels)
    unknown = ids - label_set.known_ids
    if _train_ids(ids, pixels, label_set):
        return "train-ids"
    train_ids = all(c.id == c.train_id for c in label_set.classes if c.train_id != IGNORE)
    if unknown and train_ids and ids <= CITYSCAPES.known_ids and len(ids & _CITYSCAPES_USUAL) >= 3:
        return "label-ids"
    if max(unknown, default=0) >= _FIRST_INSTANCE_ID:
        return "instance-ids"
    if unknown == {IGNORE}:
        return "binary-mask" if ids == _BINARY else "undeclared-void"
    return ""


def _train_ids(ids: frozenset[int], pixels: Mapping[int, int], label_set: LabelSet) -> bool:
    """True if one label holds train ids although the label set has other ids.

    The value 255, if the label set does not declare it, decides. Without it, 0 must be frequent while the id
    of the class with train id 0 is rare.
    """
    if not _mostly_above_train_ids(label_set) or not _only_train_ids(ids, label_set):
        return False
    if IGNORE in ids and IGNORE not in label_set.known_ids:
        return len(ids) > 2
    zero, first = pixels.get(0, 0), pixels.get(_first_id(label_set), 0)
    return len(ids) >= _MANY_IDS and zero > 0.05 * sum(pixels.values()) and zero > 4 * first


def _first_id(label_set: LabelSet) -> int:
    """The id of the class with train id 0, such as 7 (road) in Cityscapes."""
    return next(c.id for c in label_set.classes if c.train_id == 0)


def _mostly_above_train_ids(label_set: LabelSet) -> bool:
    """True if most learned ids are above the train ids, as in Cityscapes; labels without them are suspicious."""
    learned = [c for c in label_set.classes if c.train_id != IGNORE]
    count = max((c.train_id for c in learned), default=0) + 1
    return sum(c.id >= count for c in learned) > len(learned) / 2 and any(c.train_id == 0 for c in learned)


def _only_train_ids(ids: frozenset[int], label_set: LabelSet) -> bool:
    return ids <= {*(c.train_id for c in label_set.classes), IGNORE}


def value_findings(
    where: str, split: str, measured: Sequence[MeasuredPair], form: MaskForm
) -> tuple[list[Finding], dict[str, str]]:
    """Findings about the label values of one split and part (named `where` in messages), and `causes`.

    A label with a cause gets no further finding from problems met while reading it.
    """
    cause = causes(measured, form)
    by_label = {s.pair.label: s for s in measured}
    findings = []
    for code in sorted(set(cause.values())):
        labels = sorted(label for label, c in cause.items() if c == code)
        entries = tuple(f"{label}: {_described(by_label[label])}" for label in labels)
        everyone = "all " if len(labels) == len(measured) > 1 else ""
        says = _MESSAGES[code](form.label_set)
        says = says.replace("hold ", "holds ", 1) if len(labels) == 1 and says.startswith("hold ") else says
        message = f"{everyone}{plural(len(labels), 'label')} of {where} {says}"
        fix = _FIXES[code](form.label_set)
        findings.append(Finding(code, CODES[code].severity, split, entries, len(entries), message, fix))
    rest = [s for s in measured if s.id_pixels and s.pair.label not in cause and not _swapped(s)]
    for code, what, fix in (
        ("unknown-id", "ids", _unknown_fix(rest, form.label_set)),
        ("unknown-color", "colours", _color_fix(form.label_set)),
    ):
        entries = tuple(f"{path}: {text}" for s in rest for c, path, text in s.problems if c == code)
        if entries:
            message = f"{plural(len(entries), 'label')} of {where} with {what} that the label set lacks"
            findings.append(Finding(code, CODES[code].severity, split, entries, len(entries), message, fix))
    return findings + _mixed_masks(where, split, measured, form), cause


def _described(s: MeasuredPair) -> str:
    for code, path, text in s.problems:
        if path == s.pair.label and code in ("unreadable-label", "unknown-color"):
            return text
    listing = ", ".join(str(i) for i in sorted(_ids(s))[:_MAX_LISTED_IDS])
    return f"ids {listing}" + (
        f" and {len(s.id_pixels) - _MAX_LISTED_IDS} more" if len(s.id_pixels) > _MAX_LISTED_IDS else ""
    )


def _train_count(label_set: LabelSet) -> int:
    return max(c.train_id for c in label_set.classes if c.train_id != IGNORE) + 1


_MESSAGES: dict[str, Callable[[LabelSet], str]] = {
    "train-ids": lambda s: f"hold only 0..{_train_count(s) - 1} and 255: they are train ids",
    "label-ids": lambda s: f"hold ids as Cityscapes' labelIds do, where {s.name} has 0..{_train_count(s) - 1}",
    "instance-ids": lambda s: "hold ids from 1000: they are instance ids (class x 1000 + number)",
    "binary-mask": lambda s: "hold 0 and 255 only: a mask of one thing, as 0/255",
    "color-mask": lambda s: "hold colours where ids are expected",
    "id-mask": lambda s: "hold ids, or a palette of other colours, where the label set's colours are expected",
    "interpolated-mask": lambda s: "with values that are mixed from their neighbours', at the edges of things",
    "undeclared-void": lambda s: f"hold 255, which {s.name} lacks: mostly void",
}


def _train_ids_fix(label_set: LabelSet) -> str:
    if label_set.name == CITYSCAPES.name:
        return f"use the masks with the ids of {label_set.name} (*_labelIds.png, not *_labelTrainIds.png)"
    return "give masks with the ids of the label set, or list the train ids as its ids"


_FIXES: dict[str, Callable[[LabelSet], str]] = {
    "train-ids": _train_ids_fix,
    "label-ids": lambda s: (
        "use the masks with train ids (*_labelTrainIds.png, not *_labelIds.png), or give the classes their "
        "Cityscapes ids in the YAML of a folder"
    ),
    "instance-ids": lambda s: "use the masks of class ids (*_labelIds.png, not *_instanceIds.png)",
    "binary-mask": lambda s: (
        "source folder can read them: `classes: [{id: 0, name: background}, {id: 255, name: ...}]`, and no "
        "`ignore: [255]`"
    ),
    "color-mask": lambda s: (
        "use the masks of ids that the data set has beside them, or source folder with `masks: colors` and "
        "each class's color"
    ),
    "id-mask": lambda s: (
        "leave `masks: colors` out of the YAML and give each class its id, or use the masks of colours"
    ),
    "interpolated-mask": lambda s: (
        "export the masks again, resized with nearest neighbour, without smoothing, as PNG: a mixed value is the "
        "id of another class"
    ),
    "undeclared-void": lambda s: "declare it in the YAML of a folder, `ignore: [255]`; or repair the masks",
}


def _unknown_fix(measured: Sequence[MeasuredPair], label_set: LabelSet) -> str:
    unknown = {i for s in measured for i in _ids(s)} - label_set.known_ids
    known = sorted(i for i in label_set.known_ids if i >= 0)
    span = f"{known[0]}..{known[-1]}" if known == list(range(known[0], known[-1] + 1)) else ", ".join(map(str, known))
    text = f"{label_set.name} has the ids {span}; repair the masks, or declare the ids (data.source folder, data.labels"
    text += "; 255 mostly marks void: `ignore: [255]`)" if IGNORE in unknown else ")"
    if any(s.mask_mode == "palette" and _ids(s) - label_set.known_ids for s in measured):
        text += "; of a palette the indexes are taken: where its colours are the classes, `masks: colors`"
    return text


def _color_fix(label_set: LabelSet) -> str:
    listing = ", ".join(f"{c.name} #{bytes(c.color).hex()}" for c in label_set.classes[:4])
    return f"the colours of {label_set.name} are {listing}, ...; repair the masks, or declare the colours (data.labels)"


def _mixed_masks(where: str, split: str, measured: Sequence[MeasuredPair], form: MaskForm) -> list[Finding]:
    """Palette masks among gray ones: another program wrote them and may have renumbered the palette."""
    kinds = {s.pair.label: "palette" if s.mask_mode == "palette" else "grey" for s in measured if s.id_pixels}
    counts = Counter(kinds.values())
    if form.kind != "ids" or len(counts) < 2:
        return []
    rarer = "palette" if counts["palette"] <= counts["grey"] else "grey"
    labels = tuple(sorted(label for label, kind in kinds.items() if kind == rarer))
    message = f"{plural(len(labels), 'label')} of {where} stored as {rarer}, the other {len(kinds) - len(labels):,} not"
    fix = "look whether their numbers mean the same: saving with an optimised palette numbers classes anew"
    return [Finding("mixed-masks", "warning", split, labels, len(labels), message, fix)]
