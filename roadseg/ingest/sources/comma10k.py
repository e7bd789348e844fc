"""comma10k: frames of many drivers' cameras with color masks (README of commaai/comma10k).

imgs/*.png with masks/*.png, and the later imgs2/*.png with masks2/*.png, where each frame also has a fisheye
frame (names with _e_ and _f_). val is the images whose name ends in 9, as in the README; an e frame and its
f frame are in the same split. imgsd, the camera that faces the driver, is left out, and with it the sixth
class, which occurs only there. Not all of imgs2 is labeled: its images without a mask are left out with a note.
"""

from __future__ import annotations

import re
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Files, Folders, gather, note, pair_up
from roadseg.labels import IGNORE, LabelClass, LabelSet

# Only road has a Cityscapes counterpart: "movable" is people and all vehicles, "undrivable" everything else.
LABEL_SET = LabelSet(
    "comma10k",
    (
        LabelClass("road", 1, 0, (0x40, 0x20, 0x20), "drivable", cityscapes="road"),
        LabelClass("lane markings", 2, 1, (0xFF, 0x00, 0x00), "drivable", cityscapes="road"),
        LabelClass("undrivable", 3, 2, (0x80, 0x80, 0x60), "undrivable", cityscapes=""),
        LabelClass("movable", 4, 3, (0x00, 0xFF, 0x66), "movable", cityscapes=""),
        LabelClass("my car", 5, 4, (0xCC, 0x00, 0xFF), "my car", cityscapes=""),
        LabelClass("movable in my car", 6, IGNORE, (0x00, 0xCC, 0xFF), cityscapes=""),
    ),
    "comma10k: MIT licence.",
)
FORM_KIND: Kind = "colors"
LOOKED_FOR = "imgs/*.png with masks/*.png"
_SETS = (Folders("imgs", "masks"), Folders("imgs2", "masks2", prefix="imgs2/"))
_ROUTE = re.compile(r"\d+_(?:[ef]_)?([0-9a-f]{16}_\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d)_.*")


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of train and val; `sequence` is device and start time. Raises DataError if there is no imgs."""
    present = [f for f in _SETS if (root / f.images).is_dir()]
    if not present:
        raise missing_data_error(root, LOOKED_FOR)
    files = gather(root, present)
    findings = []
    bare = {name for name in files.images if name.startswith("imgs2/") and name not in files.labels}
    if bare:
        paths = tuple(sorted(path for name in bare for path in files.images[name]))
        message = f"{plural(len(paths), 'image')} of imgs2 without a mask left out"
        findings.append(note("train", message, "nothing: imgs2 is not labelled throughout", paths))
    found: list[Pair] = []
    for split in ("train", "val"):
        here = files.where(lambda name, split=split: name not in bare and _split(name) == split)  # type: ignore[misc]
        here = Files(here.images, here.labels, {}, files.unusable if split == "train" else ())
        pairs_here, findings_here = pair_up(split, here, _sequence, "imgs/")
        found += pairs_here
        findings += findings_here
    return found, findings


def _split(name: str) -> str:
    return "val" if name.endswith("9") else "train"


def _sequence(name: str) -> str:
    route = _ROUTE.fullmatch(name.rpartition("/")[2])
    return route.group(1) if route else ""
