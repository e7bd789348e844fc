"""The entry point: dispatch a command; turn an error into a message and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from roadseg.cli.convert import convert, convert_arguments
from roadseg.cli.data import data, data_arguments
from roadseg.cli.flags import parse_flags, unknown_flag
from roadseg.cli.inference import predict, predict_arguments, serve, serve_arguments
from roadseg.cli.profile import profile, profile_arguments
from roadseg.cli.releases import deploy, deploy_arguments, promote, promote_arguments, releases
from roadseg.cli.stages import evaluate, evaluate_arguments, stage, stage_arguments
from roadseg.cli.sweep import sweep, sweep_arguments
from roadseg.cli.workspace import clean, clean_arguments, config, config_arguments
from roadseg.config.sections import Config
from roadseg.errors import PeerFailed, RoadsegError, UsageError
from roadseg.logs import log_to_console
from roadseg.version import __version__

# Threads that spin while they wait make training a third faster on a quiet CPU and up to thirty times
# slower on a busy one. Read by OpenMP when torch is loaded, which is later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A dead rank is reported in one line; without this PyTorch prints its C++ stack first.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Killed worker processes leave semaphores behind; Python's resource tracker removes them, and its warning is noise.
sys.warnoptions.append("ignore:resource_tracker:UserWarning")


@dataclass(frozen=True)
class Command:
    """about: its line in the list. add: declares its own arguments. call: (arguments, config) -> exit code."""

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
            f"roadseg {argv[0]}: unexpected {type(e).__name__}: {e}; this is a bug in roadseg: "
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
        + ("\n\nroadseg COMMAND --help lists the command's arguments and every config key.")
    )


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UsageError(
            f"no command {name!r}" + (f", perhaps you meant {near[0]}" if near else ""), expected=", ".join(COMMANDS)
        )
    command = COMMANDS[name]
    about = command.about.replace("...", "all stages before,")
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
    parsed.command_line = [name, *rest]
    settings = parse_flags(parsed.config, flags, f"roadseg {name}", about)
    log_to_console(sys.stderr)
    return command.call(parsed, settings)


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


COMMANDS: dict[str, Command] = {
    "run": Command("run the five stages; reuse cached outputs", stage("push"), stage_arguments),
    "ingest": Command("check a data set and list its frames", stage("ingest"), stage_arguments),
    "transform": Command("... and write train-ready shards", stage("transform"), stage_arguments),
    "train": Command("... and train and export a candidate", stage("train"), stage_arguments),
    "evaluate": Command("... and score it; or score any release with --release", evaluate, evaluate_arguments),
    "push": Command("... and promote it if it beats the champion", stage("push"), stage_arguments),
    "data": Command("diff A B: compare two data sets; errors: find wrong labels", data, data_arguments),
    "predict": Command("write label maps and overlays for images and folders", predict, predict_arguments),
    "serve": Command("answer GET /ping and POST /invocations", serve, serve_arguments),
    "deploy": Command("put a release on a SageMaker endpoint", deploy, deploy_arguments),
    "sweep": Command("run a grid of config values and seeds, and tabulate the scores", sweep, sweep_arguments),
    "profile": Command("parameters, MACs, memory and latency of a config or release", profile, profile_arguments),
    "convert-checkpoint": Command("convert a torch checkpoint to .safetensors", convert, convert_arguments),
    "releases": Command("list releases and past champions", releases),
    "promote": Command("make a release champion, without the gate", promote, promote_arguments),
    "rollback": Command("go back to the previous champion", promote),
    "config": Command("show the resolved config or its JSON schema", config, config_arguments),
    "clean": Command("list what no run needs; remove it with --remove", clean, clean_arguments),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
