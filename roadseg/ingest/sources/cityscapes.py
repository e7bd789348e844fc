"""The official Cityscapes tree, fine or coarse labels; the rendered town writes the same tree.

Ids, names and tree: the data set's own scripts (mcordts/cityscapesScripts). Fine: train 2,975, val 500,
test 1,525 images whose public labels are placeholders. Coarse: train 2,975, val 500 and train_extra
19,998 images of other cities.

`cityscapes-coarse` reads train_extra as train, so that it can be mixed with the fine set, or precede it, without
duplicate images; val is the same 500 images with fine labels. If either is missing, coarse train or coarse val is
read instead, with a finding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Files, Folders, gather, note, pair_up
from roadseg.labels import CITYSCAPES, IGNORE, LabelClass, LabelSet

LABEL_SET = CITYSCAPES
FORM_KIND: Kind = "ids"
LOOKED_FOR = (
    "leftImg8bit/<train|val|test>/<city>/*_leftImg8bit.png with gtFine/<train|val|test>/<city>/*_gtFine_labelIds.png"
)
LOOKED_FOR_COARSE = (
    "leftImg8bit/<train_extra|train|val>/<city>/*_leftImg8bit.png with "
    "gtCoarse/<train_extra|train|val>/<city>/*_gtCoarse_labelIds.png"
)
# A frame of train_extra that is black and entirely void; the download page says to delete it.
BROKEN = "troisdorf/troisdorf_000000_000073"
_FRAME = re.compile(r"(?:.*/)?(.+_\d+)_\d+")  # city_sequence_frame
_IMAGE = "_leftImg8bit"


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split found; `sequence` is city_sequence, like aachen_000000.

    A test split without labels is left out with a warning. Raises DataError if there is no split.
    """
    splits = [s for s in ("train", "val", "test") if (root / "leftImg8bit" / s).is_dir()]
    if not splits:
        raise missing_data_error(root, LOOKED_FOR)
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in splits:
        pairs_here, findings_here = _paired(split, gather(root, [_folders(split, "gtFine")]))
        found += pairs_here
        findings += findings_here
    return found, findings


def coarse_pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """Like `pairs`, for train_extra and val (see the module). Raises DataError without coarse labels."""
    extra = (root / "leftImg8bit/train_extra").is_dir()
    sources = {"train": "train_extra" if extra else "train", "val": "val"}
    splits = [split for split, folder in sources.items() if (root / "leftImg8bit" / folder).is_dir()]
    if not splits or not (root / "gtCoarse").is_dir():
        raise missing_data_error(root, LOOKED_FOR_COARSE)
    fine_val = (root / "gtFine/val").is_dir()
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in splits:
        labels = "gtFine" if split == "val" and fine_val else "gtCoarse"
        files = gather(root, [_folders(sources[split], labels)])
        broken = tuple(files.images.get(BROKEN, ()))
        if broken:
            message = "1 frame of train_extra is left out: black, its label void, as the data set's owners say"
            findings.append(note(split, message, "nothing, or delete it", broken))
            files = replace(files.where(lambda name: name != BROKEN), unusable=files.unusable)
        pairs_here, findings_here = _paired(split, files)
        found += pairs_here
        findings += findings_here
    return found, findings + _stand_ins(splits, extra, fine_val)


def _stand_ins(splits: Sequence[str], extra: bool, fine_val: bool) -> list[Finding]:
    findings = []
    if "train" in splits and not extra:
        message = "train_extra's images are not there; train is the frames of the fine set, with coarse labels"
        fix = "add leftImg8bit/train_extra (leftImg8bit_trainextra.zip); don't mix this one with the fine set"
        findings.append(note("train", message, fix))
    if "val" in splits and not fine_val:
        message = "val has coarse labels: its scores compare with nobody's"
        findings.append(note("val", message, "add gtFine/val (gtFine_trainvaltest.zip)"))
    return findings


def _folders(split: str, labels: str) -> Folders:
    return Folders(f"leftImg8bit/{split}", f"{labels}/{split}", _IMAGE, f"_{labels}_labelIds", f"_{labels}_instanceIds")


def _paired(split: str, files: Files) -> tuple[list[Pair], list[Finding]]:
    return pair_up(split, files, sequence, f"leftImg8bit/{split}/<city>/ named *_leftImg8bit.png")


def sequence(name: str) -> str:
    """city_sequence of city/city_sequence_frame; the file name if it has another form."""
    frame = _FRAME.fullmatch(name)
    return frame.group(1) if frame else name.rpartition("/")[2]


def train_id_set(name: str, terms: str) -> LabelSet:
    """Label set of masks that contain the 19 train ids themselves, and 255 for void."""
    learned = tuple(
        LabelClass(c.name, c.train_id, c.train_id, c.color, c.category, c.has_instances, c.name)
        for c in CITYSCAPES.trained
    )
    return LabelSet(name, (*learned, LabelClass("void", 255, IGNORE, (0, 0, 0))), terms)
