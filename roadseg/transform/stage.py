"""Stage 2: write the manifest's frames as shards with train ids and checksums, and statistics of train."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.config.sections import Transform
from roadseg.data.frames import read_frame
from roadseg.data.manifest import Manifest, Sample
from roadseg.data.masks.form import MaskForm
from roadseg.data.shards.images import Format
from roadseg.data.shards.index import Shard, Shards, shard_from_json, write_frame
from roadseg.errors import DataError, RoadsegError
from roadseg.files import json_bytes, read_json, sha256_bytes, sha256_file, write_json
from roadseg.images.decode import Limits
from roadseg.processes import cores, start_worker
from roadseg.progress import progress
from roadseg.transform.centroids import class_centroids

VERSION = 3
DONE = Path("log", "made")  # records of finished shards, for a resumed run; content digests ignore log/
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One shard to write, with everything that a worker process needs. form, quality: of its images."""

    split: str
    number: int
    samples: tuple[Sample, ...]
    forms: dict[str, MaskForm]
    root: Path
    file: Path
    limits: Limits
    form: Format
    quality: int

    @property
    def record(self) -> Path:
        return self.file.parent / DONE / f"{self.file.stem}.json"

    @property
    def digest(self) -> str:
        """Digest of everything that determines the shard's bytes, so that shards of other settings are not reused."""
        forms = {part: self.forms[part].digest for part in {s.part for s in self.samples}}
        return sha256_bytes(json_bytes([VERSION, [asdict(s) for s in self.samples], forms, self.form, self.quality]))


def transform(
    settings: Transform, manifest: Manifest, root: Path, work: Path, limits: Limits, workers: int = 0
) -> Shards:
    """Write the shards of every split but test, and shards.json, into `work`.

    Shards that an interrupted run finished there are kept if their SHA-256 is still correct.
    root: base of the manifest's paths. workers: processes, 0 for one per core.
    Raises DataError if a file changed since ingest, or if there is no split besides test.
    """
    jobs = list(_jobs(settings, manifest, root, work, limits))
    if not jobs:
        raise DataError(
            f"the data has only the splits {', '.join(manifest.splits) or '(none)'}",
            expected="train, and preferably val",
            todo="add train; to score a release on test alone, use `roadseg evaluate --release R --data.split test`",
        )
    (work / DONE).mkdir(parents=True, exist_ok=True)
    for path in [*work.glob("*.tmp"), *(work / DONE).glob(".*.tmp")]:  # left by a killed run
        path.unlink()
    total = sum(len(job.samples) for job in jobs)
    results: dict[tuple[str, int], tuple[Shard, np.ndarray]] = {}
    with (
        ProcessPoolExecutor(workers or cores(), get_context("spawn"), start_worker) as pool,
        progress(total, "transform", "frame") as bar,
    ):
        try:
            for done in as_completed([pool.submit(_reuse_or_write, job) for job in jobs]):
                job, shard, colors = done.result()
                results[job.split, job.number] = shard, colors
                bar.update(len(job.samples))
        except BrokenProcessPool:
            raise RoadsegError(
                "a worker process died while writing shards",
                expected="memory for a few decoded frames per process",
                todo='lower data.workers; a script that calls roadseg must do so below `if __name__ == "__main__":`',
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error, skip the remaining shards
    return _index(settings, manifest, work, results)


def rebuild(
    damaged: list[tuple[str, int]], settings: Transform, manifest: Manifest, root: Path, shards: Shards, limits: Limits
) -> None:
    """Rebuild damaged shards of a finished output. Raises DataError if one differs from the original shard."""
    assert isinstance(shards.folder, Path), "only local shards can be rebuilt"
    for job in _jobs(settings, manifest, root, shards.folder, limits):
        if (job.split, job.number) not in damaged:
            continue
        log.warning("shard %s is damaged; rebuilding it from the originals", job.file.name)
        shard, _ = _write_shard(job)
        if shard != shards.shards[job.split][job.number]:
            raise DataError(
                "the rebuilt shard differs from the original one",
                where=str(job.file),
                todo="the data set changed: run ingest again",
            )


def _jobs(settings: Transform, manifest: Manifest, root: Path, folder: Path, limits: Limits) -> Iterator[_Job]:
    for split in manifest.splits:
        if split == "test":
            continue  # evaluate reads its originals; it is never used for training
        samples = manifest.split(split)
        for number, first in enumerate(range(0, len(samples), settings.shard_frames)):
            chunk = samples[first : first + settings.shard_frames]
            file = folder / f"{split}-{number:05d}.bin"
            yield _Job(split, number, chunk, manifest.forms, root, file, limits, settings.format, settings.jpeg_quality)


def _reuse_or_write(job: _Job) -> tuple[_Job, Shard, np.ndarray]:
    """Also returns the color histogram of the shard's pixels: int64 [3, 256] counts by channel and value."""
    finished = _finished(job)
    if finished:
        return job, *finished
    shard, colors = _write_shard(job)
    with _disk_errors(job.file):
        write_json(job.record, {"job": job.digest, "shard": asdict(shard), "colors": colors.tolist()})
    return job, shard, colors


def _finished(job: _Job) -> tuple[Shard, np.ndarray] | None:
    """The shard and histogram recorded by an earlier run, if they belong to this job and the file is intact."""
    try:
        record = read_json(job.record)
        shard, colors = shard_from_json(record["shard"]), np.array(record["colors"], np.int64).reshape(3, 256)
        intact = record["job"] == job.digest and sha256_file(job.file) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (shard, colors) if intact else None


def _write_shard(job: _Job) -> tuple[Shard, np.ndarray]:
    frames, colors = [], np.zeros((3, 256), np.int64)
    partial = job.file.with_suffix(".tmp")
    try:
        with _disk_errors(job.file), open(partial, "wb") as f:
            for sample in job.samples:
                image, label = read_frame(job.root, sample, job.forms[sample.part], job.limits)
                centroids = class_centroids(label)
                options: dict[str, Any] = {"part": sample.part, "centroids": centroids}
                options |= {"form": job.form, "quality": job.quality}
                frames.append(write_frame(f, sample.name, sample.sequence, image, label, **options))
                for channel in range(3):
                    colors[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
            f.flush()
            os.fsync(f.fileno())  # the record must not survive a power cut that the bytes do not
        shard = Shard(job.file.name, sha256_file(partial), tuple(frames), partial.stat().st_size)
        os.replace(partial, job.file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return shard, colors


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """Turn an OSError (a full or failing disk) into a RoadsegError with advice."""
    try:
        yield
    except OSError as e:
        raise RoadsegError(
            f"can't be written ({e.strerror})",
            expected="disk space for the shards (raw: 3 bytes per pixel)",
            where=str(file),
            todo="free disk space, or set transform.format to jpeg or lossless; finished shards are kept",
        ) from None


def _index(
    settings: Transform, manifest: Manifest, work: Path, results: dict[tuple[str, int], tuple[Shard, np.ndarray]]
) -> Shards:
    by_split: dict[str, list[Shard]] = {}
    for (split, _), (shard, _) in sorted(results.items()):
        by_split.setdefault(split, []).append(shard)
    statistics_split = "train" if "train" in by_split else next(iter(by_split))
    colors = sum(c for (split, _), (_, c) in sorted(results.items()) if split == statistics_split)
    mean, std = _moments(np.asarray(colors))
    shards = Shards(
        folder=work,
        source=manifest.source,
        label_set=manifest.label_set,
        mean=mean,
        std=std,
        class_pixels={s: np.sum([x.histogram for x in manifest.split(s)], axis=0).tolist() for s in manifest.splits},
        fingerprints={s: manifest.fingerprint(s) for s in manifest.splits},
        shards={split: tuple(shards) for split, shards in by_split.items()},
        form=settings.format,
        part_weights=dict(manifest.part_weights),
    )
    shards.save()
    return shards


def _moments(colors: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Exact mean and standard deviation per channel from int64 [3, 256] counts."""
    values = np.arange(256)
    counts = colors.sum(axis=1)
    mean = (colors * values).sum(axis=1) / counts
    variance = (colors * values**2).sum(axis=1) / counts - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # avoid a division by zero for a constant channel
    r, g, b = (float(m) for m in mean)
    sr, sg, sb = (float(s) for s in std)
    return (r, g, b), (sr, sg, sb)
