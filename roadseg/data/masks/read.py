"""Read masks as data sets write them (ids, colors, polygons); map them to class ids and train ids.

Ids are those of the form's label set; UNKNOWN marks pixels whose color or name is not in it. H, W: size of the mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from roadseg.data.masks import coco, polygons
from roadseg.data.masks.form import UNKNOWN, MaskForm
from roadseg.errors import ImageError
from roadseg.images.decode import Limits, probe, read_bytes, read_image, read_label

MOST_COLORS = 100
_COCO_LABEL = re.compile(r"(.*?\.json)#(.+)", re.IGNORECASE | re.DOTALL)


def mask_bytes(root: Path, label: str, form: MaskForm, limits: Limits) -> bytes:
    """The bytes of one image's label: its file, or the image's part of a COCO file as JSON.

    They are the input of `read_ids`; their SHA-256 identifies the label. A COCO file is scanned once per process.
    Raises ImageError, OSError.
    """
    path, key = mask_path(label, form)
    if not key:
        return read_bytes(root / path, limits)
    return coco.read_part(root / path, key, limits)


def read_ids(data: bytes, form: MaskForm, limits: Limits) -> np.ndarray:
    """uint8 or uint16 [H, W] of the form's ids. data: from `mask_bytes`. Raises ImageError for other content."""
    if form.kind == "ids":
        return read_label(data, limits)
    if form.kind == "colors":
        return _ids_of_colors(_colors(data, limits), form)
    if form.kind == "polygons":
        return polygons.draw_cityscapes(data, form, limits)
    return coco.draw_coco(data, form, limits)


def train_ids(ids: np.ndarray, form: MaskForm) -> np.ndarray:
    """uint8 [H, W] of train ids, IGNORE where void or unknown."""
    if ids.dtype == np.uint8:
        return cv2.LUT(ids, form.id_to_train[:256])  # 0.2 ms for 2 megapixels, numpy indexing 2 ms
    return form.id_to_train[ids]


def mask_path(label: str, form: MaskForm) -> tuple[str, str]:
    """(file, key) of a sample's label; the label of a COCO sample is "file.json#image id", other keys are ""."""
    found = _COCO_LABEL.fullmatch(label) if form.kind == "coco" else None
    return (found[1], found[2]) if found else (label, "")


def _colors(data: bytes, limits: Limits) -> np.ndarray:
    if probe(data)[0] == "jpeg":
        raise ImageError("a mask saved as jpeg", expected="a lossless format", todo="export as PNG")
    return read_image(data, limits)


def _ids_of_colors(image: np.ndarray, form: MaskForm) -> np.ndarray:
    packed = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view("<i4")[..., 0]
    packed &= 0xFFFFFF
    ids = form._color_to_id.take(packed, mode="clip")  # twice as fast as packing channel by channel
    return ids if ids.max(initial=0) > 255 else ids.astype(np.uint8)


def unknown_colors(data: bytes, form: MaskForm, limits: Limits) -> tuple[dict[str, int], int]:
    """(pixels by color, number of colors) of the colors that are not in the form's label set.

    Only the `MOST_COLORS` most common, as #rrggbb, most common first: a photograph has a million.
    """
    image = _colors(data, limits)
    unknown = image[_ids_of_colors(image, form) == UNKNOWN].astype(np.uint32)
    packed = unknown[:, 0] << 16 | unknown[:, 1] << 8 | unknown[:, 2]  # np.unique of rows is ten times slower
    colors, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_COLORS]
    return {f"#{colors[i]:06x}": int(counts[i]) for i in order}, len(colors)


def unknown_names(data: bytes, form: MaskForm) -> Mapping[str, int]:
    """For polygons and COCO: the number of shapes by name, for names that are not classes of the form."""
    if form.kind == "polygons":
        return polygons.unknown_polygon_names(data, form)
    return coco.unknown_categories(data, form)
