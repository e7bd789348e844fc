"""The ingest stage: reads a source below its root, checks all files, writes a manifest."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from roadseg.config.sections import Data
from roadseg.data.manifest import HOLDOUT, Manifest
from roadseg.data.masks.read import mask_path
from roadseg.errors import ConfigError, DataError
from roadseg.files import json_bytes, lock, sha256_bytes, write_atomic, write_json
from roadseg.images.decode import Limits
from roadseg.ingest.checks.findings import Finding, require_codes, with_severity
from roadseg.ingest.checks.judge import Checked, check, format_files, refusal
from roadseg.ingest.measure import Task, worker_pool
from roadseg.ingest.report.page import render
from roadseg.ingest.sources.pairs import Pair
from roadseg.ingest.sources.select import Found, find, limits_of, mixed_root
from roadseg.processes import cores
from roadseg.progress import progress

VERSION = 2
REPORT = "data_report.html"

log = logging.getLogger(__name__)


def ingest(
    data: Data, root: Path, work: Path, only_splits: tuple[str, ...] = (), report_in: Path | None = None
) -> Manifest:
    """Pair, decode and check the data; write manifest.jsonl, dataset.json and findings.json into `work`.

    root: the data's folder; ignored for the town, which is rendered into work/"tree". only_splits: read only
    these, so that a root with only these suffices; () means all. All findings are shown in log/data_report.html
    and in a copy below `report_in`, which survives when the data is refused. Warnings are logged. Raises DataError
    that lists all errors; then only findings.json and the report have been written.
    """
    require_codes(data.allow, data.forbid)
    if data.source == "town":
        root = work / "tree"
        _render(data, root)
    found = _select_splits(data, find(data, root), set(only_splits), root)
    limits = limits_of(data)
    allow, forbid = frozenset(data.allow), frozenset(data.forbid)
    unlabelled = {("test", name) for name, source in _sources(data).items() if source.startswith("cityscapes")}
    task = Task(root, found.forms, limits, found.label_set.num_classes)
    with worker_pool(task, len(found.pairs), data.workers) as pool:
        checked = check(
            root, found.pairs, found.label_set, found.forms, limits, data.workers, unlabelled,
            allow=allow, forbid=forbid, pool=pool,
        )  # fmt: skip
        findings = [*with_severity(found.findings, allow, forbid), *checked.findings]
        write_json(work / "findings.json", [asdict(f) for f in findings])
        report = _report(data, found, root, limits, checked, findings, work, report_in, pool)
    if any(f.severity == "error" for f in findings):
        raise refusal(_where(data, root), findings, report if report_in else None)
    for f in findings:
        log.warning("%s: %s\n%s    %s", f.code, f.message, format_files(f, "      "), f.fix)
    if not checked.samples:
        raise DataError(
            "no pair of image and label is left",
            where=str(_where(data, root)),
            todo=f"see {report} for what was left out; add data, or choose other splits",
        )
    manifest = Manifest(data.source, found.label_set, checked.samples, found.forms, found.part_weights)
    manifest.save(work)
    return manifest


def locate(data: Data, cache: Path) -> Path:
    """The root of the data's paths; a mix gets a folder of links below `cache`.

    Raises ConfigError if data.root is missing, DataError if a part of a mix does not exist.
    """
    if data.source == "mix":
        return mixed_root(data, cache / "mixes")
    if data.root is None and data.source not in ("town", "folder"):
        raise ConfigError(f"source {data.source} needs a folder", where="data.root", todo="pass --data.root FOLDER")
    return data.root or Path()  # the town is rendered; a folder's YAML may name its folders itself


def prepare(data: Data, cache: Path, *, wait: bool = True) -> Path:
    """Download the data under a lock if the config says so, and return the root as `locate` does.

    The town is not rendered here: its frames are part of ingest's output.
    """
    root = locate(data, cache)
    if data.download:
        cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / "download.lock", f"the download of {data.source}", wait=wait, say=log.warning):
            _download(data, root)
    return root


def source_digest(data: Data, root: Path) -> str:
    """SHA-256 that changes when the source's files change, computed without reading them.

    Covers path, size and modification time of every paired file, the findings of pairing, and the meaning of mask
    values. Constant for the town. Raises DataError for a wrong root, like `ingest`.
    """
    if data.source == "town":
        return sha256_bytes(b"town")
    found = find(data, root)
    labels = {mask_path(p.label, found.forms[p.part])[0] for p in found.pairs}
    files = sorted(labels | {path for p in found.pairs for path in (p.image, p.instances) if path})
    rows = [(path, *_stamp(root / path)) for path in files]
    pairs = [asdict(p) for p in found.pairs]
    meaning = {part: form.to_json() for part, form in found.forms.items()}
    return sha256_bytes(json_bytes([rows, pairs, [asdict(f) for f in found.findings], meaning]))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1  # such as a dangling link: measuring it reports the problem, together with all others
    return status.st_size, status.st_mtime_ns


def _sources(data: Data) -> dict[str, str]:
    """Source by part name; data that is not mixed has the single part ""."""
    return {name: part.source for name, part in data.mix.items()} or {"": data.source}


def _where(data: Data, root: Path) -> Path | str:
    """The data's location for messages: for a mix the parts' folders, as its root is a folder of links."""
    return ", ".join(f"{name} in {part.root or Path()}" for name, part in data.mix.items()) or root


def _select_splits(data: Data, found: Found, wanted: set[str], root: Path) -> Found:
    """Drop the splits that are not wanted, and move the held-out sequences into the split `holdout`."""
    pairs, findings = found.pairs, found.findings
    if data.holdout_sequences and (not wanted or wanted & {"train", HOLDOUT}):
        pairs = _hold_out(pairs, data.holdout_sequences)
    if wanted:
        _require(wanted, {p.split for p in pairs} | {f.split for f in findings}, root)
        pairs = [p for p in pairs if p.split in wanted]
        findings = [f for f in findings if f.split in wanted]
    return replace(found, pairs=pairs, findings=findings)


def _report(
    data: Data,
    found: Found,
    root: Path,
    limits: Limits,
    checked: Checked,
    findings: Sequence[Finding],
    work: Path,
    report_in: Path | None,
    pool: ProcessPoolExecutor | None,
) -> Path:
    html = render(
        f"roadseg ingest of {data.source}", root, found.label_set, found.forms, checked.measured, findings,
        checked.near, limits, pool,
    )  # fmt: skip
    (work / "log").mkdir(exist_ok=True)
    paths = [work / "log" / REPORT] + ([report_in / REPORT] if report_in else [])
    for path in paths:
        write_atomic(path, html.encode())
    return paths[-1]


def _download(data: Data, root: Path) -> None:
    if not data.source.startswith("cityscapes"):
        raise ConfigError(
            f"data.download with source {data.source}", expected="cityscapes", todo="fetch it from its owner"
        )
    if data.root is None:
        raise ConfigError("data.download without a folder to fetch into", todo="pass --data.root FOLDER")
    from roadseg.ingest.download.cityscapes import download_cityscapes, packages_for

    download_cityscapes(root, packages_for(data.source))


def _render(data: Data, tree: Path) -> None:
    """Render every split, also if only one is wanted: a split's scenes depend on the splits before it."""
    from roadseg import town  # only the town needs its renderer

    splits = {split: n for split in ("train", "val", "test") if (n := getattr(data.town, split))}
    with progress(sum(splits.values()), "render the town", "frames") as bar:
        town.write_tree(
            tree, splits, data.town.seed, data.town.width_px, data.town.height_px, data.town.weather,
            data.workers or cores(), bar.update,
        )  # fmt: skip


def _hold_out(pairs: Sequence[Pair], sequences: Sequence[str]) -> list[Pair]:
    present = sorted({p.sequence for p in pairs if p.split == "train" and p.sequence})
    unknown = [s for s in sequences if s not in present]
    if unknown:
        known = _closest_names(present, unknown[0]) or "(no sequences are known: set `sequence` in data.labels)"
        raise DataError(
            f"train has no sequence {', '.join(unknown)}",
            expected=f"some of {known}",
            where="data.holdout_sequences",
        )
    if set(present) <= set(sequences) and all(p.sequence for p in pairs if p.split == "train"):
        raise DataError(
            "holds out every sequence of train",
            expected="at least one that is left to learn from",
            where="data.holdout_sequences",
        )
    return [replace(p, split=HOLDOUT) if p.split == "train" and p.sequence in sequences else p for p in pairs]


def _closest_names(names: Sequence[str], near: str) -> str:
    """All names if few, else those closest to `near` (or the first eight) and the number of the others."""
    if len(names) <= 12:
        return ", ".join(names)
    listing = difflib.get_close_matches(near, names, n=4, cutoff=0.3) or list(names[:8])
    return f"{', '.join(listing)} and {len(names) - len(listing):,} more"


def _require(wanted: set[str], present: set[str], root: Path) -> None:
    if missing := sorted(wanted - present):
        raise DataError(
            f"the data has no split {', '.join(missing)}",
            expected=f"one of {', '.join(sorted(present - {''})) or 'none'}",
            where=str(root),
            todo="set data.split, or point data.root elsewhere",
        )
