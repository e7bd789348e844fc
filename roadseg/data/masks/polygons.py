"""Draw masks from polygons as Cityscapes writes them, one JSON per image.

Follows the data set's own tool (cityscapesScripts, json2labelImg): polygons in file order, later ones over earlier
ones (a hole is another polygon on top); deleted ones are skipped; an unknown name loses its suffix "group"
(cargroup is car); classes with a negative id are not drawn; Pillow's polygon fill, including its edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from roadseg.data.masks.form import UNKNOWN, MaskForm, ids_by_name
from roadseg.data.masks.json_values import canvas_size, describe_value, is_coordinate, parse_json, printable
from roadseg.errors import ImageError
from roadseg.images.decode import Limits

MAX_JSON_BYTES = 32_000_000  # of one image; the largest of Cityscapes has under 1 MB
MAX_LAYERS = 200  # times that an image's shapes may cover it in total; stops files crafted to take hours
MAX_POINTS = 200_000  # of an image's polygons; Pillow is quadratic in the points of one; far above Cityscapes
MAX_CROSSINGS = 20_000_000  # of an image's polygon edges with pixel rows; each is computed and sorted
_NOT_DRAWN = frozenset({"license plate"})  # has the id -1 in Cityscapes' definition of its labels


def draw_cityscapes(data: bytes, form: MaskForm, limits: Limits) -> np.ndarray:
    """uint8 [H, W] of the form's ids; uint16 if a name is not a class: its polygons become UNKNOWN.

    Raises ImageError for other content, for sizes and work over the limits, and for polygons of fewer than two
    points, on which the data set's own tool fails too.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ImageError(f"the polygons have {len(data):,} bytes", expected=f"at most {MAX_JSON_BYTES:,}")
    content = parse_json(data, "Cityscapes polygons as JSON")
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise ImageError("the JSON has no list of objects", expected="imgWidth, imgHeight and objects")
    width, height = canvas_size(content.get("imgWidth"), content.get("imgHeight"), limits)
    known = ids_by_name(form.label_set)
    drawn, work, count, crossings = [], 0, 0, 0.0
    for name, points, at in _objects(content["objects"]):
        id_ = _id_of(name, known)
        if id_ < 0:
            continue
        work += _work(points, width, height)
        count += len(points)
        crossings += _crossings(points, height)
        if count > MAX_POINTS:
            raise ImageError(f"the polygons up to {at} have {count:,} points", expected=f"at most {MAX_POINTS:,}")
        if work > MAX_LAYERS * width * height + 1_000_000 or crossings > MAX_CROSSINGS:
            raise ImageError(f"the polygons up to {at} take far too long to draw for an image of this size")
        if len(points) < 2:
            raise ImageError(f"{at} has {len(points)} points", expected="at least 2", todo="remove it")
        drawn.append((id_, points))
    wide = max([form.background, *(id_ for id_, _ in drawn)]) > 255
    image = Image.new("I" if wide else "L", (width, height), form.background)
    pen = ImageDraw.Draw(image)
    for id_, points in drawn:
        pen.polygon(points, fill=id_)
    return np.array(image, np.uint16 if wide else np.uint8)


def unknown_polygon_names(data: bytes, form: MaskForm) -> Counter[str]:
    """The number of polygons by name, for names that are not classes of the form. Raises ImageError."""
    content = parse_json(data, "Cityscapes polygons as JSON")
    objects = content.get("objects") if isinstance(content, dict) else None
    known = ids_by_name(form.label_set)
    names = (name for name, _, _ in _objects(objects if isinstance(objects, list) else []))
    return Counter(name for name in names if _id_of(name, known) == UNKNOWN)


def _objects(objects: list[Any]) -> Iterator[tuple[str, list[tuple[float, float]], str]]:
    """(name, points, description for errors) of each object that is not deleted. Raises ImageError."""
    for i, row in enumerate(objects):
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise ImageError(f"object {i} is {describe_value(row)} without a label", expected="label and polygon")
        if row.get("deleted"):
            continue
        at, polygon = f"object {i} ({printable(row['label'])})", row.get("polygon")
        if not isinstance(polygon, list) or not all(
            isinstance(p, list) and len(p) >= 2 and is_coordinate(p[0]) and is_coordinate(p[1]) for p in polygon
        ):
            raise ImageError(f"{at} has no usable polygon", expected="a list of [x, y], each within a million pixels")
        yield row["label"], [(p[0], p[1]) for p in polygon], at


def _id_of(name: str, known: dict[str, int]) -> int:
    """UNKNOWN for a name that is not a class; negative for classes that are not drawn."""
    if name not in known and name.endswith("group"):
        name = name.removesuffix("group")
    return known.get(name, -1 if name in _NOT_DRAWN else UNKNOWN)


def _work(points: list[tuple[float, float]], width: int, height: int) -> int:
    """Upper bound of the drawing cost: Pillow checks every edge for every row, and fills the bounding box."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    rows = max(0, min(max(ys, default=0), height) - max(min(ys, default=0), 0)) + 1
    columns = max(0, min(max(xs, default=0), width) - max(min(xs, default=0), 0)) + 1
    return int(rows * (columns + len(points)))


def _crossings(points: list[tuple[float, float]], height: int) -> float:
    """Total number of pixel rows that the edges of a polygon cross."""
    ys = [min(max(y, 0), height) for _, y in points]
    return sum(abs(a - b) for a, b in zip(ys, [*ys[1:], *ys[:1]], strict=True))
