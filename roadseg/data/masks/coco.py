"""Draw masks from COCO JSON, one file for many images.

A file is scanned once per process, and only the byte offsets of each image's parts are kept: 16 bytes per
annotation, while the parsed file would take ten times its size. Polygons are filled exactly as by pycocotools.
COCO does not define which of two overlapping annotations wins a pixel. Here crowds are drawn first, then larger
areas before smaller ones, as in Ultralytics, coco2voc and COCO-Assistant; or, with overlap "order", annotations
in file order, as Labelme and Cityscapes draw them.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.data.masks.form import UNKNOWN, MaskForm, ids_by_name
from roadseg.data.masks.json_values import (
    canvas_size,
    describe_value,
    is_coordinate,
    parse_json,
    printable,
    refuse_constant,
)
from roadseg.data.masks.polygons import MAX_LAYERS
from roadseg.data.masks.rle import Patch, fill_polygon, fill_runs, runs_of
from roadseg.errors import ImageError
from roadseg.images.decode import Limits, read_bytes

_EXPECTED = "a COCO JSON: images, annotations with segmentation, categories"
_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_OUTLINE_PX = 20_000_000  # of all polygons of an image; a thousand detailed ones have 1,000,000


@dataclass(frozen=True)
class Annotations:
    """Byte offsets of each image's parts in a COCO file; made by `open_annotations`.

    images: {image id: (start, end)}. annotations: {image id: int64 [n, 2] of start and end}, in file order.
    file_names, categories: by id. Ids are strings, as in "file.json#12". strays: number of annotations by image
    id, for ids that no image has.
    """

    path: Path
    stamp: tuple[int, int, int]
    images: dict[str, tuple[int, int]]
    annotations: dict[str, np.ndarray]
    file_names: dict[str, str]
    categories: dict[str, str]
    strays: dict[str, int]


def open_annotations(path: Path, limits: Limits) -> Annotations:
    """The file's index, cached while the file is unchanged. Raises ImageError, or OSError if unreadable.

    The scan takes twice the file's size in memory, and about 3 s per 100 MB on one slow core.
    """
    return _opened(path, limits, _stamp(os.stat(path)))


@lru_cache(maxsize=16)  # a mix of several sources with three splits each
def _opened(path: Path, limits: Limits, stamp: tuple[int, int, int]) -> Annotations:
    return _index(read_bytes(path, limits), path, stamp)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_part(path: Path, key: str, limits: Limits) -> bytes:
    """One image's part as JSON: width, height, annotations (category, iscrowd, segmentation).

    Equal content gives equal bytes, whatever the formatting of the file. category: the name, or the id where the
    file has no name for it. Raises like `open_annotations`, and ImageError for an unknown image id.
    """
    annotations = open_annotations(path, limits)
    with open(path, "rb") as f:
        if _stamp(os.fstat(f.fileno())) != annotations.stamp:
            raise ImageError("the file changed while it was read", where=str(path), todo="run again")
        descriptor = f.fileno()
        return _part(annotations, key, lambda start, end: os.pread(descriptor, end - start, start))


def _part(annotations: Annotations, key: str, read: Callable[[int, int], bytes]) -> bytes:
    if key not in annotations.images:
        raise ImageError(f"there is no image with the id {key[:40]}", expected="an id of the file's images")
    image = parse_json(read(*annotations.images[key]), _EXPECTED)
    rows = []
    for start, end in annotations.annotations.get(key, np.empty((0, 2), np.int64)).tolist():
        row = parse_json(read(start, end), _EXPECTED)
        id_ = row.get("category_id")
        category = annotations.categories.get(_key(id_) or "", id_)
        rows.append(
            {"category": category, "iscrowd": bool(row.get("iscrowd")), "segmentation": row.get("segmentation")}
        )
    entry = {"width": image.get("width"), "height": image.get("height"), "annotations": rows}
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _key(id_: Any) -> str | None:
    """An id as a string; None for values that are not usable as an id in a path."""
    if isinstance(id_, str):
        return id_ if 0 < len(id_) < 200 and id_.isprintable() and "/" not in id_ else None
    return str(id_) if type(id_) is int and abs(id_) < 1 << 64 else None


@dataclass
class _Scan:
    """Collects the results of one pass over the file."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    file_names: dict[str, str] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    image_numbers: dict[str, int] = field(default_factory=dict)  # {image id of an annotation: number of that image}
    rows: array[int] = field(default_factory=lambda: array("q"))  # image number, start, end of each annotation

    def image(self, value: Any, start: int, end: int) -> None:
        key = _key(value.get("id")) if isinstance(value, dict) else None
        name = value.get("file_name") if isinstance(value, dict) else None
        if key is None or not isinstance(name, str) or not name:
            raise ImageError(f"image {len(self.images)} has no usable id or no file_name", expected=_EXPECTED)
        if key in self.images:
            raise ImageError(f"two images have the id {key[:40]}", expected="each id once")
        self.images[key], self.file_names[key] = (start, end), name

    def annotation(self, value: Any, start: int, end: int) -> None:
        key = _key(value.get("image_id")) if isinstance(value, dict) else None
        if key is None:
            raise ImageError(f"annotation {len(self.rows) // 3} has no usable image_id", expected=_EXPECTED)
        self.rows.extend((self.image_numbers.setdefault(key, len(self.image_numbers)), start, end))

    def category(self, value: Any, start: int, end: int) -> None:
        key = _key(value.get("id")) if isinstance(value, dict) else None
        if key is None or not isinstance(value.get("name"), str):
            raise ImageError(f"category {len(self.categories)} has no usable id or no name", expected=_EXPECTED)
        if key in self.categories:
            raise ImageError(f"two categories have the id {key[:40]}", expected="each id once")
        self.categories[key] = value["name"]


def _index(data: bytes, path: Path, stamp: tuple[int, int, int]) -> Annotations:
    if data[:4] in (b"\x89PNG", b"RIFF") or data[:3] == b"\xff\xd8\xff":
        raise ImageError("the content is an image", expected=_EXPECTED)
    scan = _Scan()
    try:
        keys = _parse(data.decode("latin-1"), scan)
    except RecursionError:
        raise ImageError("the JSON is nested too deep", expected=_EXPECTED) from None
    except IndexError:
        raise ImageError("the JSON is cut off", expected=_EXPECTED, todo="fetch or export it again") from None
    except ValueError as e:
        reason = f"{e.msg}, byte {e.pos:,}" if isinstance(e, json.JSONDecodeError) else str(e)[:80]
        raise ImageError(f"not valid JSON ({reason})", expected=_EXPECTED, todo="fetch or export it again") from None
    if missing := {"images", "annotations"} - keys:
        raise ImageError(f"the JSON has no {' and no '.join(sorted(missing))}", expected=_EXPECTED)
    table = np.array(scan.rows, np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    bounds = np.searchsorted(table[:, 0], np.arange(len(scan.image_numbers) + 1))
    spans = {key: table[bounds[n] : bounds[n + 1], 1:] for key, n in scan.image_numbers.items()}
    strays = {key: len(spans.pop(key)) for key in scan.image_numbers if key not in scan.images}
    return Annotations(path, stamp, scan.images, spans, scan.file_names, scan.categories, strays)


def _parse(text: str, scan: _Scan) -> set[str]:
    """Parse the file's top level element by element, so that only one is in memory. Returns the top-level keys.

    text: the bytes decoded as Latin-1, so that positions are byte offsets; JSON's syntax is ASCII in UTF-8 too.
    Raises ValueError, IndexError or RecursionError for invalid JSON.
    """
    handlers = {"images": scan.image, "annotations": scan.annotation, "categories": scan.category}
    decode = json.JSONDecoder(parse_constant=refuse_constant).raw_decode
    keys: set[str] = set()
    at = _skip_mark(text, 3 if text.startswith("\xef\xbb\xbf") else 0, "{")
    while text[at] != "}":
        key, at = decode(text, at)
        at = _skip_mark(text, at, ":")
        if not isinstance(key, str) or key in keys:
            raise ValueError("a key that is not a string, or is doubled")
        keys.add(key)
        if key in handlers and text[at] != "[":
            raise ImageError(f"{key} is not a list", expected=_EXPECTED, todo="export it again")
        if key in handlers:
            at = _skip_mark(text, at, "[")
            while text[at] != "]":
                value, end = decode(text, at)
                if not text[at:end].isascii():
                    value = json.loads(text[at:end].encode("latin-1"))
                handlers[key](value, at, end)
                at = _skip_comma(text, end, "]")
            at += 1
        else:
            at = decode(text, at)[1]
        at = _skip_comma(text, at, "}")
    return keys


def _skip_mark(text: str, at: int, mark: str) -> int:
    """Position of the value after `mark`. Raises JSONDecodeError if another character comes first."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # also matches the empty string
    if text[at] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def _skip_comma(text: str, at: int, end: str) -> int:
    """Position of the next element, or of `end`, the closing bracket."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    return at if text[at] == end else _skip_mark(text, at, ",")


@dataclass(frozen=True)
class _Shape:
    """One annotation: rings, each float64 [n, 2] of x and y, or column-wise run lengths, background first."""

    id_: int
    crowd: bool
    area: float
    rings: tuple[np.ndarray, ...] = ()
    runs: np.ndarray | None = None


def draw_coco(data: bytes, form: MaskForm, limits: Limits) -> np.ndarray:
    """uint8 [H, W] of the form's ids; uint16 if a category is not a class: its pixels become UNKNOWN.

    data: from `read_part`. A category is the class of its name, or of its id where the file has no name for it.
    Raises ImageError for annotations without an outline, for run lengths of another size, and for sizes and work
    over the limits.
    """
    entry = _entry(data)
    width, height = canvas_size(entry["width"], entry["height"], limits)
    known = ids_by_name(form.label_set)
    shapes = [_shape(row, i, known, form, width, height) for i, row in enumerate(entry["annotations"])]
    if form.overlap == "area":
        shapes.sort(key=lambda s: (not s.crowd, -s.area))  # stable: the later of equal ones is drawn on top
    if sum(_outline_px(ring) for s in shapes for ring in s.rings) > _MAX_OUTLINE_PX:
        raise ImageError("the outlines are far too long for an image of this size")
    wide = max([form.background, *(s.id_ for s in shapes)]) > 255
    ids = np.full((height, width), form.background, np.uint16 if wide else np.uint8)
    work = 0
    for shape in shapes:
        for x, y, patch in _patches(shape, width, height):
            rows, columns = patch.shape
            ids[y : y + rows, x : x + columns][patch] = shape.id_
            work += patch.size
            if work > MAX_LAYERS * ids.size:
                raise ImageError(f"the annotations cover the image over {MAX_LAYERS:,} times")
    return ids


def _patches(shape: _Shape, width: int, height: int) -> list[Patch]:
    if shape.runs is not None:
        return [fill_runs(shape.runs, height)]
    return [fill_polygon(ring, width, height) for ring in shape.rings]


def _outline_px(ring: np.ndarray) -> float:
    return float(np.abs(np.diff(ring, axis=0, append=ring[:1])).max(axis=1).sum())


def _shape(row: dict[str, Any], i: int, known: dict[str, int], form: MaskForm, width: int, height: int) -> _Shape:
    segmentation = row["segmentation"]
    id_ = _id_of(row["category"], known, form)
    at = f"annotation {i} of the image ({_category_name(row['category'])})"
    if isinstance(segmentation, dict):
        runs = runs_of(segmentation, width, height, at)
        return _Shape(id_, row["iscrowd"], float(runs[1::2].sum()), runs=runs)
    rings = _rings(segmentation, at)
    area = sum(abs(float(np.sum(r[:, 0] * np.roll(r[:, 1], -1) - r[:, 1] * np.roll(r[:, 0], -1)))) / 2 for r in rings)
    return _Shape(id_, row["iscrowd"], area, rings)


def _id_of(category: Any, known: dict[str, int], form: MaskForm) -> int:
    if isinstance(category, str):
        return known.get(category, UNKNOWN)
    return category if type(category) is int and category in form.label_set.known_ids else UNKNOWN


def _category_name(category: Any) -> str:
    return printable(category) if isinstance(category, str) else f"id {describe_value(category)}"


def _rings(segmentation: Any, at: str) -> tuple[np.ndarray, ...]:
    if segmentation is None or segmentation == []:
        todo = "export the masks too, or remove the annotation"
        raise ImageError(f"{at} has a box but no outline", expected="segmentation: polygons or RLE", todo=todo)
    if not isinstance(segmentation, list):
        raise ImageError(f"{at}: segmentation is {describe_value(segmentation)}", expected="polygons or RLE")
    for ring in segmentation:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2 or not all(map(is_coordinate, ring)):
            found = f"a polygon of {len(ring)} values" if isinstance(ring, list) else describe_value(ring)
            raise ImageError(f"{at} has {found}", expected="x1, y1, x2, y2, x3, y3, ..., each within a million pixels")
    return tuple(np.array(ring, np.float64).reshape(-1, 2) for ring in segmentation)


def unknown_categories(data: bytes, form: MaskForm) -> Counter[str]:
    """The number of annotations by category (name or "id n"), for categories that are not classes of the form."""
    known = ids_by_name(form.label_set)
    categories = [row["category"] for row in _entry(data)["annotations"]]
    return Counter(_category_name(c) for c in categories if _id_of(c, known, form) == UNKNOWN)


def _entry(data: bytes) -> dict[str, Any]:
    entry = parse_json(data, _EXPECTED)
    if not isinstance(entry, dict) or entry.keys() != {"width", "height", "annotations"}:
        raise ImageError("is not one image's part of a COCO file", expected="the result of read_part")
    return entry
