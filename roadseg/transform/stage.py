"""Stage 2: the manifest's frames as checksummed shards of train ids, with statistics over train."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from roadseg.config import Transform
from roadseg.data.frames import read_frame
from roadseg.data.manifest import Manifest, Sample
from roadseg.data.masks import MaskForm
from roadseg.data.shards import Shard, Shards, write_frame
from roadseg.errors import DataError, RoadsegError
from roadseg.files import sha256_file
from roadseg.images import Limits
from roadseg.processes import cores, start_worker
from roadseg.progress import progress

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One shard to write, and what a worker process needs to write it."""

    split: str
    number: int
    samples: tuple[Sample, ...]
    forms: dict[str, MaskForm]
    root: Path
    file: Path
    limits: Limits


def transform(
    settings: Transform, manifest: Manifest, root: Path, work: Path, limits: Limits, workers: int = 0
) -> Shards:
    """Write the shards of every split but test, and shards.json, into `work`.

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
    total = sum(len(job.samples) for job in jobs)
    results: dict[tuple[str, int], tuple[Shard, np.ndarray]] = {}
    with (
        ProcessPoolExecutor(workers or cores(), get_context("spawn"), start_worker) as pool,
        progress(total, "transform", "frame") as bar,
    ):
        try:
            for done in as_completed([pool.submit(_write_shard, job) for job in jobs]):
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
    return _index(manifest, work, results)


def rebuild(
    damaged: list[tuple[str, int]], settings: Transform, manifest: Manifest, root: Path, shards: Shards, limits: Limits
) -> None:
    """Write these shards of a finished output again. Raises DataError if one comes out different."""
    for job in _jobs(settings, manifest, root, shards.folder, limits):
        if (job.split, job.number) not in damaged:
            continue
        log.warning("shard %s is damaged; making it again", job.file.name)
        _, shard, _ = _write_shard(job)
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
            part = samples[first : first + settings.shard_frames]
            yield _Job(split, number, part, manifest.forms, root, folder / f"{split}-{number:05d}.bin", limits)


def _write_shard(job: _Job) -> tuple[_Job, Shard, np.ndarray]:
    """Also returns the colours of the shard's pixels: int64 [3, 256] counts by channel and value."""
    frames, colours = [], np.zeros((3, 256), np.int64)
    partial = job.file.with_suffix(".tmp")
    with open(partial, "wb") as f:
        for sample in job.samples:
            image, label = read_frame(job.root, sample, job.forms[sample.part], job.limits)
            frames.append(write_frame(f, sample.name, sample.sequence, image, label))
            for channel in range(3):
                colours[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
    os.replace(partial, job.file)
    return job, Shard(job.file.name, sha256_file(job.file), tuple(frames)), colours


def _index(manifest: Manifest, work: Path, results: dict[tuple[str, int], tuple[Shard, np.ndarray]]) -> Shards:
    by_split: dict[str, list[Shard]] = {}
    for (split, _), (shard, _) in sorted(results.items()):
        by_split.setdefault(split, []).append(shard)
    statistics_split = "train" if "train" in by_split else next(iter(by_split))
    colours = sum(c for (split, _), (_, c) in sorted(results.items()) if split == statistics_split)
    mean, std = _moments(np.asarray(colours))
    shards = Shards(
        work,
        manifest.source,
        manifest.label_set,
        mean,
        std,
        {s: np.sum([x.histogram for x in manifest.split(s)], axis=0).tolist() for s in manifest.splits},
        {s: manifest.fingerprint(s) for s in manifest.splits},
        {split: tuple(shards) for split, shards in by_split.items()},
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
