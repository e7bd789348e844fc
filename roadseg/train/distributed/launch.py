"""Start several ranks on this machine with PyTorch's elastic launcher, and report what failed.

The process that starts them computes nothing: elastic passes on signals and stops the others when one fails, and this
module turns what they end with into one error. The processes end with it, however it ends.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from roadseg.errors import Interrupted, RoadsegError
from roadseg.logs import LogSettings, current_log_settings, log_as
from roadseg.processes import cores, end_with_parent
from roadseg.progress import quiet
from roadseg.train.distributed.process_group import ranks_from_environment
from roadseg.train.distributed.run_store import read_error, write_error_file

HOST = "127.0.0.1"
LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CONSEQUENCES = {"PeerLost", "PeerFailed", "DistBackendError", "DistNetworkError", "DistStoreError", "Interrupted"}
OUT_OF_MEMORY = "unless somebody killed it, memory ran out: lower training.batch_size or training.workers; "


def launch(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Call function(ranks, *arguments) in `world` new processes of this machine and wait for all of them.

    function, arguments: picklable, and nothing that is open. Raises what the first rank to fail raised, an error that
    is not RoadsegError as RuntimeError or OSError; RoadsegError if one was killed; Interrupted after a signal.
    """
    failures: dict[int, Any] = {}
    signalled = 0
    with tempfile.TemporaryDirectory(prefix="roadseg-ranks-") as folder, _elastic_contained():
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=world, max_restarts=0, start_method="spawn",
            run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint=f"{HOST}:0", local_addr=HOST,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        try:
            elastic_launch(config, _run_rank)(function, arguments, current_log_settings())
        except ChildFailedError as e:
            failures = e.failures
        except SignalException as e:
            signalled = int(e.sigval)
        rows = [json.loads(path.read_bytes()) for path in sorted(Path(folder).rglob("error.json"), key=_modified)]
    if error := _verdict([row["message"]["extraInfo"]["roadseg"] for row in rows], failures, signalled):
        raise error


def run_torchrun(arguments: list[str]) -> int:
    """Run torchrun's command line in this process and return its exit code.

    That is 0, the exit code of the first rank of this machine to fail, or 128 + the number of the signal that ended it
    or this process. The ranks print their own errors.
    """
    with _elastic_contained():
        try:
            torchrun.main(arguments)
        except ChildFailedError as e:
            _, failure = e.get_first_failure()
            return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        except SignalException as e:
            return 128 + int(e.sigval)
    return 0


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


def _verdict(rows: list[dict[str, Any]], failures: dict[int, Any], signalled: int) -> Exception | None:
    """The cause among what the ranks ended with: an error of its own, a rank that was killed, a signal.

    rows: errors of ranks, oldest first. failures: elastic's, by rank.
    """
    for row in rows:
        if row["class"] not in CONSEQUENCES:
            return read_error(row)
    reported = {row["rank"] for row in rows}
    silent = [rank for rank, failure in failures.items() if rank not in reported and failure.exitcode]
    stopped = sorted((row for row in rows if row["class"] == "Interrupted"), key=lambda row: "SIG" not in row["text"])
    if stopped and not silent:
        return read_error(stopped[0])
    if signalled:
        name = signal.Signals(signalled).name
        return Interrupted(f"stopped by {name}; run again to go on", signal_number=signalled)
    if silent:
        first = min(silent, key=lambda rank: failures[rank].timestamp)
        return _killed(first, failures[first].pid, failures[first].exitcode)
    return read_error(rows[0]) if rows else None


def _killed(rank: int, pid: int, exit_code: int) -> RoadsegError:
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return RoadsegError(
        f"rank {rank} (process {pid}) {how}",
        expected="all ranks to reach the end",
        where="training.gpus",
        todo=(OUT_OF_MEMORY if exit_code == -signal.SIGKILL else "check its output; ")
        + "run again to go on after the last checkpoint",
    )


@contextmanager
def _elastic_contained() -> Iterator[None]:
    """Inside, elastic does not log; afterwards its signal handlers and variables are gone."""
    main = threading.current_thread() is threading.main_thread()  # only it may handle signals
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    names = [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHERS)]
    try:
        with quiet(*names, below=logging.CRITICAL + 1):
            yield
    finally:
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- in the processes that were started -----------------------------------------------------


def _run_rank(function: Callable[..., None], arguments: tuple[Any, ...], logs: LogSettings) -> None:
    _end_with_parent()
    ranks = ranks_from_environment()
    log_as(logs, "" if ranks.main else f"rank {ranks.rank}: ")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // ranks.on_this_machine))
    try:
        function(ranks, *arguments)
    except Interrupted as e:
        write_error_file(e, ranks.rank)  # and end as if done: a failure would make elastic stop the others' saving
    except BaseException as e:
        write_error_file(e, ranks.rank)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: NCCL might wait forever for the other ranks


def _end_with_parent() -> None:
    """Let the kernel end this process when its parent is gone, or a thread where there is no such call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if not parent.is_alive():  # before the call
            os._exit(1)
    else:
        end_with_parent()
