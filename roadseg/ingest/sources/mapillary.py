"""Mapillary Vistas 1.2 and 2.0: 18,000 training, 2,000 validation and 5,000 test images.

training/images/*.jpg with training/v1.2/labels/*.png or training/v2.0/labels/*.png, and likewise validation/;
packages before v2.0 have training/labels/ with the labels of v1.2. Labels are palette PNGs whose indexes are
positions in the class table (mapillary_classes.py). training is read as train, validation as val; testing has
no public labels. The 16-bit instance maps use another numbering than Cityscapes and are not read.
File names are random, so `sequence` is empty.
"""

from __future__ import annotations

from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.mapillary_classes import V1_2, V2_0
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, pair_up

LABEL_SET = V2_0
LABEL_SET_V1_2 = V1_2
FORM_KIND: Kind = "ids"
_SPLITS = {"train": "training", "val": "validation", "test": "testing"}


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split, with the labels of v2.0. Raises DataError for a root without them."""
    return _pairs(root, ("v2.0/labels",))


def pairs_v1_2(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split, with the labels of v1.2. Raises DataError for a root without them."""
    return _pairs(root, ("v1.2/labels", "labels"))


def _pairs(root: Path, label_folders: tuple[str, ...]) -> tuple[list[Pair], list[Finding]]:
    labels = next((f for f in label_folders if any((root / s / f).is_dir() for s in _SPLITS.values())), "")
    splits = [split for split, folder in _SPLITS.items() if (root / folder / "images").is_dir()]
    if not splits or not labels:
        folders_text = " or ".join(f"<training|validation>/{f}/*.png" for f in label_folders)
        raise missing_data_error(root, f"<training|validation>/images/*.jpg with {folders_text}")
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in splits:
        folder = _SPLITS[split]
        files = gather(root, [Folders(f"{folder}/images", f"{folder}/{labels}")])
        pairs_here, findings_here = pair_up(split, files, lambda name: "", f"{folder}/images/")
        found += pairs_here
        findings += findings_here
    return found, findings
