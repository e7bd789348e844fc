"""Files of a sweep in WORKSPACE/sweeps/NAME, and the check that they belong to the same sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roadseg.config.sections import Config
from roadseg.errors import UsageError
from roadseg.files import read_json, write_atomic, write_json
from roadseg.sweep.plan import Plan, Until
from roadseg.sweep.table import Result, markdown, page, rows

SCHEMA_VERSION = 1
RECORD = "sweep.json"
SCORED = {
    "train": "Scores of the averaged network on whole frames at the end of training (history.jsonl).",
    "evaluate": "Scores of the release archives on originals, as the evaluate stage gives them.",
}


def described(plan: Plan, until: Until) -> str:
    """Which scores they are, and what they are compared with."""
    base = " ".join(plan.base.split())
    if plan.base_is_config:
        return f"{SCORED[until]} The base is {base}: the config's own values."
    return f"{SCORED[until]} The base is {base}, the first setting: the config's own values are not among them."


def counted(n: int, word: str) -> str:
    return f"{n} {word}" + "s" * (n != 1)


def refuse_other(plan: Plan, base: Config, until: Until, folder: Path) -> None:
    """Raise UsageError if `folder` holds another sweep; the same sweep continues, also when sorted by another split."""
    if not (folder / RECORD).exists():
        return
    there, ours = read_json(folder / RECORD), json.loads(json.dumps(_request(plan, base, until), default=str))
    differing = [name for name in ours if there.get(name) != ours[name]]
    if "config" in differing:
        differing.remove("config")
        differing += _differing(there.get("config"), ours["config"])
    if differing:
        more = f" and {len(differing) - 5} more" * (len(differing) > 5)
        raise UsageError(
            f"another sweep of that name exists, with other {', '.join(differing[:5])}{more}",
            expected="the same sweep, to continue it, or none",
            where=str(folder),
            todo=f"pass another --name (what was trained is not trained again), or remove that folder "
            f"and {folder.parent.parent / 'runs' / plan.name}-*",
        )


def _request(plan: Plan, base: Config, until: Until) -> dict[str, Any]:
    return {
        "settings": [asdict(setting) for setting in plan.settings],
        "seeds": plan.seeds,
        "until": until,
        "config": base.model_dump(mode="json"),
    }


def _differing(there: Any, ours: Any, above: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    if not (isinstance(there, Mapping) and isinstance(ours, Mapping)):
        return [] if there == ours else [above or "config"]
    keys = dict.fromkeys([*ours, *there])
    return [found for k in keys for found in _differing(there.get(k), ours.get(k), f"{above}.{k}" if above else str(k))]


def write_tables(plan: Plan, base: Config, results: Sequence[Result], by: str, until: Until, folder: Path) -> None:
    """Write the three forms of the table for the runs so far."""
    table = rows(results, plan.base, by)
    left = len(plan.points) - len(results)
    note = f"{left} of {counted(len(plan.points), 'run')} are still to come." if left else ""
    title = f"{plan.name}: {counted(len(plan.settings), 'setting')}, {counted(len(plan.seeds), 'seed')}"
    content = {
        "schema_version": SCHEMA_VERSION,
        "name": plan.name,
        "by": by,
        "base": plan.base,
        "base_is_config": plan.base_is_config,
        "runs_to_come": left,
        "rows": [asdict(row) for row in table],
        **_request(plan, base, until),
    }
    write_json(folder / RECORD, json.loads(json.dumps(content, default=str)))
    scored = described(plan, until)
    write_atomic(folder / "sweep.md", markdown(title, table, by, scored, note).encode())
    html = page(title, table, by, scored, note, reports=until == "evaluate")
    write_atomic(folder / "sweep.html", html.encode())
