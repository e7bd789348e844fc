"""The commands of roadseg, and the one place that turns an error into a message and an exit code."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadseg.cli.convert import convert, convert_arguments
from roadseg.cli.data import data, data_arguments
from roadseg.cli.flags import parse_flags, unknown_flag
from roadseg.cli.profile import profile, profile_arguments
from roadseg.cli.sweep import sweep, sweep_arguments
from roadseg.config.sections import Config, load_config
from roadseg.errors import PeerFailed, RoadsegError, UsageError
from roadseg.logs import JsonLines, log_to_console
from roadseg.version import __version__

log = logging.getLogger("roadseg")
# Threads that spin while they wait make training a third faster on a quiet CPU and up to thirty times
# slower on a busy one. Read by OpenMP when torch is loaded, which is later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a lost rank means is said in a line; PyTorch would put its stack of C++ before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Processes that are ended at once leave semaphores behind; Python's tracker removes them and need not say so.
sys.warnoptions.append("ignore:resource_tracker:UserWarning")


@dataclass(frozen=True)
class Command:
    """about: one line for the list. add: its own arguments. call: (arguments, config) -> exit code."""

    about: str
    call: Callable[[argparse.Namespace, Config], int]
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see roadseg/errors.py for their meaning."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"roadseg {__version__}")
        return 0
    try:
        return _dispatch(argv[0], argv[1:])
    except PeerFailed as e:  # the rank that failed prints its own error
        return e.exit_code
    except RoadsegError as e:
        print(f"roadseg {argv[0]}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"roadseg {argv[0]}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        todo = "; free some of that disk (`roadseg clean` shows what no run needs), then run again"
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"roadseg {argv[0]}: {where}{e.strerror or e}{todo if full else ''}", file=sys.stderr)
        return 1
    except Exception as e:
        if os.environ.get("ROADSEG_DEBUG"):
            raise
        print(
            f"roadseg {argv[0]}: unexpected {type(e).__name__}: {e}; this is a fault of roadseg: "
            "run again with ROADSEG_DEBUG=1 for the traceback and report it",
            file=sys.stderr,
        )
        return 1


def usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return (
        "usage: roadseg COMMAND [arguments] [--section.key value ...]\n\n"
        + "\n".join(lines)
        + ("\n\nroadseg COMMAND --help tells a command's arguments and every config key.")
    )


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(
            f"no command {name!r}" + (f", perhaps you meant {near[0]}" if near else ""), expected=", ".join(COMMANDS)
        )
    command = COMMANDS[name]
    about = command.about.replace("...", "all that comes before,")
    own, flags = _split(rest)
    parser = argparse.ArgumentParser(f"roadseg {name}", description=about, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with sections data, training, ...")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), metavar="DIR", help="default ./workspace")
    command.add(parser)
    if "-h" in own or "--help" in own:
        print(parser.format_help())
        flags = ["--help"]
        parse_flags(_peek_config(own), flags, f"roadseg {name}", "The config's own keys:")
    parsed, unknown = parser.parse_known_intermixed_args(own)
    if unknown:
        raise unknown_flag(unknown, f"roadseg {name}")
    config = parse_flags(parsed.config, flags, f"roadseg {name}", about)
    log_to_console(sys.stderr)
    return command.call(parsed, config)


def _split(tokens: list[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, config flags such as --training.epochs with their values)."""
    own: list[str] = []
    flags: list[str] = []
    target = own
    for token in tokens:
        if token.startswith("--"):
            target = flags if "." in token.split("=")[0] else own
        target.append(token)
    return own, flags


def _peek_config(own: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args([token for token in own if token not in ("-h", "--help")])[0].config


# ---- the stages -----------------------------------------------------------------------------


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="default", help="the run's name: WORKSPACE/runs/NAME")
    parser.add_argument("--no-wait", action="store_true", help="exit 5 if another run makes what is needed")


def _stage(until: str) -> Callable[[argparse.Namespace, Config], int]:
    def call(a: argparse.Namespace, config: Config) -> int:
        from roadseg.pipeline.run import run, run_folder

        if (code := _on_all_hosts(config)) is not None:
            return code
        log.addHandler(JsonLines(run_folder(a.workspace, a.name) / "log.jsonl"))
        result = run(config, until, workspace=a.workspace, name=a.name, wait=not a.no_wait)  # type: ignore[arg-type]
        for stage, output in result.outputs.items():
            print(f"{stage:<9} {output.folder}")
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


def _on_all_hosts(config: Config) -> int | None:
    """On a host of a SageMaker cluster: run this command under torchrun, and return its exit code; elsewhere None."""
    from roadseg.train.distributed.environment import PORT, cluster_from_environment, sagemaker_hosts

    number, hosts = sagemaker_hosts()
    if len(hosts) < 2 or cluster_from_environment().world > 1:
        return None
    from torch.distributed.run import main as torchrun

    from roadseg.train.device import processes_per_machine

    t = config.training
    processes = processes_per_machine(t.gpus, t.device, processes_started=len(hosts))
    about = ["--nnodes", len(hosts), "--node-rank", number, "--nproc-per-node", processes]
    meeting = ["--master-addr", hosts[0], "--master-port", PORT]
    torchrun([*map(str, about), *map(str, meeting), "-m", "roadseg.cli", *sys.argv[1:]])
    return 0


def _print_scores(evaluation: dict[str, Any]) -> None:
    def percent(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:.2f} %"

    print(
        f"{'scores':<9} {evaluation['source']} {evaluation['split']}: mIoU {percent(evaluation['miou'])}, "
        f"pixel accuracy {percent(evaluation['pixel_accuracy'])} on {evaluation['images']} images"
    )
    for split, other in evaluation["other_splits"].items():
        print(f"{'':<9} {evaluation['source']} {split}: mIoU {percent(other['miou'])} on {other['images']} images")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _stage_arguments(parser)
    parser.add_argument(
        "--release", metavar="R", help="champion, a digest or a path: score it instead of the candidate"
    )


def _evaluate(a: argparse.Namespace, config: Config) -> int:
    if a.release is None:
        return _stage("evaluate")(a, config)
    from roadseg.pipeline.run import evaluate_release

    evaluation, folder = evaluate_release(config, a.release, workspace=a.workspace, wait=not a.no_wait)
    _print_scores(evaluation)
    print(f"{'metrics':<9} {folder / 'metrics.json'}")
    print(f"{'report':<9} {folder / 'report.html'}")
    return 0


# ---- using releases -------------------------------------------------------------------------


def _release_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", default="champion", metavar="R", help="champion (default), a digest or a path")


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="images and folders of images")
    _release_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where label maps and overlays go")
    parser.add_argument("--ids", choices=("trainIds", "labelIds"), default="trainIds", help="what label maps hold")
    parser.add_argument("--no-overlay", action="store_true", help="write label maps only")


def _predict(a: argparse.Namespace, config: Config) -> int:
    from roadseg.images.decode import Limits
    from roadseg.inference.predict import predict
    from roadseg.inference.predictor import Predictor

    predictor = Predictor(_load(a.release, a.workspace, config), config.evaluation.threads)
    limits = Limits(config.data.max_file_bytes, config.data.max_image_pixels)
    done = predict(predictor, a.inputs, a.out, ids=a.ids, overlay=not a.no_overlay, limits=limits)
    print(f"{'written':<9} {len(done.written)} files below {a.out}")
    if done.failed:
        print(
            f"{'skipped':<9} {len(done.failed)} unusable image{'s' * (len(done.failed) > 1)}:",
            *(f"  {reason}" for _, reason in done.failed),
            sep="\n",
        )
    return 1 if done.failed else 0


def _load(reference: str, workspace: Path, config: Config) -> Any:
    from roadseg.release.archive import load_release
    from roadseg.release.store.resolve import find_release

    return load_release(find_release(config, workspace, reference))


def _releases(a: argparse.Namespace, config: Config) -> int:
    from roadseg.release.store.resolve import store_of

    store = store_of(config, a.workspace)
    champion, past = store.champion(), store.history()
    mious = {c.digest: c.miou for c in past}
    for digest in store.releases():
        mark = "champion" if champion and champion.digest == digest else ""
        miou = f"mIoU {100 * mious[digest]:.2f} %" if digest in mious else ""
        print(f"{digest[:16]}  {mark:<8}  {miou}")
    print(f"\nhistory of {store.address}:" if past else f"no champion yet in {store.address}")
    for c in past:
        print(f"{c.serial:>4}  {c.promoted_at}  {c.digest[:16]}  mIoU {100 * c.miou:.2f} %")
    return 0


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="R", help="a digest or its prefix")


def _promote(a: argparse.Namespace, config: Config) -> int:
    from roadseg.push.stage import promote_by_hand
    from roadseg.release.store.resolve import CACHE, store_of

    store = store_of(config, a.workspace)
    before = store.champion()
    champion = promote_by_hand(store, getattr(a, "release", None), a.workspace / CACHE)
    was = before.digest[:16] if before else "none"
    print(f"{'champion':<9} {champion.digest[:16]} (mIoU {100 * champion.miou:.2f} %), was {was}")
    return 0


def _serve(a: argparse.Namespace, config: Config) -> int:
    from roadseg.release.store.resolve import find_release
    from roadseg.serve.app import container_release, container_settings, serve

    if a.port is not None:
        serve_section = {**config.serve.model_dump(), "port": a.port}
        config = load_config(None, {**config.model_dump(mode="json"), "serve": serve_section})
    if a.release is None and (unpacked := container_release()):
        serve(unpacked, container_settings(config.serve), labels=a.ids, say=print)
    else:
        archive = find_release(config, a.workspace, a.release or "champion")
        serve(archive, config.serve, labels=a.ids, say=print)
    return 0


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="N", help="the same as --serve.port")
    parser.add_argument("--release", metavar="R", help="champion (default; in a container what lies in /opt/ml/model)")
    parser.add_argument("--ids", choices=("trainIds", "labelIds"), default="trainIds", help="what answers hold")


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    _release_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the requests and send none")


def _deploy(a: argparse.Namespace, config: Config) -> int:
    from roadseg.deploy.sagemaker import deploy
    from roadseg.release.store.resolve import store_of

    deploy(a.release, store_of(config, a.workspace), config.aws, dry_run=a.dry_run, say=print)
    return 0


# ---- the house ------------------------------------------------------------------------------


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("show", "schema"), help="the resolved config as YAML, or its JSON schema")


def _config(a: argparse.Namespace, config: Config) -> int:
    if a.what == "schema":
        print(json.dumps(Config.model_json_schema(), indent=1))
    else:
        import yaml

        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _clean_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remove", action="store_true", help="remove what is listed")


def _clean(a: argparse.Namespace, config: Config) -> int:
    from roadseg.pipeline.workspace import leftovers, remove

    found = leftovers(a.workspace)
    for leftover in found:
        print(f"{leftover.size_bytes / 1e6:>10.1f} MB  {leftover.path}  ({leftover.why})")
        if a.remove:
            remove(leftover)
    total = sum(leftover.size_bytes for leftover in found) / 1e6
    if not found:
        print(f"nothing to remove in {a.workspace}")
    else:
        print(f"{total:>10.1f} MB  {'removed' if a.remove else 'can be removed: run again with --remove'}")
    return 0


COMMANDS: dict[str, Command] = {
    "run": Command("the five stages, cached", _stage("push"), _stage_arguments),
    "ingest": Command("check a data set and list its frames", _stage("ingest"), _stage_arguments),
    "transform": Command("... and make train-ready shards of it", _stage("transform"), _stage_arguments),
    "train": Command("... and train and export a candidate", _stage("train"), _stage_arguments),
    "evaluate": Command("... and score it; or any release on data of its classes", _evaluate, _evaluate_arguments),
    "push": Command("... and promote it if it beats the champion", _stage("push"), _stage_arguments),
    "data": Command("diff A B: how far apart data sets are; errors: labels a release doubts", data, data_arguments),
    "predict": Command("label maps and overlays for images and folders", _predict, _predict_arguments),
    "serve": Command("answer GET /ping and POST /invocations", _serve, _serve_arguments),
    "deploy": Command("put a release on a SageMaker endpoint", _deploy, _deploy_arguments),
    "sweep": Command("runs over config values and seeds, and a table of them", sweep, sweep_arguments),
    "profile": Command("parameters, MACs, memory and latency of a config or a release", profile, profile_arguments),
    "convert-checkpoint": Command("a torch checkpoint as .safetensors to start from", convert, convert_arguments),
    "releases": Command("what is and was champion", _releases),
    "promote": Command("make a release champion by hand", _promote, _promote_arguments),
    "rollback": Command("make the previous champion champion again", _promote),
    "config": Command("show the resolved config or its JSON schema", _config, _config_arguments),
    "clean": Command("list, and with --remove remove, what no run needs", _clean, _clean_arguments),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
