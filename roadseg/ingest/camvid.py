"""CamVid in the form that SegNet made known: train/ and trainannot/, val/ and valannot/, test/ and testannot/."""

from __future__ import annotations

from pathlib import Path

from roadseg.ingest.findings import Finding
from roadseg.ingest.pairs import Pair, below, by_key, empty, match, not_there, pictures, unusable_names

LOOKED_FOR = "train/ with trainannot/, val/ with valannot/, or test/ with testannot/"


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split there is; `sequence` is the name up to its first "_", as in 0016E5.

    Raises DataError if there is no split at all.
    """
    splits = [s for s in ("train", "val", "test") if (root / s).is_dir()]
    if not splits:
        raise not_there(root, LOOKED_FOR)
    found, findings = [], []
    for split in splits:
        image_paths, bad_images = pictures(root, split)
        label_paths, bad_labels = pictures(root, f"{split}annot")
        findings += unusable_names(split, bad_images + bad_labels)
        if not image_paths:
            findings.append(empty(split, f"{split}/"))
        images = by_key(image_paths, lambda p, folder=split: below(folder, p))  # type: ignore[misc]
        labels = by_key(label_paths, lambda p, folder=f"{split}annot": below(folder, p))  # type: ignore[misc]
        matched, wrong = match(split, images, labels)
        findings += wrong
        for key, image, label in matched:
            found.append(Pair(split, key, key.rpartition("/")[2].partition("_")[0], image, label))
    return found, findings
