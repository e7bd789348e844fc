"""Masks as data sets write them, brought to ids of classes and to train ids.

Shapes: H W the mask. Ids are those of the form's label set, whatever the file holds: numbers, colours
or polygons. UNKNOWN stands for a colour or a name that the label set lacks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np

from roadseg.files import sha256_bytes
from roadseg.images import Limits, read_image, read_label
from roadseg.labels import IGNORE, LabelSet

Kind = Literal["ids", "colors", "polygons", "coco"]
UNKNOWN = 65_535


@dataclass(frozen=True)
class MaskForm:
    """How a source writes its masks, and what they mean to the network.

    kind: "ids" (a PNG of numbers or palette indexes), "colors" (RGB, or a palette's colours),
    "polygons" (a JSON an image, as Cityscapes writes them), "coco" (one JSON for many images).
    label_set: the source's own classes, their train ids those of the manifest's label set; its
    `trained` may have gaps. background: the id where no polygon lies.
    """

    kind: Kind
    label_set: LabelSet
    background: int = 0

    @cached_property
    def id_to_train(self) -> np.ndarray:
        """uint8 [65536]: id to train id; void, unknown ids and UNKNOWN map to IGNORE."""
        table = np.full(UNKNOWN + 1, IGNORE, np.uint8)
        table[:256] = self.label_set.id_to_train
        return table

    @cached_property
    def _color_to_id(self) -> np.ndarray:
        """uint16 [2^24]: 0xRRGGBB to id, UNKNOWN where the label set has no such colour."""
        table = np.full(1 << 24, UNKNOWN, np.uint16)
        for c in reversed(self.label_set.classes):  # of two classes with one colour the first has it
            r, g, b = c.color
            table[r << 16 | g << 8 | b] = c.id
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "label_set": self.label_set, "background": self.background}  # not the tables

    @property
    def digest(self) -> str:
        """SHA-256 of what a mask's values mean; of ids alone it is the label set's own."""
        if self.kind == "ids":
            return self.label_set.mapping_digest
        rows = sorted((c.id, c.train_id, c.name, c.color) for c in self.label_set.classes)
        return hashlib.sha256(json.dumps([self.kind, self.background, rows]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "background": self.background, "label_set": self.label_set.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> MaskForm:
        return MaskForm(data["kind"], LabelSet.from_json(data["label_set"]), data["background"])


def read_ids(data: bytes, form: MaskForm, limits: Limits, key: str = "") -> np.ndarray:
    """uint8 or uint16 [H, W] of the form's ids. key: of a COCO file, which image.

    Raises ImageError for anything that is no mask of that kind.
    """
    if form.kind == "ids":
        return read_label(data, limits)
    if form.kind == "colors":
        return _ids_of_colors(read_image(data, limits), form)
    from roadseg.data.polygons import draw_cityscapes, draw_coco

    if form.kind == "polygons":
        return draw_cityscapes(data, form, limits)
    return draw_coco(data, key, form, limits)


def train_ids(ids: np.ndarray, form: MaskForm) -> np.ndarray:
    """uint8 [H, W] of train ids, IGNORE where void or unknown."""
    if ids.dtype == np.uint8:
        return cv2.LUT(ids, form.id_to_train[:256])  # 0.2 ms for 2 megapixels; numpy's indexing takes 2
    return form.id_to_train[ids]


def mask_path(label: str, form: MaskForm) -> tuple[str, str]:
    """(file, key) of a sample's label, which for COCO is "file.json#image id"."""
    if form.kind != "coco":
        return label, ""
    path, _, key = label.rpartition("#")
    return path, key


def mask_digest(data: bytes, form: MaskForm, key: str = "") -> str:
    """SHA-256 of what one image's label is made of: the file, or of a COCO file that image's part."""
    if form.kind != "coco":
        return sha256_bytes(data)
    from roadseg.data.polygons import coco_entry

    return sha256_bytes(json.dumps(coco_entry(data, key), sort_keys=True).encode())


def _ids_of_colors(image: np.ndarray, form: MaskForm) -> np.ndarray:
    packed = image[..., 0].astype(np.int32) << 16 | image[..., 1].astype(np.int32) << 8 | image[..., 2]
    ids = form._color_to_id[packed]
    return ids if ids.max(initial=0) > 255 else ids.astype(np.uint8)


def unknown_colors(data: bytes, form: MaskForm, limits: Limits) -> dict[str, int]:
    """Pixels by colour, as #rrggbb, of the colours that the form's label set lacks; the most common first."""
    image = read_image(data, limits)
    stray = image[_ids_of_colors(image, form) == UNKNOWN]
    colors, counts = np.unique(stray, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {"#" + bytes(colors[i]).hex(): int(counts[i]) for i in order}
