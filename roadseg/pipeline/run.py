"""A run of the stages: alone or as one of a cluster's processes, its record and its report."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roadseg.config.sections import Config
from roadseg.errors import ConfigError, GateRefused, StoreError, UsageError
from roadseg.files import read_json, write_atomic, write_json
from roadseg.pipeline.stages import Stages
from roadseg.pipeline.workspace import Output, Workspace
from roadseg.release.archive import load_release
from roadseg.release.store.base import DECISION, read_document
from roadseg.release.store.resolve import find_release
from roadseg.train.distributed.environment import Place, place
from roadseg.train.signals import stopped_at_once

if TYPE_CHECKING:
    from roadseg.data.manifest import Manifest
    from roadseg.images.decode import Limits
    from roadseg.push.gate import Decision

log = logging.getLogger(__name__)
_runs = itertools.count()  # of this process; all of a cluster count alike
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
    """Run the stages up to `until`; what is there already is not made again.

    Under torchrun or on a SageMaker cluster every process calls this alike; see `RunResult`.

    Writes runs/<name>/run.json, and report.html once there is an Evaluation. Raises the exceptions
    of roadseg.errors; GateRefused, after everything is written, when the champion stays.
    """
    if until not in STAGES:
        raise UsageError(f"no stage {until!r}", expected=", ".join(STAGES))
    _refuse_spawned()
    workspace = Path(workspace)
    folder = run_folder(workspace, name)
    here = place()
    if here.world > 1:
        return _run_in_cluster(config, until, workspace, folder, here)
    with stopped_at_once():
        return _run(Stages(config, Workspace(workspace, wait), folder), until, folder)


def _run_in_cluster(config: Config, until: Stage, workspace: Path, folder: Path, here: Place) -> RunResult:
    """As one of the processes that a launcher started: rank 0 runs, the others make its data and train with it.

    On a cluster's machine it starts as many to train as training.gpus says. Locks are always waited for:
    mostly it is a sibling that holds one.
    """
    if config.training.gpus != 1 and not here.host:
        raise ConfigError(
            f"{config.training.gpus} in one of {here.world} processes that were started together",
            expected="1",
            where="training.gpus",
            todo="leave it out: torchrun says how many there are",
        )
    this = Stages(config, Workspace(workspace), folder if here.main else None)
    if not here.main:
        logging.getLogger("roadseg").setLevel(logging.WARNING)  # rank 0 tells the rest
    if until not in ("ingest", "transform"):
        from roadseg.train.distributed.rendezvous import Words

        this.words = Words(here, f"run {next(_runs)}")
        with this.words.present(), stopped_at_once():
            if here.main:
                return _run(this, until, folder)
            this.follow()
    elif here.main:
        return _run(this, until, folder)
    else:
        getattr(this, until)()
    return RunResult({}, folder)


def _run(this: Stages, until: Stage, folder: Path) -> RunResult:
    steps: dict[str, Callable[[], Any]] = {s: getattr(this, s) for s in STAGES}
    result = evaluation = None
    try:
        result = steps[until]()
    finally:
        decision = result if until == "push" else None
        if "evaluate" in this.outputs:  # also when there is no champion that can be compared with
            evaluation = read_json(this.outputs["evaluate"].folder / "metrics.json")
            _report(this, folder, evaluation, decision)
    release = this.outputs["train"].folder / "model.tar.gz" if "train" in this.outputs else None
    finished = RunResult(this.outputs, folder, evaluation, decision, release)
    if decision is not None and decision.outcome == "refused":
        from roadseg.push.gate import table

        log.warning("%s", table(decision))
        raise GateRefused(
            f"the champion {(decision.champion or '')[:12]} stays: {decision.reason}",
            todo=f"see {folder / 'report.html'}",
        )
    return finished


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
    """Score any release on the config's data; only `data.split` needs to be there.

    Returns the content of metrics.json and the folder that holds it and report.html.
    """
    this = Stages(config, Workspace(workspace, wait))
    release = load_release(find_release(config, workspace, reference))
    output = this.evaluation_of(release, only_splits=(config.data.split,))
    return read_json(output.folder / "metrics.json"), output.folder


def dataset(config: Config, workspace: Path, wait: bool = True) -> tuple[Manifest, Path, Limits]:
    """The checked frames of the config's data, the root of their paths, and the limits to read them under."""
    return Stages(config, Workspace(workspace, wait)).manifest()


def _told(this: Stages, decision: Decision) -> dict[str, Any]:
    """The decision; of a candidate that is the champion already, why it was let through, if that was on this data."""
    if decision.outcome == "unchanged":
        try:
            first = read_document(this.store(), decision.candidate, DECISION)
        except StoreError as e:
            log.warning("%s", e)
        else:
            if first and first.get("data_fingerprint") == decision.data_fingerprint:
                return first
    return decision.to_json()


def _report(this: Stages, folder: Path, evaluation: dict[str, Any], decision: Decision | None) -> None:
    """The run's report: the Evaluation with the training curves, augmented samples and decision."""
    from roadseg.evaluate.report import render
    from roadseg.evaluate.stage import read_scenes
    from roadseg.files import read_json_lines
    from roadseg.report.progress_strip import film

    best, worst = read_scenes(this.outputs["evaluate"].folder)
    train = this.outputs["train"].folder
    html = render(
        evaluation,
        best,
        worst,
        history=read_json_lines(train / "history.jsonl"),
        contact_sheet=(train / "contact_sheet.jpg").read_bytes(),
        timing=read_json_lines(train / "log" / "timing.jsonl"),
        pictures=film(train / "log" / "pictures"),
        decision=_told(this, decision) if decision else None,
        title=f"roadseg run on {evaluation['source']}",
    )
    write_atomic(folder / "report.html", html.encode())
    if decision:
        write_json(folder / "decision.json", decision.to_json())
