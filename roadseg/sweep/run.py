"""Run a sweep: ordinary runs over a grid or one factor at a time, with seeds, and one table of them.

WORKSPACE/runs/NAME-001 ...        the runs; finished ones are not made again, so a stopped sweep continues
WORKSPACE/sweeps/NAME/             sweep.json, sweep.md, sweep.html, rewritten after every run
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roadseg.config.sections import Config
from roadseg.errors import Busy, DataError, Interrupted, RoadsegError, UsageError
from roadseg.files import lock, read_json, read_json_lines
from roadseg.pipeline.run import RunResult, run, run_folder
from roadseg.release.archive import load_release
from roadseg.sweep.plan import Plan, Point, Until
from roadseg.sweep.preflight import refuse_untrainable
from roadseg.sweep.record import refuse_other, write_tables
from roadseg.sweep.table import Result, Row, rows
from roadseg.train.distributed.environment import cluster_from_environment

log = logging.getLogger(__name__)


def run_sweep(
    plan: Plan, base: Config, by: str, *, until: Until, workspace: Path, wait: bool, say: Callable[[str], None]
) -> list[Row]:
    """Run what is missing and write the tables; returns rows as `table.rows` sorts them.

    A run that fails is recorded and the sweep continues, unless data that all runs share is refused. Raises
    Interrupted after writing the tables of finished runs; Busy if another process runs it and not `wait`;
    ConfigError, before the first run, for settings that can't be trained whatever the data;
    UsageError for another sweep of that name, and for several processes: all would wait for the one with the lock.
    """
    _refuse_several()
    folder = workspace / "sweeps" / plan.name
    run_folder(workspace, plan.points[0].name)  # refuses a name that is a path
    shared = not any(key.split(".")[0] in ("data", "transform") for s in plan.settings for key in s.values)
    results: list[Result] = []
    lock_path = folder.with_name(f"{plan.name}.lock")
    with lock(lock_path, f"sweep {plan.name}", wait=wait, say=log.warning), interruptible() as caught:
        refuse_other(plan, base, until, folder)
        try:
            refuse_untrainable(plan, workspace, wait)
            folder.mkdir(parents=True, exist_ok=True)
            for i, point in enumerate(plan.points, 1):
                results.append(run_point(point, until, workspace, wait, data_shared=shared))
                say(f"[{i}/{len(plan.points)}] {_result_line(point, results[-1], by)}")
                write_tables(plan, base, results, by, until, folder)
                _require_scored(results[-1], by)
        except Interrupted as e:
            raise _interrupted(plan, len(results), e.exit_code - 128, e.found) from None
        except KeyboardInterrupt:
            raise _interrupted(plan, len(results), caught[0] if caught else signal.SIGINT, "stopped") from None
        lock_path.unlink(missing_ok=True)
    return rows(results, plan.base, by)


def _refuse_several() -> None:
    if (world := cluster_from_environment().world) > 1:
        raise UsageError(
            f"{world} processes were started",
            expected="one, which starts those of each run itself",
            where="the environment",
            todo="start it without torchrun and on one machine; --training.gpus N trains each run on N GPUs",
        )


def _require_scored(result: Result, by: str) -> None:
    if not result.error and by not in result.miou:
        raise UsageError(f"{by!r}", expected=f"a split that is scored: {', '.join(result.miou)}", where="--by")


def run_point(point: Point, until: Until, workspace: Path, wait: bool, *, data_shared: bool = False) -> Result:
    """Execute one run. A RoadsegError is recorded in the result.

    Raises Interrupted, Busy, and with `data_shared` DataError, which every other run would raise too.
    """
    try:
        return _result(point, run(point.config, until, workspace=workspace, name=point.name, wait=wait))
    except (Interrupted, Busy):
        raise
    except RoadsegError as e:
        if data_shared and isinstance(e, DataError):
            raise
        log.warning("%s failed: %s", point.name, e)
        return Result(point.name, point.setting, point.seed, error=str(e))
    finally:
        forget()


def forget() -> None:
    """Free the memory of the run before. torch.compile would silently give up after eight networks of one class."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _result(point: Point, done: RunResult) -> Result:
    train = done.outputs["train"]
    timing = train.folder / "log" / "bottleneck.json"
    model = load_release(train.folder / "model.tar.gz").model
    if done.evaluation is None:
        last = {row["split"]: row["miou"] for row in read_json_lines(train.folder / "history.jsonl") if "split" in row}
        scores: dict[str, dict[str, Any]] = {split: {"miou": miou} for split, miou in last.items()}
        fingerprints = model["training"]["data_fingerprints"]
    else:
        scores = {done.evaluation["split"]: done.evaluation, **done.evaluation["other_splits"]}
        fingerprints = {split: score["data_fingerprint"] for split, score in scores.items()}
    return Result(
        point.name,
        point.setting,
        point.seed,
        train_key=train.key,
        miou={split: score["miou"] for split, score in scores.items()},
        class_iou={split: score["class_iou"] for split, score in scores.items() if "class_iou" in score},
        fingerprints={split: fingerprints.get(split, "") for split in scores},
        train_seconds=read_json(train.folder / "stage.json")["seconds"],
        images_per_s=read_json(timing)["images_per_s"] if timing.exists() else None,
        parameters=model["parameters"],
    )


def _result_line(point: Point, result: Result, by: str) -> str:
    miou = result.miou.get(by)
    scored = "failed" if result.error else "not scored" if miou is None else f"{100 * miou:.2f} %"
    return f"{point.name} {point.setting}, seed {point.seed}: {by} mIoU {scored}"


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside, SIGTERM acts like Ctrl-C; the yielded list then holds the signal's number.

    Training handles both signals itself. Only the main thread can handle signals.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def stop(number: int, _: object) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, old)


def _interrupted(plan: Plan, done: int, number: int, found: str) -> Interrupted:
    text = found.removesuffix("; run again to go on")
    message = f"{text}; {done} of {len(plan.points)} runs are done, give the same command again to go on"
    return Interrupted(message, signal_number=number)
