"""Any folders of images and masks, described by a few lines of YAML:

    name: my-roads
    classes:
      - {id: 1, name: road, color: [128, 64, 128], category: flat}
      - {id: 2, name: car, color: [0, 0, 142]}
      - {id: 3, name: bonnet, ignore: true}       # in the masks, never learned or scored
    ignore: [0, 255]                              # more ids that mean nothing
    splits:
      train: {images: images/train, labels: masks/train}
      val: {images: images/val, labels: masks/val}
    label_suffix: _mask                           # a.jpg goes with a_mask.png; with a dot, of the whole file name
    sequence: '^([^_]+)_'                         # a regular expression: which drive an image is from

Classes are learned in their order, unless each has a `train_id` (0..n-1; several may share one).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from roadseg.errors import ConfigError
from roadseg.ingest.findings import Finding
from roadseg.ingest.pairs import Pair, by_key, empty, match, not_there, pictures, unusable_names
from roadseg.labels import IGNORE, LabelClass, LabelSet

_KEYS = ("name", "classes", "ignore", "splits", "image_suffix", "label_suffix", "sequence", "terms")
_CLASS_KEYS = ("id", "name", "color", "category", "ignore", "train_id")


@dataclass(frozen=True)
class Description:
    """What the YAML says. folders: split to (images, labels), relative to the data root."""

    label_set: LabelSet
    folders: tuple[tuple[str, str, str], ...]
    image_suffix: str = ""
    label_suffix: str = ""
    sequence: re.Pattern[str] | None = None


def pairs(root: Path, description: Description) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split described whose folders are there, by path without suffix and ending.

    Raises DataError if no split's image folder is there.
    """
    present = [row for row in description.folders if (root / row[1]).is_dir()]
    if not present:
        raise not_there(root, ", ".join(f"{images}/ with {labels}/" for _, images, labels in description.folders))
    found, findings = [], []
    for split, image_folder, label_folder in present:
        image_paths, bad_images = pictures(root, image_folder)
        label_paths, bad_labels = pictures(root, label_folder)
        images = by_key(image_paths, _key(image_folder, description.image_suffix))
        labels = by_key(label_paths, _key(label_folder, description.label_suffix))
        findings += unusable_names(split, bad_images + bad_labels)
        if not images:
            ending = f" named *{description.image_suffix}" if description.image_suffix else ""
            findings.append(empty(split, f"{image_folder}/{ending}"))
        matched, wrong = match(split, images, labels)
        findings += wrong
        found += [Pair(split, k, _sequence(k, description.sequence), image, label) for k, image, label in matched]
    return found, findings


def _key(folder: str, suffix: str) -> Any:
    def key(path: str) -> str | None:
        inner = path if folder == "." else path.removeprefix(folder + "/")
        whole = inner if "." in suffix else inner.rpartition(".")[0]
        return whole.removesuffix(suffix) if whole.endswith(suffix) else None

    return key


def _sequence(name: str, pattern: re.Pattern[str] | None) -> str:
    hit = pattern.search(name) if pattern else None
    return (hit.group(1) if hit.re.groups else hit.group(0)) or "" if hit else ""


def read_description(path: Path) -> Description:
    """Raises ConfigError that lists everything wrong with the file at once."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), todo="check data.labels") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"not readable as YAML ({e})", where=str(path)) from None
    wrong: list[str] = []
    if not isinstance(data, dict):
        raise ConfigError(f"holds {_kind(data)}", expected="keys such as classes: and splits:", where=str(path))
    _unknown_keys(data, _KEYS, "", wrong)
    classes = _classes(data.get("classes"), data.get("ignore", []), wrong)
    folders = _folders(data.get("splits"), wrong)
    texts = {key: data.get(key, "") for key in ("image_suffix", "label_suffix", "terms", "sequence")}
    texts["name"] = data.get("name", path.stem)
    for key, value in texts.items():
        if not isinstance(value, str):
            wrong.append(f"{key}: is {_kind(value)}; expected text")
    sequence = None
    if isinstance(texts["sequence"], str) and texts["sequence"]:
        try:
            sequence = re.compile(texts["sequence"])
        except re.error as e:
            wrong.append(f"sequence: is no regular expression ({e})")
    if wrong:
        count = f"{len(wrong)} wrong value{'s' if len(wrong) > 1 else ''}"
        raise ConfigError(f"{count}:\n" + "\n".join(f"  {line}" for line in wrong), where=str(path))
    label_set = LabelSet(texts["name"], classes, texts["terms"])
    return Description(label_set, folders, texts["image_suffix"], texts["label_suffix"], sequence)


def _kind(value: Any) -> str:
    return {type(None): "empty", str: f"the text {value!r}", dict: "a mapping", list: "a list"}.get(
        type(value), repr(value)
    )


def _unknown_keys(data: dict[Any, Any], known: tuple[str, ...], at: str, wrong: list[str]) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            wrong.append(f"{at}{key}: unknown key" + (f"; perhaps you meant {near[0]}" if near else ""))


def _is_id(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _classes(rows: Any, ignore: Any, wrong: list[str]) -> tuple[LabelClass, ...]:
    if not isinstance(rows, list) or not rows:
        wrong.append(f"classes: is {_kind(rows)}; expected a list of {{id, name, color}}")
        rows = []
    classes = [c for i, row in enumerate(rows) if (c := _class(row, f"classes.{i}", wrong)) is not None]
    learned = [c for c in classes if c.train_id != IGNORE]
    given = [c for c in learned if c.train_id >= 0]
    if given and len(given) < len(learned):
        lacking = ", ".join(c.name for c in learned if c.train_id < 0)
        wrong.append(f"classes: some have a train_id, but not {lacking}; expected all or none")
    elif given and {c.train_id for c in given} != set(range(len({c.train_id for c in given}))):
        wrong.append(f"classes: train ids are {sorted({c.train_id for c in given})}; expected 0..n-1 without gaps")
    elif len(learned) < 2 and len(classes) == len(rows) > 0:
        wrong.append(f"classes: {len(learned)} to learn; expected at least 2")
    if not isinstance(ignore, list) or not all(_is_id(i, 255) for i in ignore):
        wrong.append(f"ignore: is {ignore!r}; expected a list of ids in 0..255")
        ignore = []
    for what, values in (("id", [c.id for c in classes] + ignore), ("name", [c.name for c in learned])):
        for value in sorted({v for v in values if values.count(v) > 1}, key=str):
            wrong.append(f"classes: the {what} {value} is given {values.count(value)} times; expected once")
    order = iter(range(len(learned)))
    numbered = [_numbered(c, next(order)) if c.train_id == -1 else c for c in classes]
    return (*numbered, *(LabelClass(f"ignored {i}", i, IGNORE, (0, 0, 0)) for i in ignore))


def _numbered(c: LabelClass, train_id: int) -> LabelClass:
    return LabelClass(c.name, c.id, train_id, c.color, c.category)


def _class(row: Any, at: str, wrong: list[str]) -> LabelClass | None:
    """train_id -1 where none is given, to be numbered by order."""
    if not isinstance(row, dict):
        wrong.append(f"{at}: is {_kind(row)}; expected {{id, name, color}}")
        return None
    before = len(wrong)
    _unknown_keys(row, _CLASS_KEYS, f"{at}.", wrong)
    if not _is_id(row.get("id"), 255):
        wrong.append(f"{at}.id: is {_kind(row.get('id'))}; expected a whole number in 0..255")
    if not isinstance(row.get("name"), str) or not row["name"].strip():
        wrong.append(f"{at}.name: is {_kind(row.get('name'))}; expected text")
    color = row.get("color") or _color(row["id"] if _is_id(row.get("id"), 255) else 0)
    if not isinstance(color, list | tuple) or len(color) != 3 or not all(_is_id(v, 255) for v in color):
        wrong.append(f"{at}.color: is {color!r}; expected [red, green, blue] in 0..255")
    if not isinstance(row.get("ignore", False), bool):
        wrong.append(f"{at}.ignore: is {_kind(row['ignore'])}; expected true or false")
    if not isinstance(row.get("category", ""), str):
        wrong.append(f"{at}.category: is {_kind(row['category'])}; expected text")
    if "train_id" in row and not _is_id(row["train_id"], IGNORE):
        wrong.append(f"{at}.train_id: is {_kind(row['train_id'])}; expected a whole number in 0..254, or 255 to ignore")
    if len(wrong) > before:
        return None
    train_id = IGNORE if row.get("ignore") else row.get("train_id", -1)
    return LabelClass(row["name"], row["id"], train_id, (color[0], color[1], color[2]), row.get("category", ""))


def _color(id_: int) -> tuple[int, int, int]:
    """The colour that PASCAL VOC's development kit gives an id: its bits, dealt to red, green and blue."""
    r, g, b = (sum((id_ >> (3 * i + c) & 1) << (7 - i) for i in range(3)) for c in range(3))
    return r, g, b


def _folders(splits: Any, wrong: list[str]) -> tuple[tuple[str, str, str], ...]:
    if not isinstance(splits, dict) or not splits:
        wrong.append(f"splits: is {_kind(splits)}; expected train: {{images: folder, labels: folder}}, ...")
        return ()
    rows = []
    for split, value in splits.items():
        at = f"splits.{split}"
        if not isinstance(split, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", split) or split == "holdout":
            wrong.append(f"{at}: is no name for a split; expected letters, digits, - and _, and not 'holdout'")
        if not isinstance(value, dict):
            wrong.append(f"{at}: is {_kind(value)}; expected {{images: folder, labels: folder}}")
            continue
        _unknown_keys(value, ("images", "labels"), f"{at}.", wrong)
        folders = []
        for key in ("images", "labels"):
            folder = value.get(key)
            if not isinstance(folder, str) or not folder:
                wrong.append(f"{at}.{key}: is {_kind(folder)}; expected a folder")
            elif folder.startswith("/") or ".." in PurePosixPath(folder).parts:
                wrong.append(f"{at}.{key}: is {folder}; expected a folder below data.root, such as images/train")
            else:
                folders.append(PurePosixPath(folder).as_posix())
        if len(folders) == 2:
            rows.append((str(split), folders[0], folders[1]))
    return tuple(rows)
