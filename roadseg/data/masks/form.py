"""How a data set writes its masks, and what their values mean."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from roadseg.labels import IGNORE, LabelSet

Kind = Literal["ids", "colors", "polygons", "coco"]
Overlap = Literal["area", "order"]
UNKNOWN = 65_535  # the id of a pixel whose color or name is not a class of the label set


@dataclass(frozen=True)
class MaskForm:
    """How a source writes its masks, and how their values map to train ids.

    kind: "ids" (a PNG of ids or palette indexes), "colors" (RGB, or a palette's colors), "polygons" (one JSON per
    image, as Cityscapes writes them), "coco" (one JSON for many images). label_set: the source's own classes,
    mapped to the train ids of the manifest's label set; its `trained` may have gaps. background: the id of pixels
    outside all polygons. overlap: which COCO annotation wins a pixel, the smaller ("area") or the later ("order").
    """

    kind: Kind
    label_set: LabelSet
    background: int = 0
    overlap: Overlap = "area"

    @cached_property
    def id_to_train(self) -> np.ndarray:
        """uint8 [65536]: id to train id; void, unknown ids and UNKNOWN become IGNORE."""
        table = np.full(UNKNOWN + 1, IGNORE, np.uint8)
        table[:256] = self.label_set.id_to_train
        return table

    @cached_property
    def _color_to_id(self) -> np.ndarray:
        """uint16 [2^24]: red + green 2^8 + blue 2^16 to id, UNKNOWN where the label set has no such color."""
        table = np.full(1 << 24, UNKNOWN, np.uint16)
        for c in reversed(self.label_set.classes):  # the first of two classes with the same color wins
            r, g, b = c.color
            table[r | g << 8 | b << 16] = c.id
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without the cached tables

    @property
    def digest(self) -> str:
        """SHA-256 of the meaning of a mask's values; for kind "ids" the label set's own digest."""
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
        """Raises ValueError, TypeError or KeyError for anything that `to_json` does not produce."""
        kind, background, overlap = data["kind"], data["background"], data.get("overlap", "area")
        if kind not in get_args(Kind) or overlap not in get_args(Overlap) or type(background) is not int:
            raise ValueError(f"unknown mask form {kind!r}, {background!r}, {overlap!r}")
        return MaskForm(kind, LabelSet.from_json(data["label_set"]), background, overlap)


def ids_by_name(label_set: LabelSet) -> dict[str, int]:
    """{class name: id}; the first of several classes with the same name."""
    return {c.name: c.id for c in reversed(label_set.classes)}
