"""KITTI pixel-level semantics: 200 images of 2015 with Cityscapes ids, all of them in train.

training/image_2/000000_10.png with training/semantic/000000_10.png; testing/image_2 has no public labels.
There is no official validation split (cvlibs.net, eval_semseg): hold out sequences of train instead.
mapping/train_mapping.txt of the scene-flow development kit, which has the same images, gives each frame's drive:
line 10, counted from 0, is for 000010_10.png and begins "2011_09_26 2011_09_26_drive_0009_sync". With that folder
below the root, `sequence` is the drive. Without it, and for empty lines, it is the frame's number, so that
single frames can be held out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from roadseg.data.masks.form import Kind
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import Pair, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, note, pair_up
from roadseg.labels import CITYSCAPES

LABEL_SET = replace(CITYSCAPES, terms="KITTI: CC BY-NC-SA 3.0, non-commercial.")
FORM_KIND: Kind = "ids"
LOOKED_FOR = "training/image_2/*.png with training/semantic/*.png"
MAPPINGS = ("mapping/train_mapping.txt", "devkit/mapping/train_mapping.txt")


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of train. Raises DataError for a root without training/image_2."""
    if not (root / "training/image_2").is_dir():
        raise missing_data_error(root, LOOKED_FOR)
    drives = _drives(root)
    train = gather(root, [Folders("training/image_2", "training/semantic")])
    found, findings = pair_up("train", train, lambda name: drives.get(_frame(name), _frame(name)), "training/image_2/")
    message = "KITTI has no official val; all labelled frames are train"
    fix = "name some of its sequences in data.holdout_sequences, and set data.split to holdout"
    findings.append(note("train", message + ("" if drives else ", each a sequence of its own"), fix))
    if (root / "testing/image_2").is_dir():
        tested = gather(root, [Folders("testing/image_2", "testing/semantic")])
        found_test, findings_test = pair_up("test", tested, _frame, "testing/image_2/")
        found += found_test
        findings += findings_test
    return found, findings


def _frame(name: str) -> str:
    return name.rpartition("/")[2].partition("_")[0]


def _drives(root: Path) -> dict[str, str]:
    """Drive by frame number (six digits); empty without the mapping file."""
    path = next((root / m for m in MAPPINGS if (root / m).is_file()), None)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    fields = ((number, line.split()) for number, line in enumerate(lines))
    return {f"{number:06d}": words[1] for number, words in fields if len(words) == 3 and words[1].isprintable()}
