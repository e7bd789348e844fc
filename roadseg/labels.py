"""Label sets: the ids in a data set's masks, and the train ids that a network learns.

Train ids are 0 .. num_classes - 1; `IGNORE` (255) is void: ignored in training and in scores.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

IGNORE = 255


@dataclass(frozen=True)
class LabelClass:
    """One class of a data set's masks. `train_id` is IGNORE for classes that are not learned.

    cityscapes: the Cityscapes train class that it maps to when data sets are mixed; "" for none, None for the class of
    the same name, if any.
    """

    name: str
    id: int
    train_id: int
    color: tuple[int, int, int]  # RGB
    category: str = ""
    has_instances: bool = False
    cityscapes: str | None = None


@dataclass(frozen=True)
class LabelSet:
    """All classes of a data set. If several ids share a train id, the first one's name is used."""

    name: str
    classes: tuple[LabelClass, ...]
    terms: str = ""  # license terms of the data set, copied to LICENSE-DATA

    @cached_property
    def trained(self) -> tuple[LabelClass, ...]:
        """The learned classes, by train id."""
        first: dict[int, LabelClass] = {}
        for c in self.classes:
            if c.train_id != IGNORE:
                first.setdefault(c.train_id, c)
        assert sorted(first) == list(range(len(first))), "train ids must be 0..n-1"
        return tuple(first[i] for i in range(len(first)))

    @property
    def num_classes(self) -> int:
        return len(self.trained)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.trained)

    @cached_property
    def known_ids(self) -> frozenset[int]:
        return frozenset(c.id for c in self.classes)

    @cached_property
    def id_to_train(self) -> np.ndarray:
        """uint8 [256]: mask id to train id; void and unknown ids become IGNORE."""
        table = np.full(256, IGNORE, np.uint8)
        for c in self.classes:
            if 0 <= c.id <= 255:
                table[c.id] = c.train_id
        return table

    @cached_property
    def train_to_id(self) -> np.ndarray:
        """uint8 [256]: train id to mask id; IGNORE becomes the set's first void id, or 255."""
        void = next((c.id for c in self.classes if c.train_id == IGNORE and 0 <= c.id <= 255), 255)
        table = np.full(256, void, np.uint8)
        for train_id, c in enumerate(self.trained):
            table[train_id] = c.id
        return table

    @cached_property
    def palette(self) -> np.ndarray:
        """uint8 [256, 3] RGB by train id, black for all other values."""
        table = np.zeros((256, 3), np.uint8)
        for train_id, c in enumerate(self.trained):
            table[train_id] = c.color
        return table

    @property
    def categories(self) -> dict[str, list[int]]:
        """Category name to its train ids, in order of appearance; empty if the set has none."""
        groups: dict[str, list[int]] = {}
        for train_id, c in enumerate(self.trained):
            if c.category:
                groups.setdefault(c.category, []).append(train_id)
        return groups

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "terms": self.terms, "classes": [asdict(c) for c in self.classes]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LabelSet:
        classes = tuple(LabelClass(**{**c, "color": tuple(c["color"])}) for c in data["classes"])
        return LabelSet(data["name"], classes, data.get("terms", ""))

    @property
    def mapping_digest(self) -> str:
        """SHA-256 over (id, train id, train name) of every class: the meaning of a mask's ids."""
        rows = sorted((c.id, c.train_id, c.name if c.train_id != IGNORE else "") for c in self.classes)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _cityscapes(rows: str) -> tuple[LabelClass, ...]:
    classes = []
    for row in rows.strip().splitlines():
        name, id_, train_id, category, instances, r, g, b = (cell.strip() for cell in row.split("|"))
        color = (int(r), int(g), int(b))
        classes.append(LabelClass(name, int(id_), int(train_id), color, category, instances == "y"))
    return tuple(classes)


# The labels of Cityscapes with the ids of its masks (the license plate's id, -1, never occurs in a labelIds image).
# Source: the data set's own label definition.
CITYSCAPES = LabelSet(
    "cityscapes",
    _cityscapes(
        """
        unlabeled            |  0 | 255 | void         | n |   0 |   0 |   0
        ego vehicle          |  1 | 255 | void         | n |   0 |   0 |   0
        rectification border |  2 | 255 | void         | n |   0 |   0 |   0
        out of roi           |  3 | 255 | void         | n |   0 |   0 |   0
        static               |  4 | 255 | void         | n |   0 |   0 |   0
        dynamic              |  5 | 255 | void         | n | 111 |  74 |   0
        ground               |  6 | 255 | void         | n |  81 |   0 |  81
        road                 |  7 |   0 | flat         | n | 128 |  64 | 128
        sidewalk             |  8 |   1 | flat         | n | 244 |  35 | 232
        parking              |  9 | 255 | flat         | n | 250 | 170 | 160
        rail track           | 10 | 255 | flat         | n | 230 | 150 | 140
        building             | 11 |   2 | construction | n |  70 |  70 |  70
        wall                 | 12 |   3 | construction | n | 102 | 102 | 156
        fence                | 13 |   4 | construction | n | 190 | 153 | 153
        guard rail           | 14 | 255 | construction | n | 180 | 165 | 180
        bridge               | 15 | 255 | construction | n | 150 | 100 | 100
        tunnel               | 16 | 255 | construction | n | 150 | 120 |  90
        pole                 | 17 |   5 | object       | n | 153 | 153 | 153
        polegroup            | 18 | 255 | object       | n | 153 | 153 | 153
        traffic light        | 19 |   6 | object       | n | 250 | 170 |  30
        traffic sign         | 20 |   7 | object       | n | 220 | 220 |   0
        vegetation           | 21 |   8 | nature       | n | 107 | 142 |  35
        terrain              | 22 |   9 | nature       | n | 152 | 251 | 152
        sky                  | 23 |  10 | sky          | n |  70 | 130 | 180
        person               | 24 |  11 | human        | y | 220 |  20 |  60
        rider                | 25 |  12 | human        | y | 255 |   0 |   0
        car                  | 26 |  13 | vehicle      | y |   0 |   0 | 142
        truck                | 27 |  14 | vehicle      | y |   0 |   0 |  70
        bus                  | 28 |  15 | vehicle      | y |   0 |  60 | 100
        caravan              | 29 | 255 | vehicle      | y |   0 |   0 |  90
        trailer              | 30 | 255 | vehicle      | y |   0 |   0 | 110
        train                | 31 |  16 | vehicle      | y |   0 |  80 | 100
        motorcycle           | 32 |  17 | vehicle      | y |   0 |   0 | 230
        bicycle              | 33 |  18 | vehicle      | y | 119 |  11 |  32
        """
    ),
    terms="Cityscapes terms of use: non-commercial research; see the data set's licence.",
)

_CAMVID_ROWS = (
    ("sky", (128, 128, 128), "sky"),
    ("building", (128, 0, 0), "construction"),
    ("pole", (192, 192, 128), "object"),
    ("road", (128, 64, 128), "flat"),
    ("pavement", (60, 40, 222), "flat"),
    ("tree", (128, 128, 0), "nature"),
    ("sign", (192, 128, 128), "object"),
    ("fence", (64, 64, 128), "construction"),
    ("car", (64, 0, 128), "vehicle"),
    ("pedestrian", (64, 64, 0), "human"),
    ("bicyclist", (0, 128, 192), "human"),
)

# The 11-class form of CamVid at 480x360, as used by SegNet; id 11 is void.
CAMVID = LabelSet(
    "camvid",
    tuple(LabelClass(n, i, i, rgb, cat) for i, (n, rgb, cat) in enumerate(_CAMVID_ROWS))
    + (LabelClass("void", 11, IGNORE, (0, 0, 0)),),
    terms="CamVid: CC BY-NC 4.0, research use.",
)

# The town's masks use the Cityscapes ids, so that models of the two can be compared.
TOWN = LabelSet("cityscapes", CITYSCAPES.classes, terms="Rendered by roadseg; no third-party data, Apache-2.0.")

_TRAIN_IDS = {c.name: c.train_id for c in CITYSCAPES.trained}


def in_cityscapes(label_set: LabelSet) -> LabelSet:
    """The same classes and ids, with the train ids of the 19 Cityscapes classes they map to; void if they map to none.

    Train ids of the result may have gaps, so that `trained` may fail: it describes masks, while CITYSCAPES has the
    classes to learn.
    """
    return replace(label_set, classes=tuple(replace(c, train_id=_in_cityscapes(c)) for c in label_set.classes))


def _in_cityscapes(c: LabelClass) -> int:
    if c.train_id == IGNORE and c.cityscapes is None:
        return IGNORE
    return _TRAIN_IDS.get(c.name if c.cityscapes is None else c.cityscapes, IGNORE)
