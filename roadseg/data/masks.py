"""Masks as data sets write them, brought to ids of classes and to train ids.

Shapes: H W the mask. Ids are those of the form's label set, whatever the file holds: numbers, colours
or polygons. UNKNOWN stands for a colour or a name that the label set lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

from roadseg.errors import ImageError
from roadseg.images import Limits, probe, read_bytes, read_image, read_label
from roadseg.labels import IGNORE, LabelSet

Kind = Literal["ids", "colors", "polygons", "coco"]
Overlap = Literal["area", "order"]
UNKNOWN = 65_535
MOST_COLORS = 100
_COCO_LABEL = re.compile(r"(.*?\.json)#(.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class MaskForm:
    """How a source writes its masks, and what they mean to the network.

    kind: "ids" (a PNG of numbers or palette indexes), "colors" (RGB, or a palette's colours),
    "polygons" (a JSON an image, as Cityscapes writes them), "coco" (one JSON for many images).
    label_set: the source's own classes, their train ids those of the manifest's label set; its
    `trained` may have gaps. background: the id where no polygon lies. overlap: of COCO annotations the
    smaller ("area") or the later one ("order") has a pixel that several cover.
    """

    kind: Kind
    label_set: LabelSet
    background: int = 0
    overlap: Overlap = "area"

    @cached_property
    def id_to_train(self) -> np.ndarray:
        """uint8 [65536]: id to train id; void, unknown ids and UNKNOWN map to IGNORE."""
        table = np.full(UNKNOWN + 1, IGNORE, np.uint8)
        table[:256] = self.label_set.id_to_train
        return table

    @cached_property
    def _color_to_id(self) -> np.ndarray:
        """uint16 [2^24]: red + green 2^8 + blue 2^16 to id, UNKNOWN where the label set has no such colour."""
        table = np.full(1 << 24, UNKNOWN, np.uint16)
        for c in reversed(self.label_set.classes):  # of two classes with one colour the first has it
            r, g, b = c.color
            table[r | g << 8 | b << 16] = c.id
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not the tables

    @property
    def digest(self) -> str:
        """SHA-256 of what a mask's values mean; of ids alone it is the label set's own."""
        if self.kind == "ids":
            return self.label_set.mapping_digest
        rows = sorted((c.id, c.train_id, c.name, c.color) for c in self.label_set.classes)
        drawing = [self.background, *([self.overlap] if self.kind == "coco" else [])]
        return hashlib.sha256(json.dumps([self.kind, *drawing, rows]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "background": self.background,
            "overlap": self.overlap,
            "label_set": self.label_set.to_json(),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> MaskForm:
        """Raises ValueError, TypeError or KeyError for what `to_json` would not have given."""
        kind, background, overlap = data["kind"], data["background"], data.get("overlap", "area")
        if kind not in get_args(Kind) or overlap not in get_args(Overlap) or type(background) is not int:
            raise ValueError(f"there are no masks of {kind!r}, {background!r}, {overlap!r}")
        return MaskForm(kind, LabelSet.from_json(data["label_set"]), background, overlap)


def mask_bytes(root: Path, label: str, form: MaskForm, limits: Limits) -> bytes:
    """The bytes that one image's label is made of: its file, or of a COCO file that image's part, as JSON.

    They are what `read_ids` takes, and their SHA-256 is the label's. A COCO file is scanned
    once a process. Raises ImageError, OSError.
    """
    path, key = mask_path(label, form)
    if not key:
        return read_bytes(root / path, limits)
    from roadseg.data.coco import read_part

    return read_part(root / path, key, limits)


def read_ids(data: bytes, form: MaskForm, limits: Limits) -> np.ndarray:
    """uint8 or uint16 [H, W] of the form's ids, from what `mask_bytes` gives.

    Raises ImageError for anything that is no mask of that kind.
    """
    if form.kind == "ids":
        return read_label(data, limits)
    if form.kind == "colors":
        return _ids_of_colors(_colors(data, limits), form)
    if form.kind == "polygons":
        from roadseg.data.polygons import draw_cityscapes

        return draw_cityscapes(data, form, limits)
    from roadseg.data.coco import draw_coco

    return draw_coco(data, form, limits)


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
        from roadseg.data.polygons import unknown_polygon_names

        return unknown_polygon_names(data, form)
    from roadseg.data.coco import unknown_categories

    return unknown_categories(data, form)
