"""Which settings of a sweep can't be trained: told before its first run, not when their own comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from roadseg.config import Config
from roadseg.errors import ArchiveError, ConfigError
from roadseg.files import read_json
from roadseg.progress import progress
from roadseg.stages import RECORD, Stages
from roadseg.sweep_record import counted
from roadseg.workspace import Workspace

if TYPE_CHECKING:
    from roadseg.sweep import Plan

SECTIONS = {"model", "training", "store", "aws"}  # what is looked at: the last two say where releases are


def refuse_untrainable(plan: Plan, workspace: Path, wait: bool) -> None:
    """Raises ConfigError that lists every setting that no data could be trained with; StoreError of their store.

    What was trained already is not looked at: it may have been on another machine.
    """
    to_come: dict[str, Config] = {}
    for point in plan.points:
        if not _is_trained(workspace, point.name):
            to_come.setdefault(point.setting, point.config)
    refusals: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    with progress(len(to_come), "settings looked at", "setting") as bar:
        for label, config in to_come.items():
            sections = _looked_at(config)
            if sections not in refusals:
                refusals[sections] = _refusal(config, workspace, wait)
            if refusal := refusals[sections]:
                labels.setdefault(refusal, []).append(label)
            bar.update()
    if labels:
        count = sum(map(len, labels.values()))
        told = ["\n".join(f"  {label}" for label in of) + f":\n{refusal}" for refusal, of in labels.items()]
        raise ConfigError(f"{count} of {counted(len(plan.settings), 'setting')} can't be trained:\n" + "\n".join(told))


def _is_trained(workspace: Path, name: str) -> bool:
    record = workspace / "runs" / name / RECORD
    output = read_json(record)["outputs"].get("train") if record.exists() else None
    return output is not None and (workspace / "stages" / "train" / output["key"]).is_dir()


def _looked_at(config: Config) -> str:
    """Equal for configs that are refused for the same."""
    sections = config.model_dump(mode="json", include=SECTIONS)
    del sections["training"]["seed"]
    return json.dumps(sections)


def _refusal(config: Config, workspace: Path, wait: bool) -> str:
    """One indented line for each thing, or nothing."""
    stages = Stages(config, Workspace(workspace, wait))
    try:
        stages.inputs()
        stages.look_ahead()
    except (ConfigError, ArchiveError) as e:
        lines = str(e).splitlines()
        of_several = lines[1:] if lines[0].endswith(":") else []  # the first counts them
        return "\n".join(f"    {line.strip()}" for line in of_several or lines)
    return ""
