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
UNKNOWN = 65_535  # the id of a pixel whose color or name is no class of the label set


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


def ids_by_name(label_set: LabelSet) -> dict[str, int]:
    """Of classes with the same name the first one's id."""
    return {c.name: c.id for c in reversed(label_set.classes)}
