"""The five stages as functions: each computes its key, makes or finds its output, and returns it.

Stages are imported where they run, so that a command that needs no torch does not load it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadseg.data.manifest import HOLDOUT, Manifest
from roadseg.errors import ConfigError, DataError
from roadseg.files import lock, read_json, write_atomic
from roadseg.images.decode import Limits
from roadseg.pipeline.context import Context
from roadseg.pipeline.workspace import Output
from roadseg.release.archive import Release, load_release

if TYPE_CHECKING:
    from roadseg.data.shards.index import Shards
    from roadseg.push.gate import Decision
    from roadseg.train.inputs import Inputs

log = logging.getLogger(__name__)
DATA_REPORT = "log/data_report.html"  # in ingest's output, and in the run's folder
ARCHIVE = "model.tar.gz"
Key = tuple[int, dict[str, Any], dict[str, str]]  # version, config fields and inputs, as Workspace.make takes them
TRAIN_KEY = "train key"  # what rank 0 publishes once the data is ready; "" if there is nothing to train


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """root: of the manifest's paths. limits: under which the images are read."""

    output: Output
    manifest: Manifest
    root: Path
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """load: reads the shards, after damaged ones were made again. content: their digest. output: None if given."""

    content: str
    load: Callable[[], Shards]
    output: Output | None


@dataclass(frozen=True, kw_only=True)
class Trained:
    output: Output

    @property
    def archive(self) -> Path:
        return self.output.folder / ARCHIVE


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    output: Output

    @property
    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = read_json(self.output.folder / "metrics.json")
        return metrics


# ---- ingest ---------------------------------------------------------------------------------


def ingested(context: Context, root: Path, only_splits: tuple[str, ...] = ()) -> Ingested:
    """The checked frames. root: from roadseg.ingest.stage.prepare. only_splits: no others are read."""
    from roadseg.ingest.stage import ingest

    data = context.config.data
    if data.source == "town":
        only_splits = ()  # rendered as a whole
    output = context.workspace.make(
        "ingest",
        *_ingest_key(context, root, only_splits),
        lambda work: ingest(data, root, work, only_splits, context.folder),
    )
    if context.folder and (report := output.folder / DATA_REPORT).exists():
        write_atomic(context.folder / Path(DATA_REPORT).name, report.read_bytes())
    return Ingested(
        output=context.record("ingest", output),
        manifest=Manifest.load(output.folder),
        root=output.folder / "tree" if data.source == "town" else root,
        limits=Limits(data.max_file_bytes, data.max_image_pixels),
    )


def _ingest_key(context: Context, root: Path, only_splits: tuple[str, ...] = ()) -> Key:
    from roadseg.ingest.stage import VERSION, source_digest

    data = context.config.data
    fields = {**data.key_fields(), "only_splits": only_splits}
    if data.source != "town":
        del fields["town"]
    return VERSION, fields, {"source": source_digest(data, root)}


# ---- transform ------------------------------------------------------------------------------


def transformed(context: Context, data: Ingested) -> Transformed:
    from roadseg.transform.stage import transform

    settings, workers = context.config.transform, context.config.data.workers
    output = context.workspace.make(
        "transform",
        *_transform_key(context, data.output.content),
        lambda work: transform(settings, data.manifest, data.root, work, data.limits, workers),
        resumes=True,
    )
    context.record("transform", output)
    return Transformed(content=output.content, load=lambda: _repaired(context, data, output), output=output)


def _transform_key(context: Context, ingest: str) -> Key:
    from roadseg.transform.stage import VERSION

    return VERSION, context.config.transform.key_fields(), {"ingest": ingest}


def _repaired(context: Context, data: Ingested, output: Output) -> Shards:
    """The shards, after those that fail their digest were made again."""
    from roadseg.data.shards.index import Shards
    from roadseg.transform.stage import rebuild

    shards = Shards.load(output.folder)
    if not shards.damaged():
        return shards
    lock_path, what = output.folder.with_suffix(".lock"), f"transform {output.key}"
    with lock(lock_path, what, wait=context.workspace.wait, say=log.warning):
        if damaged := shards.damaged():  # another run may have repaired them meanwhile
            rebuild(damaged, context.config.transform, data.manifest, data.root, shards, data.limits)
    return shards


def external_shards(context: Context) -> Transformed:
    """The shards at transform.shards, a folder or an s3:// address. Raises ConfigError, or DataError for damage."""
    from roadseg.data.shards.index import INDEX, Shards

    address, aws = context.config.transform.shards, context.config.aws
    if not address.startswith("s3://") and not (Path(address) / INDEX).is_file():
        raise ConfigError(
            f"no {INDEX} in {address}",
            expected="a folder or s3:// address with a finished transform's shards",
            where="transform.shards",
            todo="check the path, or remove it to have them made here",
        )
    shards = Shards.load(address, region=aws.region, endpoint_url=aws.endpoint_url)
    if damaged := shards.damaged():
        raise DataError(
            f"{len(damaged)} of its shards are missing or damaged",
            where=f"transform.shards {address}",
            todo="copy them there again",
        )
    return Transformed(content=shards.content, load=lambda: shards, output=None)


# ---- train ----------------------------------------------------------------------------------


def trained(context: Context, data: Transformed, inputs: Inputs) -> Trained:
    """The candidate, trained by this process, or by as many as the config says, or with the other ranks of torchrun."""
    made = False

    def build(work: Path) -> None:
        nonlocal made
        made = True
        _train(context, data, inputs, work)

    output = context.workspace.make("train", *train_key(context, data.content, inputs), build, resumes=True)
    if not made:
        _publish(context, "")
    return Trained(output=context.record("train", output))


def find_trained(context: Context, inputs: Inputs) -> Output | None:
    """The output of this training, None unless it and the data it was made from exist. Makes nothing."""
    from roadseg.ingest.stage import locate

    workspace = context.workspace
    if context.config.transform.shards:
        shards = external_shards(context).content
    else:
        try:
            key = _ingest_key(context, locate(context.config.data, context.cache))
        except (DataError, OSError):  # the data is not here, perhaps not downloaded yet
            return None
        if not (ingest := workspace.find("ingest", *key)):
            return None
        if not (transform := workspace.find("transform", *_transform_key(context, ingest.content))):
            return None
        shards = transform.content
    return workspace.find("train", *train_key(context, shards, inputs))


def train_key(context: Context, shards: str, inputs: Inputs) -> Key:
    """shards: their content digest."""
    from roadseg.train.version import VERSION

    c = context.config
    fields = {"model": c.model.key_fields(), "training": c.training.key_fields(), **_ranks_in_key(context)}
    return VERSION, fields, {"transform": shards, **inputs.digests}


def _ranks_in_key(context: Context) -> dict[str, int]:
    """How many ranks train, where that changes the result.

    Without sync-BN each normalizes by its own images; with several micro-batches each cuts them from its own.
    """
    t = context.config.training
    if t.sync_batch_norm and t.accumulate == 1:
        return {}
    world = context.cluster.world
    if world == 1:
        world = t.gpus
    if not world:
        from roadseg.train.device import processes_per_machine

        world = processes_per_machine(t.gpus, t.device)
    return {"ranks": world} if world > 1 else {}


def _train(context: Context, data: Transformed, inputs: Inputs, work: Path) -> None:
    from roadseg.train.device import processes_per_machine

    t, cluster = context.config.training, context.cluster
    here = 1 if cluster.world > 1 else processes_per_machine(t.gpus, t.device)
    if cluster.world > 1:
        _publish(context, context.workspace.key("train", *train_key(context, data.content, inputs)))
        train_with_other_ranks(context, data, inputs, work)
    elif here > 1:
        from roadseg.train.distributed.launch import launch
        from roadseg.train.distributed.worker import job_of, train_rank

        launch(train_rank, (job_of(context.config, data.load(), inputs, work),), here)
    else:
        from roadseg.train.stage import train_candidate

        init, teacher = (r.release if r else None for r in (inputs.init, inputs.teacher))
        train_candidate(context.config, data.load(), work, init, teacher)


def train_with_other_ranks(context: Context, data: Transformed, inputs: Inputs, work: Path) -> None:
    """This process's part of a training that torchrun's processes do together; rank 0 leaves the files in `work`."""
    from roadseg.train.distributed.process_group import ranks_from_environment
    from roadseg.train.distributed.worker import job_of, train_rank

    train_rank(ranks_from_environment(), job_of(context.config, data.load(), inputs, work, context.run))


def _publish(context: Context, key: str) -> None:
    if context.cluster.world > 1 and context.run:
        from roadseg.train.distributed.run_store import RunStore

        RunStore(context.cluster, context.run).publish(TRAIN_KEY, key)


# ---- evaluate -------------------------------------------------------------------------------


def evaluated(context: Context, data: Ingested, release: Release) -> Evaluated:
    """The Evaluation of any release on this data, on originals and their own labels."""
    from roadseg.evaluate.stage import VERSION, Images, evaluate
    from roadseg.inference.predictor import Predictor

    splits, settings = scored_splits(context, data.manifest.splits), context.config.evaluation
    predictor = Predictor(release, settings.threads)
    output = context.workspace.make(
        "evaluate",
        VERSION,
        {**settings.key_fields(), "splits": splits, "runtime": predictor.runtime},
        {"release": release.digest, **{split: data.manifest.fingerprint(split) for split in splits}},
        lambda work: evaluate(predictor, Images(data.manifest, data.root, data.limits), splits, settings.scenes, work),
    )
    return Evaluated(output=output)


def scored_splits(context: Context, present: Sequence[str]) -> list[str]:
    """data.split, and the held-out sequences if there are any. Raises DataError if data.split does not exist."""
    split = context.config.data.split
    if split not in present:
        raise DataError(
            f"the data set has no split {split!r}",
            expected=f"one of {', '.join(present)}",
            where="data.split",
            todo="set data.split",
        )
    return [split] + [s for s in present if s == HOLDOUT and s != split]


# ---- push -----------------------------------------------------------------------------------


def pushed(context: Context, data: Ingested, candidate: Trained, evaluation: Evaluated) -> Decision:
    """Whether the candidate becomes champion; the champion is scored on the same data. Never cached."""
    from roadseg.push.stage import push

    def evaluate_champion(digest: str) -> dict[str, Any]:
        champion = load_release(context.store.fetch(digest, context.cache), digest)
        return evaluated(context, data, champion).metrics

    release = load_release(candidate.archive)
    min_gain = context.config.push.min_gain
    return push(release, candidate.archive, evaluation.metrics, evaluate_champion, context.store, min_gain)
