"""One rank's part of the train stage, from paths and plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadseg.config.sections import Config, load_config
from roadseg.data.shards.index import Shards
from roadseg.release.archive import Release, load_release
from roadseg.train.device import choose_device
from roadseg.train.distributed.process_group import Ranks, joined
from roadseg.train.inputs import Inputs
from roadseg.train.stage import train_candidate


@dataclass(frozen=True, kw_only=True)
class Job:
    """config: as JSON. shards: folder or s3 address. work: where rank 0 writes. init, teacher: (archive, digest).

    run: name of this training, equal on all ranks.
    """

    config: dict[str, Any]
    shards: str
    work: str
    init: tuple[str, str] | None
    teacher: tuple[str, str] | None
    run: str


def job_of(config: Config, shards: Shards, inputs: Inputs, work: Path | str, run: str = "ranks") -> Job:
    init, teacher = ((str(r.archive), r.release.digest) if r else None for r in (inputs.init, inputs.teacher))
    return Job(
        config=config.model_dump(mode="json"),
        shards=str(shards.folder),
        work=str(work),
        init=init,
        teacher=teacher,
        run=run,
    )


def train_rank(ranks: Ranks, job: Job) -> None:
    """Train with the other ranks; rank 0 leaves the stage's files in the job's `work`. Raises as train_candidate."""
    config = load_config(None, job.config)
    device = choose_device(config.training.device, ranks)
    shards = Shards.load(job.shards, region=config.aws.region, endpoint_url=config.aws.endpoint_url)
    with joined(ranks, device, job.run):
        train_candidate(config, shards, Path(job.work), _release(job.init), _release(job.teacher), ranks)


def _release(archive: tuple[str, str] | None) -> Release | None:
    return load_release(Path(archive[0]), archive[1]) if archive else None
