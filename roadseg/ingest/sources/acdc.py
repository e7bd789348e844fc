"""ACDC, the Adverse Conditions Dataset: fog, night, rain and snow, with Cityscapes ids.

rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png with gt/<condition>/<split>/<sequence>/
*_gt_labelIds.png, unpacked together or in folders named like their packages (rgb_anon_trainvaltest,
gt_trainval). 4,006 images (Sakaridis et al., ICCV 2021): train and val have public labels, test has none.
The reference frames in good weather (train_ref, ...) are left out. Tree and names follow several public
loaders; the owners' development kit was not available.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, pair_up
from roadseg.labels import CITYSCAPES

LABEL_SET = replace(CITYSCAPES, terms="ACDC licence: non-commercial research; see acdc.vision.ee.ethz.ch.")
FORM_KIND: Kind = "ids"
CONDITIONS = ("fog", "night", "rain", "snow")
LOOKED_FOR = (
    "rgb_anon/<fog|night|rain|snow>/<train|val>/<sequence>/*_rgb_anon.png with "
    "gt/<fog|night|rain|snow>/<train|val>/<sequence>/*_gt_labelIds.png"
)
_IMAGES = ("rgb_anon", "rgb_anon_trainvaltest/rgb_anon")
_LABELS = ("gt", "gt_trainval/gt")


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split and condition found; `sequence` is like fog/GOPR0475.

    Raises DataError if there are none.
    """
    images = next((f for f in _IMAGES if (root / f).is_dir()), _IMAGES[0])
    labels = next((f for f in _LABELS if (root / f).is_dir()), _LABELS[0])
    found: list[Pair] = []
    findings: list[Finding] = []
    present = False
    for split in ("train", "val", "test"):
        conditions = [c for c in CONDITIONS if (root / images / c / split).is_dir()]
        if not conditions:
            continue
        present = True
        folders = [
            Folders(f"{images}/{c}/{split}", f"{labels}/{c}/{split}", "_rgb_anon", "_gt_labelIds", prefix=f"{c}/")
            for c in conditions
        ]
        looked_for = f"{images}/<condition>/{split}/<sequence>/ named *_rgb_anon.png"
        pairs_here, findings_here = pair_up(split, gather(root, folders), _sequence, looked_for)
        found += pairs_here
        findings += findings_here
    if not present:
        raise missing_data_error(root, LOOKED_FOR)
    return found, findings


def _sequence(name: str) -> str:
    """condition/sequence of condition/sequence/frame."""
    return name.rpartition("/")[0]
