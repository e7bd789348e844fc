"""Stage 2: the manifest's frames as checksummed shards of train ids, with statistics over train."""

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
MADE = Path("log", "made")  # what finished shards are, for a run that goes on; content digests leave log/ out
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One shard to write, and what a worker process needs to write it. form, quality: of its images."""

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
        return self.file.parent / MADE / f"{self.file.stem}.json"

    @property
    def digest(self) -> str:
        """Of all that the shard's bytes follow from, so that no shard of other settings is taken for it."""
        forms = {part: self.forms[part].digest for part in {s.part for s in self.samples}}
        return sha256_bytes(json_bytes([VERSION, [asdict(s) for s in self.samples], forms, self.form, self.quality]))


def transform(
    settings: Transform, manifest: Manifest, root: Path, work: Path, limits: Limits, workers: int = 0
) -> Shards:
    """Write the shards of every split but test, and shards.json, into `work`.

    Shards that an earlier run finished there are kept if their bytes still have their SHA-256.
    root: where the manifest's paths start. workers: processes, 0 for one a core.
    Raises DataError if a file is no longer what ingest saw, or if there is no split but test.
    """
    jobs = list(_jobs(settings, manifest, root, work, limits))
    if not jobs:
        raise DataError(
            f"the data has no split but {', '.join(manifest.splits) or 'none'}",
            expected="train, and best val",
            todo="add one; a release is scored on test alone by `roadseg evaluate --release R --data.split test`",
        )
    (work / MADE).mkdir(parents=True, exist_ok=True)
    for path in [*work.glob("*.tmp"), *(work / MADE).glob(".*.tmp")]:  # left by a run that was killed
        path.unlink()
    total = sum(len(job.samples) for job in jobs)
    results: dict[tuple[str, int], tuple[Shard, np.ndarray]] = {}
    with (
        ProcessPoolExecutor(workers or cores(), get_context("spawn"), start_worker) as pool,
        progress(total, "transform", "frame") as bar,
    ):
        try:
            for done in as_completed([pool.submit(_made_or_found, job) for job in jobs]):
                job, shard, colours = done.result()
                results[job.split, job.number] = shard, colours
                bar.update(len(job.samples))
        except BrokenProcessPool:
            raise RoadsegError(
                "a process that writes shards died",
                expected="memory for a few decoded frames a process",
                todo='lower data.workers; a script that calls roadseg must do so below `if __name__ == "__main__":`',
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody wants the other shards
    return _index(settings, manifest, work, results)


def rebuild(
    damaged: list[tuple[str, int]], settings: Transform, manifest: Manifest, root: Path, shards: Shards, limits: Limits
) -> None:
    """Write these shards of a finished output again. Raises DataError if one comes out different."""
    assert isinstance(shards.folder, Path), "made here, from the originals"
    for job in _jobs(settings, manifest, root, shards.folder, limits):
        if (job.split, job.number) not in damaged:
            continue
        log.warning("shard %s is damaged; making it again", job.file.name)
        shard, _ = _write_shard(job)
        if shard != shards.shards[job.split][job.number]:
            raise DataError(
                "the originals no longer give this shard",
                where=str(job.file),
                todo="the data set changed: run ingest again",
            )


def _jobs(settings: Transform, manifest: Manifest, root: Path, folder: Path, limits: Limits) -> Iterator[_Job]:
    for split in manifest.splits:
        if split == "test":
            continue  # scored from its originals; never trained on
        samples = manifest.split(split)
        for number, first in enumerate(range(0, len(samples), settings.shard_frames)):
            some = samples[first : first + settings.shard_frames]
            file = folder / f"{split}-{number:05d}.bin"
            yield _Job(split, number, some, manifest.forms, root, file, limits, settings.format, settings.jpeg_quality)


def _made_or_found(job: _Job) -> tuple[_Job, Shard, np.ndarray]:
    """Also returns the colours of the shard's pixels: int64 [3, 256] counts by channel and value."""
    found = _found(job)
    if found:
        return job, *found
    shard, colours = _write_shard(job)
    with _room_for(job.file):
        write_json(job.record, {"job": job.digest, "shard": asdict(shard), "colours": colours.tolist()})
    return job, shard, colours


def _found(job: _Job) -> tuple[Shard, np.ndarray] | None:
    """The shard as an earlier run recorded it, if it is of this job and has its bytes."""
    try:
        record = read_json(job.record)
        shard, colours = shard_from_json(record["shard"]), np.array(record["colours"], np.int64).reshape(3, 256)
        whole = record["job"] == job.digest and sha256_file(job.file) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (shard, colours) if whole else None


def _write_shard(job: _Job) -> tuple[Shard, np.ndarray]:
    frames, colours = [], np.zeros((3, 256), np.int64)
    partial = job.file.with_suffix(".tmp")
    try:
        with _room_for(job.file), open(partial, "wb") as f:
            for sample in job.samples:
                image, label = read_frame(job.root, sample, job.forms[sample.part], job.limits)
                centroids = class_centroids(label)
                about: dict[str, Any] = {"part": sample.part, "centroids": centroids}
                about |= {"form": job.form, "quality": job.quality}
                frames.append(write_frame(f, sample.name, sample.sequence, image, label, **about))
                for channel in range(3):
                    colours[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
            f.flush()
            os.fsync(f.fileno())  # its record must not outlive its bytes
        shard = Shard(job.file.name, sha256_file(partial), tuple(frames), partial.stat().st_size)
        os.replace(partial, job.file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return shard, colours


@contextmanager
def _room_for(file: Path) -> Iterator[None]:
    """Says plainly what a full or failing disk means here."""
    try:
        yield
    except OSError as e:
        raise RoadsegError(
            f"can't be written ({e.strerror})",
            expected="room for the shards, raw 3 bytes a pixel",
            where=str(file),
            todo="free some, or set transform.format to jpeg or lossless; finished shards are kept",
        ) from None


def _index(
    settings: Transform, manifest: Manifest, work: Path, results: dict[tuple[str, int], tuple[Shard, np.ndarray]]
) -> Shards:
    by_split: dict[str, list[Shard]] = {}
    for (split, _), (shard, _) in sorted(results.items()):
        by_split.setdefault(split, []).append(shard)
    statistics_split = "train" if "train" in by_split else next(iter(by_split))
    colours = sum(c for (split, _), (_, c) in sorted(results.items()) if split == statistics_split)
    mean, std = _moments(np.asarray(colours))
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


def _moments(colours: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Exact mean and standard deviation per channel from int64 [3, 256] counts."""
    values = np.arange(256)
    counts = colours.sum(axis=1)
    mean = (colours * values).sum(axis=1) / counts
    variance = (colours * values**2).sum(axis=1) / counts - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # a constant channel must not divide by zero
    r, g, b = (float(m) for m in mean)
    sr, sg, sb = (float(s) for s in std)
    return (r, g, b), (sr, sg, sb)
