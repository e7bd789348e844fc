"""One rank's part of the train stage, from nothing but paths and values: what each process opens for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roadseg.config.sections import Config, load_config
from roadseg.config.training import Training
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError
from roadseg.release.archive import Release, load_release
from roadseg.train.distributed.environment import place, refuse_uneven
from roadseg.train.distributed.process_group import Ranks, joined
from roadseg.train.distributed.rendezvous import Words
from roadseg.train.inputs import Inputs
from roadseg.train.stage import choose_device, device_name, train_candidate


@dataclass(frozen=True)
class Job:
    """config: as JSON. shards: folder or s3 address. work: where rank 0 writes. init, teacher: (archive, digest).

    run: the name of the Words of the processes that start the ranks, if there are any.
    """

    config: dict[str, Any]
    shards: str
    work: str
    init: tuple[str, str] | None
    teacher: tuple[str, str] | None
    run: str = ""


def job_of(config: Config, shards: Shards, inputs: Inputs, work: Path | str, run: str = "") -> Job:
    init, teacher = ((str(g.archive), g.release.digest) if g else None for g in (inputs.init, inputs.teacher))
    return Job(config.model_dump(mode="json"), str(shards.folder), str(work), init, teacher, run)


def do(ranks: Ranks, job: Job, words: Words | None = None) -> None:
    """Train with the other ranks; rank 0 leaves the stage's files in the job's `work`. Raises as train_candidate."""
    config = load_config(None, job.config)
    a = config.aws
    device = choose_device(config.training.device, ranks)
    shards = Shards.load(job.shards, region=a.region, endpoint_url=a.endpoint_url)
    words = words or Words(place(), f"ranks of {job.run}", above=job.run)
    with joined(ranks, device, words):
        train_candidate(config, shards, Path(job.work), _release(job.init), _release(job.teacher), ranks)


def _release(archive: tuple[str, str] | None) -> Release | None:
    return load_release(Path(archive[0]), archive[1]) if archive else None


def processes(t: Training, machines: int = 1) -> int:
    """How many processes of this machine, as of each, train. Raises ConfigError if they lack GPUs or share unevenly.

    machines: processes that were started together, on one machine or several, each of which may start more.
    """
    kind = device_name(t.device)
    there = torch.cuda.device_count() if torch.cuda.is_available() and kind == "cuda" else 0
    world = t.gpus or max(there, 1)
    only_one = kind == "mps" or kind.startswith("cuda:")
    if only_one and world > 1:
        raise ConfigError(
            f"{world} with training.device {t.device}, which is one",
            expected="1",
            where="training.gpus",
            todo="set training.device to cuda, or training.gpus to 1",
        )
    if only_one and machines > 1:
        raise ConfigError(
            f"{t.device}, which is one, for each of {machines} processes that were started together",
            expected="cuda, of which each takes the one that its LOCAL_RANK says, or cpu",
            where="training.device",
            todo="set it to one of these, or start one process",
        )
    if world == 1 or (kind == "cpu" and t.device == "cpu"):
        refuse_uneven(t, world * machines)
        return world
    if world > there:
        raise ConfigError(
            f"{world} GPUs, but this machine has {there or 'none'}",
            expected=f"1 to {there}, or 0 for all" if there else "1, or 0",
            where="training.gpus",
            todo="training.device cpu trains on as many processes without one",
        )
    refuse_uneven(t, world * machines)
    return world
