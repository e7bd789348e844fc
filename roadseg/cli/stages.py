"""`roadseg run` and the five stages: their arguments and what they print."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from roadseg.config.sections import Config
from roadseg.logs import JsonLines

log = logging.getLogger("roadseg")


def stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="default", help="the run's name: WORKSPACE/runs/NAME")
    parser.add_argument(
        "--no-wait", action="store_true", help="exit 5 instead of waiting while another run makes the same output"
    )


def stage(until: str) -> Callable[[argparse.Namespace, Config], int]:
    """The command that runs every stage up to and including `until`."""

    def call(a: argparse.Namespace, config: Config) -> int:
        from roadseg.pipeline.run import run, run_folder

        if (code := _run_on_all_hosts(a.command_line, config)) is not None:
            return code
        log.addHandler(JsonLines(run_folder(a.workspace, a.name) / "log.jsonl"))
        result = run(config, until, workspace=a.workspace, name=a.name, wait=not a.no_wait)  # type: ignore[arg-type]
        for name, output in result.outputs.items():
            print(f"{name:<9} {output.folder}")
        if result.outputs and (page := result.folder / "data_report.html").exists():
            print(f"{'data':<9} {page}")
        if result.evaluation:
            _print_scores(result.evaluation)
            print(f"{'report':<9} {result.folder / 'report.html'}")
        if result.decision:
            print(
                f"{'release':<9} {result.decision.candidate[:12]} {result.decision.outcome}: {result.decision.reason}"
            )
        return 0

    return call


def _run_on_all_hosts(command_line: list[str], config: Config) -> int | None:
    """On a host of a SageMaker cluster: run this command under torchrun, and return its exit code; elsewhere None."""
    from roadseg.train.distributed.environment import PORT, cluster_from_environment, sagemaker_hosts

    number, hosts = sagemaker_hosts()
    if len(hosts) < 2 or cluster_from_environment().world > 1:
        return None
    from roadseg.train.device import processes_per_machine
    from roadseg.train.distributed.launch import run_torchrun

    t = config.training
    processes = processes_per_machine(t.gpus, t.device, processes_started=len(hosts))
    machines = ["--nnodes", len(hosts), "--node-rank", number, "--nproc-per-node", processes]
    rendezvous = ["--master-addr", hosts[0], "--master-port", PORT]
    return run_torchrun([*map(str, machines), *map(str, rendezvous), "-m", "roadseg.cli", *command_line])


def _print_scores(evaluation: dict[str, Any]) -> None:
    def percent(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:.2f} %"

    print(
        f"{'scores':<9} {evaluation['source']} {evaluation['split']}: mIoU {percent(evaluation['miou'])}, "
        f"pixel accuracy {percent(evaluation['pixel_accuracy'])} on {evaluation['images']} images"
    )
    for split, other in evaluation["other_splits"].items():
        print(f"{'':<9} {evaluation['source']} {split}: mIoU {percent(other['miou'])} on {other['images']} images")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    stage_arguments(parser)
    parser.add_argument(
        "--release", metavar="R", help="score this release (champion, a digest or a path) instead of the candidate"
    )


def evaluate(a: argparse.Namespace, config: Config) -> int:
    if a.release is None:
        return stage("evaluate")(a, config)
    from roadseg.pipeline.run import evaluate_release

    evaluation, folder = evaluate_release(config, a.release, workspace=a.workspace, wait=not a.no_wait)
    _print_scores(evaluation)
    print(f"{'metrics':<9} {folder / 'metrics.json'}")
    print(f"{'report':<9} {folder / 'report.html'}")
    return 0
