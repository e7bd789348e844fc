"""Plan a sweep: settings and seeds from the command's arguments, and the config of every run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from roadseg.config.sections import Config, describe, merge
from roadseg.config.yaml_file import parse_yaml
from roadseg.data.manifest import HOLDOUT
from roadseg.errors import ConfigError, UsageError

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

    base_is_config: whether the base is the config itself.
    """

    name: str
    base: str
    base_is_config: bool
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Parse `training.learning_rate=0.001,0.002` into a key and YAML values. Raises UsageError."""
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
    """Parse `3` (that many seeds from `first` on) or `0,1,2` (these seeds). Raises UsageError for anything else."""
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
        return [
            Setting(BASE),
            *(Setting(f"{k}={_format_value(v)}", {k: v}) for k, values in varied.items() for v in values),
        ]
    made = [dict(zip(varied, chosen, strict=True)) for chosen in itertools.product(*varied.values())]
    return [Setting(", ".join(f"{k}={_format_value(v)}" for k, v in values.items()) or BASE, values) for values in made]


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def plan_of(name: str, base: Config, vary: Sequence[str], seeds: str, one_factor: bool) -> Plan:
    """The plan for the command's arguments. Raises ConfigError with all errors, UsageError without arguments."""
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
    for alone in settings_of(
        varied, one_factor=True
    ):  # sections are checked as a whole only once their values are valid
        problems += _wrong(base, alone)
    return plan(name, base, settings_of(varied, one_factor), numbers, problems)


def plan(
    name: str, base: Config, settings: Sequence[Setting], seeds: Sequence[int], problems: Sequence[str] = ()
) -> Plan:
    """Plan every run of a sweep; a setting with the same config as an earlier one is left out.

    Compared with: the setting that is the base config, or else the first. Raises ConfigError with `problems`,
    every wrong value and unknown key of all settings, and every wrong seed.
    """
    raw, problems = base.model_dump(mode="json"), list(problems)
    for seed in seeds:
        problems += [f"  --seeds: {line.strip()}" for line in _wrong(base, Setting("", {SEED: seed}))]
    configs: dict[str, Config] = {}
    taken: dict[str, str] = {}  # config as text: its label
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
