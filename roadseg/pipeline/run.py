"""Run the stages in order, alone or with torchrun's other ranks; keep the record and write the report."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from roadseg.config.sections import Config
from roadseg.errors import ConfigError, GateRefused, PeerLost, StoreError, UsageError
from roadseg.files import write_atomic, write_json
from roadseg.pipeline import stages
from roadseg.pipeline.context import Context
from roadseg.pipeline.preflight import preflight, refuse_other_training
from roadseg.pipeline.stages import Evaluated, Ingested, Trained
from roadseg.pipeline.workspace import Output, Workspace
from roadseg.release.archive import load_release
from roadseg.release.store.base import DECISION, read_document
from roadseg.release.store.resolve import find_release
from roadseg.train.distributed.environment import cluster_from_environment
from roadseg.train.signals import stopped_at_once

if TYPE_CHECKING:
    from roadseg.push.gate import Decision
    from roadseg.train.distributed.run_store import RunStore

log = logging.getLogger(__name__)
_run_numbers = itertools.count()  # of this process; torchrun's processes count alike
Stage = Literal["ingest", "transform", "train", "evaluate", "push"]
STAGES: tuple[Stage, ...] = ("ingest", "transform", "train", "evaluate", "push")


@dataclass(frozen=True)
class RunResult:
    """What a run ended with. outputs: by stage; evaluation: content of metrics.json.

    Of several processes that train together only rank 0 has any of it.
    """

    outputs: dict[str, Output]
    folder: Path
    evaluation: dict[str, Any] | None = None
    decision: Decision | None = None
    release: Path | None = None


def run(
    config: Config,
    until: Stage = "push",
    *,
    workspace: Path | str = "workspace",
    name: str = "default",
    wait: bool = True,
) -> RunResult:
    """Run the stages up to `until`; outputs that exist are not made again.

    Under torchrun every process calls this alike; see `RunResult`.

    Writes runs/<name>/run.json, and report.html once there is an Evaluation. Raises the exceptions
    of roadseg.errors; GateRefused, after everything is written, when the champion stays.
    """
    if until not in STAGES:
        raise UsageError(f"no stage {until!r}", expected=", ".join(STAGES))
    _refuse_spawned()
    folder = run_folder(Path(workspace), name)
    cluster = cluster_from_environment()
    if cluster.world == 1:
        context = Context(config=config, workspace=Workspace(Path(workspace), wait), folder=folder)
        with stopped_at_once():
            return _run(context, until)
    if config.training.gpus not in (0, 1, cluster.local_world):
        raise ConfigError(
            f"{config.training.gpus} in one of {cluster.world} processes that were started together",
            expected="1",
            where="training.gpus",
            todo="leave it out: torchrun says how many there are",
        )
    # Locks are always waited for: mostly another rank of this machine holds one.
    context = Context(
        config=config,
        workspace=Workspace(Path(workspace)),
        folder=folder if cluster.main else None,
        cluster=cluster,
        run=f"run {next(_run_numbers)}",
    )
    return _run_with_other_ranks(context, until, folder)


def _run(context: Context, until: Stage) -> RunResult:
    """The stages in order. The report is written also when push refuses the candidate or fails."""
    from roadseg.ingest.stage import prepare

    inputs = preflight(context, train=until not in ("ingest", "transform"), push=until == "push")
    root = prepare(context.config.data, context.cache, wait=context.workspace.wait)
    outputs: dict[str, Output] = {}

    def result(**more: Any) -> RunResult:
        assert context.folder is not None
        return RunResult(outputs, context.folder, **more)

    given = context.config.transform.shards if until not in ("ingest", "transform") else ""
    data = None
    if not given or until in ("ingest", "evaluate", "push"):
        data = stages.ingested(context, root)
        outputs["ingest"] = data.output
    if until == "ingest":
        return result()
    if data and until in ("evaluate", "push"):
        stages.scored_splits(context, data.manifest.splits)  # refused now, not after hours of training
    shards = stages.external_shards(context) if given or not data else stages.transformed(context, data)
    if shards.output:
        outputs["transform"] = shards.output
    if until == "transform":
        return result()
    assert inputs is not None
    candidate = stages.trained(context, shards, inputs)
    outputs["train"] = candidate.output
    if until == "train" or not data:
        return result(release=candidate.archive)
    release = load_release(candidate.archive)
    evaluation = stages.evaluated(context, data, release)
    outputs["evaluate"] = context.record("evaluate", evaluation.output)
    decision = None
    try:
        if until == "push":
            decision = stages.pushed(context, data, candidate, evaluation)
    finally:
        _report(context, candidate, evaluation, decision)
    if decision is not None and decision.outcome == "refused":
        _refuse(context, decision)
    return result(evaluation=evaluation.metrics, decision=decision, release=candidate.archive)


def _run_with_other_ranks(context: Context, until: Stage, folder: Path) -> RunResult:
    """As one of torchrun's processes: rank 0 runs the stages, the others wait for its data and train with it."""
    from roadseg.train.distributed.run_store import RunStore, write_error_file

    cluster = context.cluster
    store = RunStore(cluster, context.run)
    if not cluster.main:
        logging.getLogger("roadseg").setLevel(logging.WARNING)  # rank 0 logs the rest
    try:
        with stopped_at_once():
            if cluster.main:
                return _run(context, until)
            _follow(context, until, store)
    except BaseException as e:
        if not isinstance(e, PeerLost):
            store.fail(e)
        write_error_file(e, cluster.rank)
        raise
    return RunResult({}, folder)


def _follow(context: Context, until: Stage, store: RunStore) -> None:
    """What ranks other than 0 do: wait until rank 0 has its data, make or find their own, and train with it."""
    from roadseg.ingest.stage import prepare

    if until in ("ingest", "transform"):
        if context.cluster.local_rank == 0:  # the first rank of another machine makes that machine's data
            _run_data_stages(context, until)
        return
    inputs = preflight(context)
    assert inputs is not None
    key = store.wait(stages.TRAIN_KEY)
    if not key:  # it was trained before
        return
    if context.config.transform.shards:
        shards = stages.external_shards(context)
    else:
        root = prepare(context.config.data, context.cache)
        shards = stages.transformed(context, stages.ingested(context, root))
    own_key = context.workspace.key("train", *stages.train_key(context, shards.content, inputs))
    refuse_other_training(context, own_key, key)
    with TemporaryDirectory(prefix="roadseg-rank-") as work:  # it writes nothing there
        stages.train_with_other_ranks(context, shards, inputs, Path(work))


def _run_data_stages(context: Context, until: Stage) -> None:
    from roadseg.ingest.stage import prepare

    data = stages.ingested(context, prepare(context.config.data, context.cache))
    if until == "transform":
        stages.transformed(context, data)


def _refuse(context: Context, decision: Decision) -> None:
    from roadseg.push.gate import table

    assert context.folder is not None
    log.warning("%s", table(decision))
    raise GateRefused(
        f"the champion {(decision.champion or '')[:12]} stays: {decision.reason}",
        todo=f"see {context.folder / 'report.html'}",
    )


def run_folder(workspace: Path, name: str) -> Path:
    """WORKSPACE/runs/NAME, made. Raises UsageError for a name that is a path: `clean` would not find it."""
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UsageError(f"{name!r}", expected="letters, digits, '.', '_' and '-'", where="--name")
    folder = workspace / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_spawned() -> None:
    """A worker process that runs its parent's script again would wait for its parent for ever."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "a script without a __main__ guard was run again by one of its own worker processes",
            todo='put the call of roadseg below `if __name__ == "__main__":`',
        )


def evaluate_release(
    config: Config, reference: str = "champion", *, workspace: Path = Path("workspace"), wait: bool = True
) -> tuple[dict[str, Any], Path]:
    """Score any release on the config's data; only `data.split` needs to exist.

    Returns the content of metrics.json and the folder that holds it and report.html.
    """
    context = Context(config=config, workspace=Workspace(workspace, wait))
    release = load_release(find_release(config, workspace, reference))
    evaluation = stages.evaluated(context, _data(context, (config.data.split,)), release)
    return evaluation.metrics, evaluation.output.folder


def dataset(config: Config, workspace: Path, wait: bool = True) -> Ingested:
    """The checked frames of the config's data."""
    return _data(Context(config=config, workspace=Workspace(workspace, wait)))


def _data(context: Context, only_splits: tuple[str, ...] = ()) -> Ingested:
    from roadseg.ingest.stage import prepare

    root = prepare(context.config.data, context.cache, wait=context.workspace.wait)
    return stages.ingested(context, root, only_splits)


def _decision_document(context: Context, decision: Decision) -> dict[str, Any]:
    """The decision; for a candidate that is the champion already, why it was promoted, if that was on this data."""
    if decision.outcome == "unchanged":
        try:
            first = read_document(context.store, decision.candidate, DECISION)
        except StoreError as e:
            log.warning("%s", e)
        else:
            if first and first.get("data_fingerprint") == decision.data_fingerprint:
                return first
    return decision.to_json()


def _report(context: Context, candidate: Trained, evaluation: Evaluated, decision: Decision | None) -> None:
    """The run's report: the Evaluation with the training curves, augmented samples and decision."""
    from roadseg.evaluate.report import render
    from roadseg.evaluate.stage import read_scenes
    from roadseg.files import read_json_lines
    from roadseg.report.progress_strip import progress_strip

    assert context.folder is not None
    metrics, train = evaluation.metrics, candidate.output.folder
    best, worst = read_scenes(evaluation.output.folder)
    html = render(
        metrics,
        best,
        worst,
        history=read_json_lines(train / "history.jsonl"),
        contact_sheet=(train / "contact_sheet.jpg").read_bytes(),
        timing=read_json_lines(train / "log" / "timing.jsonl"),
        pictures=progress_strip(train / "log" / "pictures"),
        decision=_decision_document(context, decision) if decision else None,
        title=f"roadseg run on {metrics['source']}",
    )
    write_atomic(context.folder / "report.html", html.encode())
    if decision:
        write_json(context.folder / "decision.json", decision.to_json())
