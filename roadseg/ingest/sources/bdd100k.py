"""BDD100K's 10,000 images with masks: train 7,000, val 1,000, test 2,000 without public labels.

Masks hold the 19 Cityscapes train ids, 255 void. Trees (the toolkit's doc/source/download.rst):
images/10k/<split>/*.jpg with labels/sem_seg/masks/<split>/*.png; or the layout of 2018, seg/images/<split>/
*.jpg with seg/labels/<split>/*_train_id.png. Both may be in a folder bdd100k/ below the root.
File names do not reveal the drive, so `sequence` is empty.
"""

from __future__ import annotations

from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.cityscapes import train_id_set
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, pair_up

LABEL_SET = train_id_set(
    "bdd100k",
    "BDD100K, (c) 2018 The Regents of the University of California: education, research and not-for-profit "
    "purposes; commercial use by licence.",
)
FORM_KIND: Kind = "ids"
LOOKED_FOR = (
    "images/10k/<train|val>/*.jpg with labels/sem_seg/masks/<train|val>/*.png, "
    "or seg/images/<train|val>/*.jpg with seg/labels/<train|val>/*_train_id.png"
)
_TREES = (("images/10k", "labels/sem_seg/masks", ""), ("seg/images", "seg/labels", "_train_id"))


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split found. Raises DataError for a root without the 10K images."""
    trees = [(base + images, base + labels, suffix) for base in ("", "bdd100k/") for images, labels, suffix in _TREES]
    present = [row for row in trees if any((root / row[0] / split).is_dir() for split in ("train", "val", "test"))]
    if not present:
        raise missing_data_error(root, LOOKED_FOR)
    images, labels, suffix = present[0]
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in ("train", "val", "test"):
        if not (root / images / split).is_dir():
            continue
        files = gather(root, [Folders(f"{images}/{split}", f"{labels}/{split}", "", suffix)])
        pairs_here, findings_here = pair_up(split, files, lambda name: "", f"{images}/{split}/")
        found += pairs_here
        findings += findings_here
    return found, findings
