"""Refuse the settings of a sweep that can't be trained, before its first run."""

from __future__ import annotations

import json
from pathlib import Path

from roadseg.config.sections import Config
from roadseg.errors import ArchiveError, ConfigError, RoadsegError, StoreError
from roadseg.pipeline.context import Context
from roadseg.pipeline.preflight import is_trained, refuse_impossible, training_inputs
from roadseg.pipeline.workspace import Workspace
from roadseg.progress import progress
from roadseg.sweep.plan import Plan
from roadseg.sweep.record import counted

SECTIONS = {"model", "training", "store", "aws"}  # sections that are checked; the last two say where releases are


def refuse_untrainable(plan: Plan, workspace: Path, wait: bool) -> None:
    """Raises ConfigError that lists every setting that no data could be trained with.

    What was trained already is not refused: it may have been on another machine.
    """
    configs: dict[str, list[Config]] = {}
    for point in plan.points:
        configs.setdefault(point.setting, []).append(point.config)
    refusals: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    with progress(len(configs), "settings checked", "setting") as bar:
        for label, seeds in configs.items():
            sections = _checked_sections(seeds[0])
            if sections not in refusals:
                refusals[sections] = _refusal(seeds[0], workspace, wait)
            if (refusal := refusals[sections]) and not all(_is_trained(config, workspace) for config in seeds):
                labels.setdefault(refusal, []).append(label)
            bar.update()
    if labels:
        count = sum(map(len, labels.values()))
        told = ["\n".join(f"  {label}" for label in of) + f":\n{refusal}" for refusal, of in labels.items()]
        raise ConfigError(f"{count} of {counted(len(plan.settings), 'setting')} can't be trained:\n" + "\n".join(told))


def _is_trained(config: Config, workspace: Path) -> bool:
    context = Context(config=config, workspace=Workspace(workspace))
    try:
        return is_trained(context, training_inputs(context))
    except RoadsegError:
        return False


def _checked_sections(config: Config) -> str:
    """Equal for configs that are refused for the same."""
    sections = config.model_dump(mode="json", include=SECTIONS)
    del sections["training"]["seed"]
    return json.dumps(sections)


def _refusal(config: Config, workspace: Path, wait: bool) -> str:
    """One indented line for each thing, or nothing."""
    context = Context(config=config, workspace=Workspace(workspace, wait))
    try:
        refuse_impossible(context, training_inputs(context))
    except (ConfigError, ArchiveError, StoreError) as e:
        lines = str(e).splitlines()
        of_several = lines[1:] if lines[0].endswith(":") else []  # the first counts them
        return "\n".join(f"    {line.strip()}" for line in of_several or lines)
    return ""
