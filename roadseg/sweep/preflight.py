"""Refuse the settings of a sweep that can't be trained, before its first run."""

from __future__ import annotations

import json
from pathlib import Path

from roadseg.config.sections import Config
from roadseg.errors import ArchiveError, ConfigError, RoadsegError, StoreError
from roadseg.pipeline.context import Context
from roadseg.pipeline.preflight import refuse_impossible, training_inputs
from roadseg.pipeline.stages import find_trained
from roadseg.pipeline.workspace import Workspace
from roadseg.progress import progress
from roadseg.sweep.plan import Plan
from roadseg.sweep.record import counted

SECTIONS = {"model", "training", "store", "aws"}  # sections that are checked; the last two say where releases are


def refuse_untrainable(plan: Plan, workspace: Path, wait: bool) -> None:
    """Raise ConfigError that lists every setting that can't be trained on any data.

    Settings that are trained already, perhaps on another machine, are not refused.
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
        lines = ["\n".join(f"  {label}" for label in of) + f":\n{refusal}" for refusal, of in labels.items()]
        raise ConfigError(f"{count} of {counted(len(plan.settings), 'setting')} can't be trained:\n" + "\n".join(lines))


def _is_trained(config: Config, workspace: Path) -> bool:
    context = Context(config=config, workspace=Workspace(workspace))
    try:
        return find_trained(context, training_inputs(context)) is not None
    except RoadsegError:
        return False


def _checked_sections(config: Config) -> str:
    """The sections that decide about a refusal, as text."""
    sections = config.model_dump(mode="json", include=SECTIONS)
    del sections["training"]["seed"]
    return json.dumps(sections)


def _refusal(config: Config, workspace: Path, wait: bool) -> str:
    """One indented line for each reason, or an empty text."""
    context = Context(config=config, workspace=Workspace(workspace, wait))
    try:
        refuse_impossible(context, training_inputs(context))
    except (ConfigError, ArchiveError, StoreError) as e:
        lines = str(e).splitlines()
        of_several = lines[1:] if lines[0].endswith(":") else []  # the first counts them
        return "\n".join(f"    {line.strip()}" for line in of_several or lines)
    return ""
