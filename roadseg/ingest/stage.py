"""The stage: a source and its root in, a checked manifest out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from roadseg.config import Data
from roadseg.data.manifest import Manifest
from roadseg.errors import ConfigError, DataError
from roadseg.files import json_bytes, sha256_bytes, sha256_file, write_json
from roadseg.images import Limits
from roadseg.ingest import camvid, cityscapes, folder
from roadseg.ingest.checks import check, listed, refusal
from roadseg.ingest.findings import Finding
from roadseg.ingest.pairs import Pair
from roadseg.labels import CAMVID, CITYSCAPES, TOWN, LabelSet
from roadseg.processes import cores
from roadseg.progress import progress

VERSION = 1
HOLDOUT = "holdout"

log = logging.getLogger(__name__)


def ingest(data: Data, root: Path, work: Path, only_splits: tuple[str, ...] = ()) -> Manifest:
    """Pairs, decodes and checks the data, and writes manifest.jsonl, dataset.json and findings.json into `work`.

    root: of the data; the town's is work/"tree", into which it is rendered first. only_splits: look at
    no others, so that a root with only these is enough; () means all. Warnings are logged. Raises
    DataError with every error found, after writing findings.json only.
    """
    if data.source == "town":
        root = work / "tree"
        _render(data, root)
    pairs, findings, label_set = _source(data, root)
    wanted = set(only_splits)
    if data.holdout_sequences and (not wanted or wanted & {"train", HOLDOUT}):
        pairs = _hold_out(pairs, data.holdout_sequences)
    if wanted:
        _require(wanted, {p.split for p in pairs} | {f.split for f in findings}, root)
        pairs = [p for p in pairs if p.split in wanted]
        findings = [f for f in findings if f.split in wanted]
    limits = Limits(data.max_file_bytes, data.max_image_pixels)
    unlabelled = "test" if data.source == "cityscapes" else ""
    samples, found = check(root, pairs, label_set, limits, data.workers, unlabelled)
    findings += found
    write_json(work / "findings.json", [asdict(f) for f in findings])
    if any(f.severity == "error" for f in findings):
        raise refusal(root, findings)
    if not samples:
        raise DataError("no pair of image and label is left", where=str(root), todo="add data, or choose other splits")
    for f in findings:
        log.warning("%s: %s\n%s    %s", f.code, f.message, listed(f, "      "), f.fix)
    manifest = Manifest(data.source, label_set, samples)
    manifest.save(work)
    return manifest


def source_digest(data: Data, root: Path) -> str:
    """SHA-256 that changes when the files that the source would read change, without reading them.

    It covers path, size and modification time of every paired file, the pairing's findings, and the
    content of the data.labels YAML. A constant for the town. Raises what `ingest` would for a wrong root.
    """
    if data.source == "town":
        return sha256_bytes(b"town")
    pairs, findings, label_set = _source(data, root)
    files = sorted({path for p in pairs for path in (p.image, p.label, p.instances) if path})
    stats = [(path, (root / path).stat()) for path in files]
    described = sha256_file(data.labels) if data.source == "folder" and data.labels else label_set.mapping_digest
    rows = [(path, s.st_size, s.st_mtime_ns) for path, s in stats]
    return sha256_bytes(json_bytes([rows, [asdict(f) for f in findings], described]))


def _source(data: Data, root: Path) -> tuple[list[Pair], list[Finding], LabelSet]:
    if data.source == "camvid":
        return *camvid.pairs(root), CAMVID
    if data.source == "folder":
        if data.labels is None:
            raise ConfigError("source 'folder' without data.labels", expected="a YAML of its classes and folders")
        description = folder.read_description(data.labels)
        return *folder.pairs(root, description), description.label_set
    return *cityscapes.pairs(root), TOWN if data.source == "town" else CITYSCAPES


def _render(data: Data, tree: Path) -> None:
    """Every split, also when only one is asked for: which scenes a split has depends on those before it."""
    from roadseg.ingest import town  # only the town needs its renderer

    splits = {split: n for split in ("train", "val", "test") if (n := getattr(data.town, split))}
    with progress(sum(splits.values()), "render the town", "frames") as bar:
        town.write_tree(
            tree, splits, data.town.seed, data.town.width_px, data.town.height_px, data.town.weather,
            data.workers or cores(), bar.update,
        )  # fmt: skip


def _hold_out(pairs: Sequence[Pair], sequences: Sequence[str]) -> list[Pair]:
    there = sorted({p.sequence for p in pairs if p.split == "train" and p.sequence})
    unknown = [s for s in sequences if s not in there]
    if unknown:
        raise DataError(
            f"train has no sequence {', '.join(unknown)}",
            expected=f"some of {', '.join(there) or '(no sequences are known: set `sequence` in data.labels)'}",
            where="data.holdout_sequences",
        )
    if set(there) <= set(sequences) and all(p.sequence for p in pairs if p.split == "train"):
        raise DataError(
            "holds out every sequence of train",
            expected="at least one that is left to learn from",
            where="data.holdout_sequences",
        )
    return [replace(p, split=HOLDOUT) if p.split == "train" and p.sequence in sequences else p for p in pairs]


def _require(wanted: set[str], there: set[str], root: Path) -> None:
    if missing := sorted(wanted - there):
        raise DataError(
            f"the data has no split {', '.join(missing)}",
            expected=f"one of {', '.join(sorted(there - {''})) or 'none'}",
            where=str(root),
            todo="set data.split, or point data.root elsewhere",
        )
