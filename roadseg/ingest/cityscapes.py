"""The official Cityscapes tree with fine labels; the rendered town writes the same."""

from __future__ import annotations

import re
from pathlib import Path

from roadseg.ingest.findings import Finding, plural
from roadseg.ingest.pairs import Pair, by_key, empty, match, not_there, pictures, unusable_names

LOOKED_FOR = (
    "leftImg8bit/<train|val|test>/<city>/*_leftImg8bit.png with gtFine/<train|val|test>/<city>/*_gtFine_labelIds.png"
)
_FRAME = re.compile(r"(?:.*/)?(.+_\d+)_\d+")  # city_sequence_frame


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split there is; `sequence` is city_sequence, as in aachen_000000.

    A test split without any labels, as the official one is published by some, is left out with a warning.
    Raises DataError if there is no split at all.
    """
    splits = [s for s in ("train", "val", "test") if (root / "leftImg8bit" / s).is_dir()]
    if not splits:
        raise not_there(root, LOOKED_FOR)
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in splits:
        pairs_here, findings_here = _split_pairs(root, split)
        found += pairs_here
        findings += findings_here
    return found, findings


def _split_pairs(root: Path, split: str) -> tuple[list[Pair], list[Finding]]:
    image_paths, bad_images = pictures(root, f"leftImg8bit/{split}")
    label_paths, bad_labels = pictures(root, f"gtFine/{split}")
    images = by_key(image_paths, lambda p: _key(f"leftImg8bit/{split}", p, "_leftImg8bit"))
    labels = by_key(label_paths, lambda p: _key(f"gtFine/{split}", p, "_gtFine_labelIds"))
    instances = by_key(label_paths, lambda p: _key(f"gtFine/{split}", p, "_gtFine_instanceIds"))
    findings = unusable_names(split, bad_images + bad_labels)
    if not images:
        return [], [*findings, empty(split, f"leftImg8bit/{split}/<city>/ named *_leftImg8bit.png")]
    if not labels and split == "test":
        message = f"{plural(len(images), 'image')} of test, and no labels; test is left out"
        fix = "nothing, if its labels are not public; its scores come from the benchmark's server"
        return [], [*findings, Finding("no-labels", "warning", split, (), len(images), message, fix)]
    matched, wrong = match(split, images, labels)
    found = [Pair(split, k, _sequence(k), image, label, instances.get(k, [""])[0]) for k, image, label in matched]
    without = tuple(p.label for p in found if not p.instances)
    if instances and without:
        message = f"{plural(len(without), 'label')} of {split} without instanceIds, while others have them"
        fix = "add the *_gtFine_instanceIds.png files; instance scores leave these images out"
        wrong.append(Finding("missing-instances", "warning", split, without, len(without), message, fix))
    return found, findings + wrong


def _key(folder: str, path: str, ending: str) -> str | None:
    stem = path.removeprefix(folder + "/").rpartition(".")[0]
    return stem.removesuffix(ending) if stem.endswith(ending) else None


def _sequence(name: str) -> str:
    frame = _FRAME.fullmatch(name)
    return frame.group(1) if frame else name.rpartition("/")[2]
