"""CamVid as published by its authors: 701 frames of 960x720, labels in 32 colors.

Supported trees; the first one found is read:
- 701_StillsRaw_full/*.png with LabeledApproved_full/*_L.png, also below images/ and labels/;
- images/*.png with labels/*_L.png;
- train/ with train_labels/, val/ with val_labels/, test/ with test_labels/, which has its own split.

Colors: the authors' label_colors.txt, as in several public copies that agree. Only their void is void here.
The first two trees are split by name as SegNet did (`segnet_split`), so that scores compare with those at
480x360. The third tree keeps its own split, whose scores compare with no others.
"""

from __future__ import annotations

import re
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.camvid import recording
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Files, Folders, gather, note, pair_up
from roadseg.labels import CAMVID, IGNORE, LabelClass, LabelSet

FORM_KIND: Kind = "colors"
LOOKED_FOR = "701_StillsRaw_full/ with LabeledApproved_full/*_L.png, images/ with labels/, or train/ with train_labels/"
SPLITS = ("train", "val", "test")
_FLAT = (
    ("701_StillsRaw_full", "LabeledApproved_full"),
    ("images/701_StillsRaw_full", "labels/LabeledApproved_full"),
    ("images/701_StillsRaw_full", "labels"),
    ("images", "labels"),
)
# name | color | category | Cityscapes train class. Trucks and buses share a class here, as do a bicyclist and the
# bicycle: they map to none.
_TABLE = """
Animal            |  64 128  64 | living       |
Archway           | 192   0 128 | construction |
Bicyclist         |   0 128 192 | human        |
Bridge            |   0 128  64 | construction |
Building          | 128   0   0 | construction | building
Car               |  64   0 128 | vehicle      | car
CartLuggagePram   |  64   0 192 | object       |
Child             | 192 128  64 | human        | person
Column_Pole       | 192 192 128 | object       | pole
Fence             |  64  64 128 | construction | fence
LaneMkgsDriv      | 128   0 192 | flat         | road
LaneMkgsNonDriv   | 192   0  64 | flat         | road
Misc_Text         | 128 128  64 | object       |
MotorcycleScooter | 192   0 192 | vehicle      | motorcycle
OtherMoving       | 128  64  64 | vehicle      |
ParkingBlock      |  64 192 128 | flat         |
Pedestrian        |  64  64   0 | human        | person
Road              | 128  64 128 | flat         | road
RoadShoulder      | 128 128 192 | flat         |
Sidewalk          |   0   0 192 | flat         | sidewalk
SignSymbol        | 192 128 128 | object       | traffic sign
Sky               | 128 128 128 | sky          | sky
SUVPickupTruck    |  64 128 192 | vehicle      | car
TrafficCone       |   0   0  64 | object       |
TrafficLight      |   0  64  64 | object       | traffic light
Train             | 192  64 128 | vehicle      | train
Tree              | 128 128   0 | nature       | vegetation
Truck_Bus         | 192 128 192 | vehicle      |
Tunnel            |  64   0  64 | construction |
VegetationMisc    | 192 192   0 | nature       | vegetation
Void              |   0   0   0 |              |
Wall              |  64 192   0 | construction | wall
"""


def _classes() -> tuple[LabelClass, ...]:
    classes: list[LabelClass] = []
    for id_, row in enumerate(_TABLE.strip().splitlines()):
        name, color, category, counts_as = (cell.strip() for cell in row.split("|"))
        r, g, b = (int(v) for v in color.split())
        train_id = IGNORE if name == "Void" else sum(c.train_id != IGNORE for c in classes)
        classes.append(LabelClass(name, id_, train_id, (r, g, b), category, cityscapes=counts_as))
    return tuple(classes)


LABEL_SET = LabelSet("camvid-32", _classes(), CAMVID.terms)
_FRAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)")


def segnet_split(name: str) -> str:
    """SegNet's split of a frame, from the recording and number in its name; "" for another kind of name.

    test is all of Seq05VD and 0001TP from frame 8550 on; val the odd frames 7959..8159 of 0016E5; train
    the rest. This reproduces SegNet's lists.
    """
    frame = _FRAME.fullmatch(name.rpartition("/")[2])
    if not frame:
        return ""
    drive, number = frame.group(1), int(frame.group(2))
    if drive == "Seq05VD" or (drive == "0001TP" and number >= 8550):
        return "test"
    return "val" if drive == "0016E5" and 7959 <= number <= 8159 and number % 2 else "train"


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split found; `sequence` is the recording, like 0016E5. Raises DataError without a tree."""
    flat = [row for row in _FLAT if all((root / folder).is_dir() for folder in row)]
    if flat:
        images, labels = flat[0]
        return _by_name(gather(root, [Folders(images, labels, "", "_L")]), images)
    splits = [s for s in SPLITS if (root / s).is_dir() and (root / f"{s}_labels").is_dir()]
    if not splits:
        raise missing_data_error(root, LOOKED_FOR)
    found, findings = [], []
    for split in splits:
        files = gather(root, [Folders(split, f"{split}_labels", "", "_L")])
        pairs_here, findings_here = pair_up(split, files, recording, f"{split}/", private_test=False)
        found += pairs_here
        findings += findings_here
    return found, findings


def _by_name(files: Files, folder: str) -> tuple[list[Pair], list[Finding]]:
    names = {name: segnet_split(name) for name in files.names}
    present = [s for s in SPLITS if s in names.values()]
    stray = tuple(sorted(path for name, paths in files.images.items() if not names[name] for path in paths))
    found: list[Pair] = []
    findings: list[Finding] = []
    if stray:
        message = f"{len(stray)} of the images have names of no CamVid frame and are in no split"
        findings.append(note("train", message, "name them as the data set does, 0016E5_08159.png", stray))
    if not present:
        present = ["train"]
    for split in present:
        here = files.where(lambda name, split=split: names[name] == split)  # type: ignore[misc]
        first = Files(here.images, here.labels, {}, files.unusable if split == present[0] else ())
        pairs_here, findings_here = pair_up(split, first, recording, f"{folder}/", private_test=False)
        found += pairs_here
        findings += findings_here
    return found, findings
