"""Source `folder`: any folders of images and masks, described by a short YAML file.

An example:

    name: my-roads
    classes:
      - {id: 1, name: road, color: [128, 64, 128], category: flat}
      - {id: 2, name: car, color: [0, 0, 142]}
      - {id: 3, name: hood, ignore: true}         # in the masks, but neither learned nor scored
    ignore: [0, 255]                              # more ids that count as void
    splits:
      train: {images: images/train, labels: masks/train}
      val: {images: images/val, labels: masks/val}
    label_suffix: _mask                           # a.jpg has the mask a_mask.png; with a dot, it includes the extension
    sequence: '^([^_]+)_'                         # a regular expression: the drive an image is from

Train ids follow the order of the classes, unless each class has a `train_id` (0..n-1; several may share one).
`masks` is the form of the labels: ids (default), palette, colors, polygons (Cityscapes JSON) or coco.
docs/folder.md has an example of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from roadseg.config.yaml_file import load_yaml
from roadseg.data.masks.coco import open_annotations
from roadseg.data.masks.form import Kind, MaskForm, Overlap
from roadseg.errors import ConfigError, ImageError
from roadseg.images.decode import Limits
from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.sources.folder_classes import (
    Masks,
    bare,
    classes_of,
    is_name,
    kind_of,
    nearest,
    short,
    unknown_keys,
    void_background,
)
from roadseg.ingest.sources.pairs import (
    IMAGE_SUFFIXES,
    Pair,
    by_key,
    empty_split,
    list_files,
    match,
    missing_data_error,
    unusable_names,
)
from roadseg.labels import LabelClass, LabelSet

_KEYS = (
    "name", "classes", "ignore", "splits", "masks", "background", "overlap", "image_suffix", "label_suffix",
    "sequence", "terms",
)  # fmt: skip
_FORM_KINDS: dict[Masks, Kind] = {
    "ids": "ids", "palette": "ids", "colors": "colors", "polygons": "polygons", "coco": "coco",
}  # fmt: skip
_LIMITS = Limits()
Key = Callable[[str], str | None]


@dataclass(frozen=True)
class Description:
    """The parsed YAML. folders: (split, images, labels), relative to the data root; for COCO labels is a file."""

    label_set: LabelSet
    folders: tuple[tuple[str, str, str], ...]
    image_suffix: str = ""
    label_suffix: str = ""
    sequence: re.Pattern[str] | None = None
    masks: Masks = "ids"
    background: int = 0
    overlap: Overlap = "area"

    @property
    def form(self) -> MaskForm:
        return MaskForm(_FORM_KINDS[self.masks], self.label_set, self.background, self.overlap)


def pairs(root: Path, description: Description, limits: Limits = _LIMITS) -> tuple[list[Pair], list[Finding]]:
    """The pairs of all splits, matched by path without suffix and extension.

    Raises DataError if no image folder exists. If only some are missing, or a COCO file is unreadable, that is a
    finding.
    """
    present = [row for row in description.folders if (root / row[1]).is_dir()]
    if not present:
        end = "" if description.masks == "coco" else "/"
        looked_for = ", ".join(f"{images}/ with {labels}{end}" for _, images, labels in description.folders)
        raise missing_data_error(root, looked_for)
    found = []
    findings = [_absent(split, images) for split, images, _ in description.folders if not (root / images).is_dir()]
    for split, image_folder, labels_at in present:
        image_paths, bad = list_files(root, image_folder)
        findings += unusable_names(split, bad)
        images = by_key(image_paths, _key(image_folder, description.image_suffix))
        if not images:
            ending = f" named *{description.image_suffix}" if description.image_suffix else ""
            findings.append(empty_split(split, f"{image_folder}/{ending}"))
        if description.masks == "coco":
            matched, wrong = _coco_pairs(root, split, images, labels_at, limits)
        else:
            matched, wrong = _file_pairs(root, split, images, labels_at, description)
        findings += wrong
        found += [Pair(split, k, _sequence(k, description.sequence), image, label) for k, image, label in matched]
    return found, findings


def _absent(split: str, images: str) -> Finding:
    message = f"{split} has no images: there is no folder {images}/"
    fix = f"correct splits.{split}.images in the YAML, or take the split out of it"
    return Finding("empty-split", "error", split, (), 0, message, fix)


def _file_pairs(
    root: Path, split: str, images: dict[str, list[str]], folder: str, description: Description
) -> tuple[list[tuple[str, str, str]], list[Finding]]:
    endings = (".json",) if description.masks == "polygons" else IMAGE_SUFFIXES
    paths, bad = list_files(root, folder, endings)
    labels = by_key(paths, _key(folder, description.label_suffix))
    matched, wrong = match(split, images, labels)
    if paths and not labels:
        none = f"no file in {folder}/ has a name with label_suffix {short(description.label_suffix)} at its end"
        fix = f"{none}, see {paths[0]}: correct label_suffix in the YAML"
        wrong = [replace(f, fix=fix) if f.code == "missing-label" else f for f in wrong]
    return matched, unusable_names(split, bad) + wrong


def _coco_pairs(
    root: Path, split: str, images: dict[str, list[str]], file: str, limits: Limits
) -> tuple[list[tuple[str, str, str]], list[Finding]]:
    """Labels are "file.json#image id"; the file's `file_name` entries assign them to images."""
    try:
        annotations = open_annotations(root / file, limits)
    except (ImageError, OSError) as e:
        what = e.found if isinstance(e, ImageError) else e.strerror or type(e).__name__
        expected = f"; expected {e.expected}" if isinstance(e, ImageError) and e.expected else ""
        message = f"the annotations of {split} can't be read, so its {plural(len(images), 'image')} have no label"
        fix = "fetch or export the file again; if it is only large, raise data.max_file_bytes"
        return [], [Finding("unreadable-label", "error", split, (f"{file}: {what}{expected}",), 1, message, fix)]
    names = {f"{file}#{id_}": name for id_, name in annotations.file_names.items()}
    labels: dict[str, list[str]] = {}
    for label, name in names.items():
        labels.setdefault(_image_key(name, images), []).append(label)
    matched, findings = match(split, images, labels)
    findings = [_with_names(f, names) if f.code == "missing-image" else f for f in findings]
    return matched, findings + _strays(split, file, annotations.strays)


def _strays(split: str, file: str, strays: dict[str, int]) -> list[Finding]:
    if not strays:
        return []
    entries = tuple(f"{file}#{id_}: {plural(n, 'annotation')}" for id_, n in sorted(strays.items()))
    count = sum(strays.values())
    message = f"{plural(count, 'annotation')} of {split} with an image_id that no image of {file} has"
    fix = "export the file again: its images and annotations are not of one export; or take the annotations out"
    return [Finding("missing-image", "error", split, entries, count, message, fix)]


def _image_key(name: str, images: dict[str, list[str]]) -> str:
    """The key of the image that a COCO file names. Exporters add or omit leading folders, or write "\\"."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if parts and "." in parts[-1]:
        parts[-1] = parts[-1].rpartition(".")[0]
    keys = ["/".join(parts[i:]) for i in range(len(parts))]
    return next((key for key in keys if key in images), "/".join(parts))


def _with_names(finding: Finding, names: dict[str, str]) -> Finding:
    """names: file name by label. Labels may contain ": ", so entries are split after the longest known label."""

    def entry(text: str) -> str:
        ends = [len(text), *(cut.start() for cut in re.finditer(": ", text))]
        label = text[: max(end for end in ends if text[:end] in names)]
        name, more = names[label], text[len(label) + 2 :]
        return f"{label}: {name if name.isprintable() else ascii(name)[1:-1]}" + (f", {more}" if more else "")

    return replace(finding, files=tuple(map(entry, finding.files)))


def _key(folder: str, suffix: str) -> Key:
    def key(path: str) -> str | None:
        inner = path if folder == "." else path.removeprefix(folder + "/")
        whole = inner if "." in suffix else inner.rpartition(".")[0]
        end = max(0, len(whole) - len(suffix))
        return whole[:end] if whole[end:].lower() == suffix.lower() else None

    return key


def _sequence(name: str, pattern: re.Pattern[str] | None) -> str:
    hit = pattern.search(name) if pattern else None
    return (hit.group(1) if hit.re.groups else hit.group(0)) or "" if hit else ""


def read_description(path: Path) -> Description:
    """Parse the YAML. Raises ConfigError that lists all errors of the file."""
    data = load_yaml(path, todo="check data.labels")
    if not isinstance(data, dict):
        raise ConfigError(f"holds {kind_of(data)}", expected="keys such as classes: and splits:", where=str(path))
    wrong: list[str] = []
    unknown_keys(data, _KEYS, "", wrong)
    masks = _masks(data.get("masks", "ids"), wrong)
    classes = classes_of(data.get("classes"), data.get("ignore", []), masks, wrong)
    classes, background = _background(data, masks, classes, wrong)
    folders = _folders(data.get("splits"), masks, wrong)
    texts = _texts(data, path.stem, masks, wrong)
    sequence = _pattern(texts["sequence"], wrong)
    overlap = data.get("overlap", "area")
    if overlap not in get_args(Overlap) or ("overlap" in data and masks != "coco"):
        wrong.append(f"overlap: is {kind_of(overlap)}; expected area or order, with masks: coco")
    if wrong:
        count = f"{len(wrong)} wrong value{'s' if len(wrong) > 1 else ''}"
        raise ConfigError(f"{count}:\n" + "\n".join(f"  {line}" for line in wrong), where=str(path))
    label_set = LabelSet(texts["name"], classes, texts["terms"])
    return Description(
        label_set, folders, texts["image_suffix"], texts["label_suffix"], sequence, masks, background, overlap
    )


def _masks(value: Any, wrong: list[str]) -> Masks:
    for known in get_args(Masks):
        if value == known:
            return known  # type: ignore[no-any-return]
    near = nearest(value, get_args(Masks))
    hint = f"perhaps you meant {near}" if near else f"expected one of {', '.join(get_args(Masks))}"
    wrong.append(f"masks: is {kind_of(value)}; {hint}")
    return "ids"


def _background(
    data: dict[Any, Any], masks: Masks, classes: tuple[LabelClass, ...], wrong: list[str]
) -> tuple[tuple[LabelClass, ...], int]:
    """(classes, background id); adds a void class if the masks are shapes and the YAML names no background."""
    if masks not in ("polygons", "coco"):
        if "background" in data:
            wrong.append("background: only for masks: polygons or coco; in other masks every pixel has a value")
        return classes, 0
    value = data.get("background")
    if "background" not in data:
        return void_background(classes, wrong)
    for c in classes:
        if value == c.name or (type(value) is int and value == c.id):
            return classes, c.id
    near = nearest(value, [c.name for c in classes])
    wrong.append(f"background: is {kind_of(value)}, not a class" + (f"; perhaps you meant {near}" if near else ""))
    return classes, 0


def _texts(data: dict[Any, Any], name: str, masks: Masks, wrong: list[str]) -> dict[str, str]:
    texts = {key: data.get(key, "") for key in ("image_suffix", "label_suffix", "terms", "sequence")}
    texts["name"] = data.get("name", name)
    for key, value in texts.items():
        if not isinstance(value, str):
            wrong.append(f"{key}: is {kind_of(value)}; expected text")
        elif key == "name" and value and not is_name(value):
            wrong.append(f"name: is {kind_of(value)}; expected text in one line")
        elif value and key.endswith("_suffix") and masks == "coco":
            wrong.append(f"{key}: not for masks: coco, whose file names the images")
    return texts


def _pattern(text: Any, wrong: list[str]) -> re.Pattern[str] | None:
    if not isinstance(text, str) or not text:
        return None
    try:
        return re.compile(text)
    except re.error as e:
        wrong.append(f"sequence: not a regular expression ({e})")
        return None


def _folders(splits: Any, masks: Masks, wrong: list[str]) -> tuple[tuple[str, str, str], ...]:
    keys = ("images", "annotations" if masks == "coco" else "labels")
    form = f"{{images: folder, {keys[1]}: {'file.json' if masks == 'coco' else 'folder'}}}"
    if not isinstance(splits, dict) or not splits:
        wrong.append(f"splits: is {kind_of(splits)}; expected train: {form}, ...")
        return ()
    rows = []
    for split, value in splits.items():
        at = f"splits.{bare(split)}"
        if not isinstance(split, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", split) or split == "holdout":
            wrong.append(f"{at}: not a valid split name; expected letters, digits, - and _, and not 'holdout'")
        if not isinstance(value, dict):
            wrong.append(f"{at}: is {kind_of(value)}; expected {form}")
            continue
        unknown_keys(value, keys, f"{at}.", wrong)
        paths = [path for key in keys if (path := _path(value.get(key), f"{at}.{key}", wrong))]
        if len(paths) == 2:
            rows.append((str(split), paths[0], paths[1]))
    return tuple(rows)


def _path(value: Any, at: str, wrong: list[str]) -> str:
    """A posix path below the data root; "" if the value is not one."""
    file = at.endswith("annotations")
    if not isinstance(value, str) or not value:
        wrong.append(f"{at}: is {kind_of(value)}; expected {'a .json file' if file else 'a folder'}")
    elif value.startswith("/") or ".." in PurePosixPath(value).parts or not value.isprintable():
        like = "annotations/train.json" if file else "images/train"
        wrong.append(
            f"{at}: is {bare(value)}; expected a {'file' if file else 'folder'} below data.root, such as {like}"
        )
    elif file and not value.lower().endswith(".json"):
        wrong.append(f"{at}: is {bare(value)}; expected a .json file")
    else:
        return PurePosixPath(value).as_posix()
    return ""
