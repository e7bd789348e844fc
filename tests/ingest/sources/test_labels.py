"""The sources' label sets: number of classes, void, and the mapping to the 19 of Cityscapes."""

import re
from pathlib import Path
from typing import get_args

import pytest

from roadseg.config.sections import Source
from roadseg.ingest.sources import (
    acdc,
    bdd100k,
    camvid,
    camvid_colors,
    cityscapes,
    comma10k,
    idd,
    kitti,
    mapillary,
)  # fmt: skip
from roadseg.labels import CAMVID, CITYSCAPES, IGNORE, LabelSet, in_cityscapes

COMMON = {c.name for c in CITYSCAPES.trained}
# label set, classes in the masks, classes learned, Cityscapes classes reached
SETS = {
    "cityscapes": (cityscapes.LABEL_SET, 34, 19, 19),
    "acdc": (acdc.LABEL_SET, 34, 19, 19),
    "kitti": (kitti.LABEL_SET, 34, 19, 19),
    "bdd100k": (bdd100k.LABEL_SET, 20, 19, 19),
    "camvid": (camvid.LABEL_SET, 12, 11, 10),
    "camvid-32": (camvid_colors.LABEL_SET, 32, 31, 14),
    "mapillary-v1.2": (mapillary.LABEL_SET_V1_2, 66, 65, 19),
    "mapillary-v2": (mapillary.LABEL_SET, 124, 116, 19),
    "idd": (idd.LABEL_SET, 40, 26, 19),
    "idd level 3": (idd.LEVEL3, 27, 26, 18),
    "idd train ids": (idd.TRAIN_IDS, 20, 19, 19),
    "comma10k": (comma10k.LABEL_SET, 6, 5, 1),
}


@pytest.mark.parametrize(("labels", "classes", "learned", "reached"), SETS.values(), ids=SETS)
def test_classes_and_their_cityscapes_counterparts(labels: LabelSet, classes: int, learned: int, reached: int):
    assert (len(labels.classes), labels.num_classes) == (classes, learned)
    assert len({c.id for c in labels.classes}) == classes and len(set(labels.names)) == learned
    assert all(0 <= c.id <= 255 for c in labels.classes)
    named = {c.cityscapes for c in labels.classes if c.cityscapes}
    assert named <= COMMON
    mapped = {c.train_id for c in in_cityscapes(labels).classes} - {IGNORE}
    assert len(mapped) == reached
    assert labels.terms and labels.terms.endswith(".")
    assert LabelSet.from_json(labels.to_json()) == labels


def counts_as(labels: LabelSet, name: str) -> str:
    train_id = next(c.train_id for c in in_cityscapes(labels).classes if c.name == name)
    return CITYSCAPES.names[train_id] if train_id != IGNORE else ""


@pytest.mark.parametrize(
    ("labels", "name", "expected"),
    [
        (mapillary.LABEL_SET, "Person Group", "person"),  # not learned natively, but a person
        (mapillary.LABEL_SET, "Lane Marking - Stop Line", "road"),
        (mapillary.LABEL_SET, "Traffic Sign (Back)", ""),
        (mapillary.LABEL_SET_V1_2, "On Rails", "train"),
        (mapillary.LABEL_SET_V1_2, "Curb", "sidewalk"),
        (idd.LABEL_SET, "non-drivable fallback", "terrain"),
        (idd.LABEL_SET, "polegroup", ""),
        (idd.LABEL_SET, "train", "train"),
        (idd.LEVEL3, "vehicle fallback", ""),
        (camvid.LABEL_SET, "pavement", "sidewalk"),
        (camvid.LABEL_SET, "bicyclist", ""),
        (camvid_colors.LABEL_SET, "LaneMkgsDriv", "road"),
        (camvid_colors.LABEL_SET, "Truck_Bus", ""),
        (comma10k.LABEL_SET, "movable", ""),
        (bdd100k.LABEL_SET, "bicycle", "bicycle"),
    ],
)
def test_single_classes_in_the_common_taxonomy(labels, name, expected):
    assert counts_as(labels, name) == expected


def test_mapillarys_tables_agree_where_both_have_a_class():
    old = {c.name: c for c in mapillary.LABEL_SET_V1_2.classes}
    new = {c.name: c for c in mapillary.LABEL_SET.classes}
    shared = old.keys() & new.keys()
    assert old.keys() - shared == {"Lane Marking - General", "Billboard", "Traffic Light"}  # split further in 2.0
    differ = {n for n in shared if (old[n].color, old[n].category) != (new[n].color, new[n].category)}
    assert differ == {"Lane Marking - Crosswalk"}  # new color in 2.0
    assert all(old[n].cityscapes == new[n].cityscapes for n in shared)
    assert [new[n].id for n in ("Bird", "Road", "Traffic Cone", "Truck", "Unlabeled")] == [0, 21, 89, 114, 123]
    assert [old[n].id for n in ("Bird", "Road", "Traffic Light", "Unlabeled")] == [0, 13, 48, 65]


def test_mapillary_learns_what_its_owners_evaluate():
    left_out = [c.name for c in mapillary.LABEL_SET.classes if c.train_id == IGNORE]
    assert left_out == [
        "Ambiguous Barrier", "Person Group", "Lane Marking - Ambiguous", "Signage - Ambiguous", "Pole Group",
        "Traffic Sign - Ambiguous", "Vehicle Group", "Unlabeled",
    ]  # fmt: skip
    assert [c.name for c in mapillary.LABEL_SET_V1_2.classes if c.train_id == IGNORE] == ["Unlabeled"]


def test_the_forms_of_idd_learn_the_same_classes():
    assert idd.LEVEL3.names == idd.LABEL_SET.names
    assert [c.id for c in idd.LEVEL3.trained] == list(range(26))
    merged = {c.name: idd.LABEL_SET.names[c.train_id] for c in idd.LABEL_SET.classes if c.train_id != IGNORE}
    assert {name: into for name, into in merged.items() if name != into} == {
        "parking": "drivable fallback", "rail track": "non-drivable fallback", "animal": "person",
        "caravan": "vehicle fallback", "trailer": "vehicle fallback", "train": "vehicle fallback",
        "polegroup": "pole", "tunnel": "bridge", "fallback background": "sky",
    }  # fmt: skip


def test_train_id_masks_hold_the_order_of_cityscapes():
    assert bdd100k.LABEL_SET.names == CITYSCAPES.names
    assert [c.id for c in bdd100k.LABEL_SET.trained] == list(range(19))
    assert 255 in bdd100k.LABEL_SET.known_ids


def test_camvids_mapping_changes_nothing_else():
    assert camvid.LABEL_SET.mapping_digest == CAMVID.mapping_digest


def test_the_docs_list_every_source():
    guide = (Path(__file__).parents[3] / "docs/datasets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9.-]+)` \|", guide, re.MULTILINE)
    assert rows == ["data.source", *get_args(Source)]
