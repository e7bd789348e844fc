"""`roadseg sweep`: its arguments and what it prints."""

from __future__ import annotations

import argparse

from roadseg.config.sections import Config
from roadseg.errors import UsageError

MOST_RUNS = 64


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V,V", help="a config key and its values as YAML; repeatable"
    )
    parser.add_argument(
        "--seeds", default="", metavar="N|S,S", help="N seeds counting up from training.seed, or a list of seeds"
    )
    parser.add_argument(
        "--one-factor", action="store_true", help="vary one key at a time from the base config, not the full grid"
    )
    parser.add_argument("--name", default="sweep", help="WORKSPACE/sweeps/NAME, and runs NAME-001 ...")
    parser.add_argument("--until", choices=("train", "evaluate"), default="evaluate", help="the last stage of each run")
    parser.add_argument(
        "--by",
        default="",
        metavar="SPLIT",
        help="split whose mIoU ranks the settings; default: holdout if there is one, else data.split",
    )
    parser.add_argument("--yes", action="store_true", help=f"start more than {MOST_RUNS} runs without asking")
    parser.add_argument(
        "--no-wait", action="store_true", help="exit 5 instead of waiting while another run makes the same output"
    )


def sweep(a: argparse.Namespace, config: Config) -> int:
    from roadseg.sweep.plan import key_split, plan_of
    from roadseg.sweep.record import counted, described
    from roadseg.sweep.run import run_sweep
    from roadseg.sweep.table import markdown

    plan = plan_of(a.name, config, a.vary, a.seeds, a.one_factor)
    by = key_split(config, a.by, a.until)
    if len(plan.points) > MOST_RUNS and not a.yes:
        settings, seeds = counted(len(plan.settings), "setting"), counted(len(plan.seeds), "seed")
        raise UsageError(
            f"{settings} with {seeds} are {len(plan.points)} runs",
            expected=f"at most {MOST_RUNS}",
            todo="take fewer values or --one-factor, or pass --yes",
        )
    table = run_sweep(plan, config, by, until=a.until, workspace=a.workspace, wait=not a.no_wait, say=print)
    folder = a.workspace / "sweeps" / a.name
    print("\n" + markdown(a.name, table, by, described(plan, a.until)))
    for what, name in (("table", "sweep.md"), ("report", "sweep.html"), ("data", "sweep.json")):
        print(f"{what:<9} {folder / name}")
    return 1 if any(run.error for row in table for run in row.runs) else 0
