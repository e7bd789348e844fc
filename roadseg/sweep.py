"""`roadseg sweep`: ordinary runs over a grid, or one factor at a time, with seeds, and one table of them.

WORKSPACE/runs/NAME-001 ...        the runs; what is there already is not made again, so a stopped sweep goes on
WORKSPACE/sweeps/NAME/             sweep.json, sweep.md, sweep.html, written anew after every run
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from roadseg.config import Config, describe, merge
from roadseg.errors import Busy, ConfigError, DataError, Interrupted, RoadsegError, UsageError
from roadseg.files import lock, read_json, read_json_lines
from roadseg.pipeline import RunResult, run, run_folder
from roadseg.release.archive import load_release
from roadseg.stages import HOLDOUT
from roadseg.sweep_ahead import refuse_untrainable
from roadseg.sweep_record import refuse_other, write_tables
from roadseg.sweep_table import Result, Row, rows
from roadseg.train.place import place
from roadseg.yaml_file import parse_yaml

log = logging.getLogger(__name__)
Until = Literal["train", "evaluate"]
SEED = "training.seed"
BASE = "base"


@dataclass(frozen=True)
class Setting:
    """values: by dotted config key, laid over the base config."""

    label: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One run: a setting with a seed."""

    name: str
    setting: str
    seed: int
    config: Config


@dataclass(frozen=True)
class Plan:
    """base: the setting that the others are compared with. points: all settings with the first seed, then the next.

    base_is_config: whether that is the config as it was given.
    """

    name: str
    base: str
    base_is_config: bool
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]


# ---- what is to be run ----------------------------------------------------------------------


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`training.learning_rate=0.001,0.002` as key and values, each a YAML value. Raises UsageError."""
    key, equals, listed = text.partition("=")
    key, where = key.strip().replace("-", "_"), f"--vary {text}"
    if not equals or not all(key.split(".")):
        raise UsageError(f"{text!r}", expected="KEY=VALUE,VALUE...", where="--vary")
    if key == SEED:
        raise UsageError(f"{SEED} among the settings", where=where, todo="pass --seeds instead")
    values = parse_yaml(f"[{listed}]", where)
    if key == "training" and any(isinstance(value, Mapping) and "seed" in value for value in values):
        raise UsageError(f"{SEED} among the settings", where=where, todo="pass --seeds instead")
    if not values:
        raise UsageError("no value", expected=f"{key}=VALUE,VALUE...", where=where)
    return key, values


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """`3`: so many seeds from `first` on; `0,1,2`: these. Raises UsageError for what is no such list."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and "," not in text:
        numbers = list(range(first, first + numbers[0])) if 1 <= numbers[0] <= 1000 else []
    if not numbers or len(set(numbers)) < len(numbers):
        raise UsageError(f"{text!r}", expected="a count such as 3, or distinct seeds such as 0,1,2", where="--seeds")
    return tuple(numbers)


def settings_of(varied: Mapping[str, list[Any]], one_factor: bool) -> list[Setting]:
    """The full grid, or the base and each value alone."""
    if one_factor:
        return [Setting(BASE), *(Setting(f"{k}={_said(v)}", {k: v}) for k, values in varied.items() for v in values)]
    made = [dict(zip(varied, chosen, strict=True)) for chosen in itertools.product(*varied.values())]
    return [Setting(", ".join(f"{k}={_said(v)}" for k, v in values.items()) or BASE, values) for values in made]


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def plan_of(name: str, base: Config, vary: Sequence[str], seeds: str, one_factor: bool) -> Plan:
    """The plan of the command's arguments. Raises ConfigError with all that is wrong with them, UsageError for none."""
    if not vary and not seeds:
        raise UsageError("nothing to vary", expected="--vary KEY=VALUE,VALUE... or --seeds N")
    varied: dict[str, list[Any]] = {}
    numbers: tuple[int, ...] = (base.training.seed,)
    problems = []
    for text in vary:
        try:
            key, values = parse_vary(text)
            if key in varied:
                raise UsageError(f"{key} again", expected="each key once", where=f"--vary {text}")
            varied[key] = values
        except UsageError as e:
            problems.append(f"  {e}")
    try:
        numbers = parse_seeds(seeds, base.training.seed) if seeds else numbers
    except UsageError as e:
        problems.append(f"  {e}")
    for alone in settings_of(varied, one_factor=True):  # a check of a whole section waits until its values are right
        problems += _wrong(base, alone)
    return plan(name, base, settings_of(varied, one_factor), numbers, problems)


def plan(
    name: str, base: Config, settings: Sequence[Setting], seeds: Sequence[int], problems: Sequence[str] = ()
) -> Plan:
    """Every run of a sweep; a setting whose config another one has already is left out.

    Compared with: the setting that is the base config, or else the first. Raises ConfigError with `problems`,
    every wrong value and unknown key of all settings, and every wrong seed.
    """
    raw, problems = base.model_dump(mode="json"), list(problems)
    for seed in seeds:
        problems += [f"  --seeds: {line.strip()}" for line in _wrong(base, Setting("", {SEED: seed}))]
    configs: dict[str, Config] = {}
    taken: dict[str, str] = {}  # the config as text: by what label
    kept: list[Setting] = []
    for setting in settings:
        if wrong := _wrong(base, setting):
            problems += wrong
            continue
        config = Config.model_validate(overlaid(raw, setting.values))
        if (same := taken.setdefault(config.model_dump_json(), setting.label)) != setting.label:
            log.info("%s is left out: it is %s", setting.label, same)
        elif setting.label not in configs:
            kept.append(setting)
            configs[setting.label] = config
    if problems:
        lines = list(dict.fromkeys(problems))
        raise ConfigError(f"{len(lines)} wrong value{'s' if len(lines) > 1 else ''} in the sweep:\n" + "\n".join(lines))
    own = taken.get(base.model_dump_json())
    pairs = [(seed, setting.label) for seed in seeds for setting in kept]
    points = tuple(
        Point(f"{name}-{i:03d}", label, seed, _seeded(configs[label], seed)) for i, (seed, label) in enumerate(pairs, 1)
    )
    return Plan(name, own or kept[0].label, own is not None, tuple(kept), tuple(seeds), points)


def _wrong(base: Config, setting: Setting) -> list[str]:
    """A line for every wrong value and unknown key."""
    try:
        Config.model_validate(overlaid(base.model_dump(mode="json"), setting.values))
    except ValidationError as e:
        return describe(e, setting.label).splitlines()[1:]
    return []


def overlaid(raw: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config with values at dotted keys laid over it; a section's given keys over its others."""
    for key, value in values.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        raw = merge(raw, nested)
    return raw


def _seeded(config: Config, seed: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def key_split(base: Config, by: str, until: Until) -> str:
    """The split that rows are sorted and compared by: `by`, or the held-out one, or data.split. Raises UsageError."""
    splits = [base.data.split, *([HOLDOUT] if base.data.holdout_sequences else [])]
    if by and until == "evaluate" and by not in splits:
        raise UsageError(f"{by!r}", expected=f"a split that is scored: {', '.join(splits)}", where="--by")
    return by or splits[-1]


# ---- running it -----------------------------------------------------------------------------


def run_sweep(
    plan: Plan, base: Config, by: str, *, until: Until, workspace: Path, wait: bool, say: Callable[[str], None]
) -> list[Row]:
    """Run what is not there yet and leave the tables; rows as `sweep_table.rows` sorts them.

    A run that fails is recorded and the sweep goes on, unless the data that all share is refused. Raises
    Interrupted, with the tables of what is done written; Busy when another process is at it and not `wait`;
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
                say(f"[{i}/{len(plan.points)}] {_told(point, results[-1], by)}")
                write_tables(plan, base, results, by, until, folder)
                _require_scored(results[-1], by)
        except Interrupted as e:
            raise _interrupted(plan, len(results), e.exit_code - 128, e.found) from None
        except KeyboardInterrupt:
            raise _interrupted(plan, len(results), caught[0] if caught else signal.SIGINT, "stopped") from None
        lock_path.unlink(missing_ok=True)
    return rows(results, plan.base, by)


def _refuse_several() -> None:
    if (world := place().world) > 1:
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
    """One ordinary run and what it gave. An error of roadseg is recorded in the result.

    Raises Interrupted, Busy, and DataError when `data_shared`: every other run would end in it too.
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
    """Free what the run before held. torch.compile would give up, unsaid, after eight networks of one class."""
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


def _told(point: Point, result: Result, by: str) -> str:
    miou = result.miou.get(by)
    scored = "failed" if result.error else "not scored" if miou is None else f"{100 * miou:.2f} %"
    return f"{point.name} {point.setting}, seed {point.seed}: {by} mIoU {scored}"


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside, SIGTERM ends what runs as Ctrl-C does; the yielded list then holds its number.

    Training handles both signals itself while it lasts. Python lets only the main thread handle signals.
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
    told = f"{text}; {done} of {len(plan.points)} runs are done, give the same command again to go on"
    return Interrupted(told, signal_number=number)
