"""Parse the classes of a folder's YAML: names, ids, colors, and their values in the masks."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeGuard

from roadseg.labels import CITYSCAPES, IGNORE, LabelClass

Masks = Literal["ids", "palette", "colors", "polygons", "coco"]
_KEYS = ("id", "name", "color", "category", "ignore", "train_id", "cityscapes")
_OPEN = -1  # an id or a train id that the YAML does not give
_SHORT = reprlib.Repr()  # formats YAML values; also short for lists that contain each other through aliases
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2
_MOST_LEARNED = IGNORE  # train ids 0..254
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


def classes_of(rows: Any, ignore: Any, masks: Masks, wrong: list[str]) -> tuple[LabelClass, ...]:
    """The classes in their order, then the ignored ones. Errors are appended to `wrong`.

    If masks have no ids (colors, polygons, coco), a class without an id gets the first free one.
    """
    if not isinstance(rows, list) or not rows:
        wrong.append(f"classes: is {kind_of(rows)}; expected a list of {{id, name, color}}")
        rows = []
    classes = [c for i, row in enumerate(rows) if (c := _class(row, f"classes.{i}", masks, wrong)) is not None]
    learned = [c for c in classes if c.train_id != IGNORE]
    _check_train_ids(learned, wrong, whole=len(classes) == len(rows) > 0)
    classes += _ignored(ignore, masks, wrong)
    _check_doubles(classes, masks, wrong)
    order = iter(range(len(learned)))
    numbered = [replace(c, train_id=next(order)) if c.train_id == _OPEN else c for c in classes]
    return tuple(_with_ids(numbered, wrong))


def void_background(classes: Sequence[LabelClass], wrong: list[str]) -> tuple[tuple[LabelClass, ...], int]:
    """(classes, id of pixels without a shape): the ignored class "unlabeled", added if there is none."""
    for c in classes:
        if c.name == "unlabeled" and c.train_id == IGNORE:
            return tuple(classes), c.id
    free = sorted(set(range(256)) - {c.id for c in classes})
    if not free:
        wrong.append("background: no id is free for what no shape covers; expected 255 classes, or the name of one")
        return tuple(classes), 0
    return (*classes, LabelClass("unlabeled", free[-1], IGNORE, (0, 0, 0))), free[-1]


def _check_train_ids(learned: list[LabelClass], wrong: list[str], *, whole: bool) -> None:
    given = [c for c in learned if c.train_id != _OPEN]
    if not given and len(learned) > _MOST_LEARNED:
        wrong.append(f"classes: {len(learned)} to learn; expected at most {_MOST_LEARNED}")
    if given and len(given) < len(learned):
        lacking = ", ".join(c.name for c in learned if c.train_id == _OPEN)
        wrong.append(f"classes: some have a train_id, but not {lacking}; expected all or none")
    elif given and {c.train_id for c in given} != set(range(len({c.train_id for c in given}))):
        wrong.append(f"classes: train ids are {sorted({c.train_id for c in given})}; expected 0..n-1 without gaps")
    elif len(learned) < 2 and whole:
        wrong.append(f"classes: {len(learned)} to learn; expected at least 2")


def _check_doubles(classes: list[LabelClass], masks: Masks, wrong: list[str]) -> None:
    """Ids, names or colors that identify a class in the masks must be unique."""
    named = classes if masks in ("polygons", "coco") else [c for c in classes if c.train_id != IGNORE]
    told_by: list[tuple[str, list[Any]]] = [
        ("id", [c.id for c in classes if c.id != _OPEN]),
        ("name", [c.name for c in named]),
    ]
    if masks == "colors":
        told_by.append(("color", [f"#{bytes(c.color).hex()}" for c in classes]))
    for what, values in told_by:
        for value in sorted({v for v in values if values.count(v) > 1}, key=str):
            wrong.append(f"classes: the {what} {value} is given {values.count(value)} times; expected once")


def _with_ids(classes: list[LabelClass], wrong: list[str]) -> list[LabelClass]:
    free = iter(sorted(set(range(256)) - {c.id for c in classes}))
    if sum(c.id == _OPEN for c in classes) > 256 - len({c.id for c in classes} - {_OPEN}):
        wrong.append(f"classes: {len(classes)}, with those ignored; expected at most 256")
        return classes
    return [replace(c, id=next(free)) if c.id == _OPEN else c for c in classes]


def _class(row: Any, at: str, masks: Masks, wrong: list[str]) -> LabelClass | None:
    if not isinstance(row, dict):
        wrong.append(f"{at}: is {kind_of(row)}; expected {{id, name, color}}")
        return None
    before = len(wrong)
    unknown_keys(row, _KEYS, f"{at}.", wrong)
    id_ = row.get("id")
    if not is_id(id_) and (masks in ("ids", "palette") or id_ is not None):
        wrong.append(f"{at}.id: is {kind_of(id_)}; expected a whole number in 0..255")
    if not is_name(row.get("name")):
        wrong.append(f"{at}.name: is {kind_of(row.get('name'))}; expected text in one line")
    color = rgb(row["color"]) if "color" in row else voc_color(id_ if is_id(id_) else 0)
    if color is None:
        wrong.append(f"{at}.color: is {short(row['color'])}; expected [red, green, blue] in 0..255, or '#rrggbb'")
    elif masks == "colors" and "color" not in row:
        wrong.append(f"{at}.color: is empty; expected the class's colour in the masks, as [128, 64, 128]")
    if not isinstance(row.get("ignore", False), bool):
        wrong.append(f"{at}.ignore: is {kind_of(row['ignore'])}; expected true or false")
    if row.get("category", "") != "" and not is_name(row["category"]):
        wrong.append(f"{at}.category: is {kind_of(row['category'])}; expected text in one line")
    if "train_id" in row and not is_id(row["train_id"]):
        wrong.append(
            f"{at}.train_id: is {kind_of(row['train_id'])}; expected a whole number in 0..254, or 255 to ignore"
        )
    cityscapes = _counterpart(row, at, wrong)
    if len(wrong) > before or color is None:
        return None
    train_id = IGNORE if row.get("ignore") else row.get("train_id", _OPEN)
    category = row.get("category", "")
    return LabelClass(row["name"], id_ if is_id(id_) else _OPEN, train_id, color, category, cityscapes=cityscapes)


def _counterpart(row: dict[Any, Any], at: str, wrong: list[str]) -> str | None:
    """The Cityscapes train class named in the YAML; "" for none, None if the key is missing."""
    value = row.get("cityscapes")
    if "cityscapes" not in row or value == "" or value in CITYSCAPES.names:
        return value
    near = nearest(value, CITYSCAPES.names)
    hint = f"perhaps you meant {near}" if near else f"expected one of {', '.join(CITYSCAPES.names)}, or '' for none"
    wrong.append(f"{at}.cityscapes: is {kind_of(value)}, not a train class of Cityscapes; {hint}")
    return None


def _ignored(ignore: Any, masks: Masks, wrong: list[str]) -> list[LabelClass]:
    """Void classes from `ignore`: ids, colors of color masks, or names of polygons and COCO categories."""
    named = masks in ("polygons", "coco")
    expected = {"colors": "colours", "polygons": "names", "coco": "names"}.get(masks, "ids in 0..255")
    values = ignore if isinstance(ignore, list) else [None]
    made = []
    for value in values:
        color = rgb(value) if masks == "colors" else (0, 0, 0)
        if masks == "colors" and color:
            made.append(LabelClass(f"ignored #{bytes(color).hex()}", _OPEN, IGNORE, color))
        elif named and is_name(value):
            made.append(LabelClass(value, _OPEN, IGNORE, (0, 0, 0)))
        elif masks != "colors" and is_id(value) and masks != "polygons":
            made.append(LabelClass(f"ignored {value}", value, IGNORE, (0, 0, 0)))
        else:
            wrong.append(f"ignore: is {short(ignore)}; expected a list of {expected}")
            return []
    return made


def is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= 255


def is_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def rgb(value: Any) -> tuple[int, int, int] | None:
    """Parse [r, g, b] or "#rrggbb"; None for anything else."""
    if isinstance(value, str) and _HEX.fullmatch(value):
        value = list(bytes.fromhex(value[1:]))
    if not isinstance(value, list) or len(value) != 3 or not all(map(is_id, value)):
        return None
    return value[0], value[1], value[2]


def voc_color(id_: int) -> tuple[int, int, int]:
    """The color of an id in PASCAL VOC's development kit: its bits distributed over red, green and blue."""
    r, g, b = (sum((id_ >> (3 * i + c) & 1) << (7 - i) for i in range(3)) for c in range(3))
    return r, g, b


def kind_of(value: Any) -> str:
    """Describe a YAML value for an error message."""
    kinds = {type(None): "empty", dict: "a mapping", list: "a list"}
    return kinds.get(type(value), f"the text {short(value)}" if isinstance(value, str) else short(value))


def short(value: Any) -> str:
    """repr of the value, in one line of bounded length."""
    return _SHORT.repr(value)


def bare(value: Any) -> str:
    """A key or a path, without quotes if it is printable and short."""
    return value if is_name(value) and len(value) <= 60 else short(value)


def nearest(value: Any, known: Sequence[str]) -> str:
    """The closest known name, "" if none is close."""
    near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) and len(value) <= 60 else []
    return near[0] if near else ""


def unknown_keys(data: dict[Any, Any], known: Sequence[str], at: str, wrong: list[str]) -> None:
    for key in data:
        if key not in known:
            near = nearest(key, known)
            wrong.append(f"{at}{bare(key)}: unknown key" + (f"; perhaps you meant {near}" if near else ""))
