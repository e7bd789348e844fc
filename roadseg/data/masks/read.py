"""Masks as data sets write them, brought to ids of classes and to train ids.

Shapes: H W the mask. Ids are those of the form's label set, whatever the file holds: numbers, colours
or polygons. UNKNOWN stands for a colour or a name that the label set lacks.
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
    """The bytes that one image's label is made of: its file, or of a COCO file that image's part, as JSON.

    They are what `read_ids` takes, and their SHA-256 is the label's. A COCO file is scanned
    once a process. Raises ImageError, OSError.
    """
    path, key = mask_path(label, form)
    if not key:
        return read_bytes(root / path, limits)
    return coco.read_part(root / path, key, limits)


def read_ids(data: bytes, form: MaskForm, limits: Limits) -> np.ndarray:
    """uint8 or uint16 [H, W] of the form's ids, from what `mask_bytes` gives.

    Raises ImageError for anything that is no mask of that kind.
    """
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
        return cv2.LUT(ids, form.id_to_train[:256])  # 0.2 ms for 2 megapixels; numpy's indexing takes 2
    return form.id_to_train[ids]


def mask_path(label: str, form: MaskForm) -> tuple[str, str]:
    """(file, key) of a sample's label, which for COCO is "file.json#image id"."""
    found = _COCO_LABEL.fullmatch(label) if form.kind == "coco" else None
    return (found[1], found[2]) if found else (label, "")


def _colors(data: bytes, limits: Limits) -> np.ndarray:
    if probe(data)[0] == "jpeg":
        raise ImageError("a mask saved as jpeg", expected="a lossless one: jpeg changes colours", todo="export as PNG")
    return read_image(data, limits)


def _ids_of_colors(image: np.ndarray, form: MaskForm) -> np.ndarray:
    packed = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view("<i4")[..., 0]
    packed &= 0xFFFFFF
    ids = form._color_to_id.take(packed, mode="clip")  # half the time of packing channel by channel
    return ids if ids.max(initial=0) > 255 else ids.astype(np.uint8)


def unknown_colors(data: bytes, form: MaskForm, limits: Limits) -> tuple[dict[str, int], int]:
    """(pixels by colour, how many colours) of those that the form's label set lacks.

    By colour, as #rrggbb, only the `MOST_COLORS` most common, those first: a photograph has a million.
    """
    image = _colors(data, limits)
    stray = image[_ids_of_colors(image, form) == UNKNOWN].astype(np.uint32)
    packed = stray[:, 0] << 16 | stray[:, 1] << 8 | stray[:, 2]  # one number a colour: rows take ten times as long
    colors, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_COLORS]
    return {f"#{colors[i]:06x}": int(counts[i]) for i in order}, len(colors)


def unknown_names(data: bytes, form: MaskForm) -> Mapping[str, int]:
    """Of polygons and COCO: how many shapes have each name that is no class of the form's."""
    if form.kind == "polygons":
        return polygons.unknown_polygon_names(data, form)
    return coco.unknown_categories(data, form)
