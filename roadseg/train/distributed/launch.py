"""Several processes of this machine that train together, with those of other machines if it is one of a cluster,
started by PyTorch's elastic launch.

The process that starts them computes nothing: it passes on signals, repeats what rank 0 logs, and
turns what they end with into one error. They end with it, however it ends.
"""

from __future__ import annotations

import ctypes
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
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from roadseg.errors import Interrupted, RoadsegError
from roadseg.processes import cores, end_with_parent
from roadseg.progress import quiet
from roadseg.train.distributed.environment import Place
from roadseg.train.distributed.process_group import outside
from roadseg.train.distributed.rendezvous import MEET_WITHIN, packed, unpacked

log = logging.getLogger("roadseg")
HOST = "127.0.0.1"
ALONE = Place()
LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CONSEQUENCES = {"PeerLost", "DistBackendError", "DistNetworkError", "DistStoreError"}  # of another rank's end


def launch(
    task: Callable[..., None], arguments: tuple[Any, ...], world: int, machine: Place = ALONE, run: str = ""
) -> None:
    """Call task(ranks, *arguments) in `world` processes of this machine and wait for all of them.

    task, arguments: picklable, and nothing that is open. machine: this one among those that call this together,
    each for as many processes, once its Words, of the name `run`, have met; its own are the ranks from
    machine.rank * world on. Raises what the first rank to fail raised, of an error that is not RoadsegError its
    text; RoadsegError if one was killed; PeerLost if only ranks of another machine can tell why; Interrupted
    after a signal.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(world)]
    failures: dict[int, int] = {}
    started: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="roadseg-ranks-") as folder, _signals_passed_on() as signalled, _quiet():
        heard = _Heard([reader for reader, _ in pipes], signalled)
        config = LaunchConfig(
            min_nodes=machine.world, max_nodes=machine.world, nproc_per_node=world, max_restarts=0,
            start_method="spawn", logs_specs=DefaultLogsSpecs(log_dir=folder), signals_to_handle="",
            **_meeting(machine, run),
        )  # fmt: skip
        try:
            elastic_launch(config, _rank)(task, arguments, [writer for _, writer in pipes], log.getEffectiveLevel())
        except ChildFailedError as e:
            failures = {rank: failure.exitcode for rank, failure in e.failures.items()}
            started = {rank: failure.pid for rank, failure in e.failures.items()}
        finally:
            for _, writer in pipes:
                writer.close()
            heard.finish()
    heard.pids = started | heard.pids  # of one that died before it said a word
    own = range(machine.rank * world, (machine.rank + 1) * world)
    if error := _verdict(own, heard, failures, signalled(), machine.world > 1):
        raise error


def _meeting(machine: Place, run: str) -> dict[str, Any]:
    """Where elastic's agents meet. By its own way between machines they would not be numbered as ours are."""
    if machine.world == 1:
        return {"run_id": uuid.uuid4().hex, "rdzv_backend": "c10d", "rdzv_endpoint": f"{HOST}:0", "local_addr": HOST}
    within = {"rank": machine.rank, "timeout": MEET_WITHIN.seconds}
    endpoint = f"{machine.address}:{machine.port}"  # in the store that Words keeps there, to the process's end
    return {"run_id": run, "rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": within}


class _Heard:
    """What the ranks sent, read by a thread. rows: of those that failed, in the order in which they said so."""

    def __init__(self, readers: list[Connection], signalled: Callable[[], int]) -> None:
        self.pids: dict[int, int] = {}
        self.done: set[int] = set()
        self.rows: list[dict[str, Any]] = []
        self._readers, self._signalled, self._finish = readers, signalled, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Read what is there and end. An end of file may be long in coming: a loader process may hold the pipe."""
        self._finish.set()
        self._thread.join()

    def _read(self) -> None:
        open_ = list(self._readers)
        while open_:
            last = self._finish.is_set()
            ready = wait(open_, 0.1)
            for reader in ready:
                assert isinstance(reader, Connection)
                try:
                    rank, kind, value = reader.recv()
                except (EOFError, OSError):
                    open_.remove(reader)
                else:
                    self._take(rank, kind, value)
            if last and not ready:
                return

    def _take(self, rank: int, kind: str, value: Any) -> None:
        if kind == "log":
            if rank:
                value.msg = f"rank {rank}: {value.msg}"
            logging.getLogger(value.name).handle(value)
        elif kind == "pid":
            self.pids[rank] = value
            if number := self._signalled():  # which came before there was somebody to pass it on to
                os.kill(value, number)
        elif kind == "done":
            self.done.add(rank)
        else:
            self.rows.append(value)


def _verdict(own: range, heard: _Heard, exit_codes: dict[int, int], signalled: int, others: bool) -> Exception | None:
    """The cause among all that came of it: what is no other rank's end; a signal; a silent end; the rest.

    own: the ranks of this machine. others: whether there are more elsewhere, whose end may be the cause.
    """
    if len(heard.done) == len(own):
        return None
    causes = [row for row in heard.rows if row["class"] not in {*CONSEQUENCES, "Interrupted"}]
    if causes:
        return unpacked(causes[0])
    if stops := sorted((r for r in heard.rows if r["class"] == "Interrupted"), key=lambda r: "SIG" not in r["text"]):
        return unpacked(stops[0])
    if signalled:
        name = signal.Signals(signalled).name
        return Interrupted(f"stopped by {name}; run again to go on", signal_number=signalled)
    told = heard.done | {row["rank"] for row in heard.rows}
    silent = [rank for rank in exit_codes if rank not in told]
    if not (others and heard.rows):  # else those without an exit code were ended for what a row says
        silent += [rank for rank in own if rank not in told]
    if silent or not heard.rows:
        return _ended_silently(silent[0] if silent else own[0], heard, exit_codes)
    return unpacked(heard.rows[0])


_SHORT_OF_MEMORY = "unless somebody killed it, memory ran out: lower training.batch_size or training.workers; "


def _ended_silently(rank: int, heard: _Heard, exit_codes: dict[int, int]) -> RoadsegError:
    code = exit_codes.get(rank)
    how = "ended without a word" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return RoadsegError(
        f"rank {rank} (process {heard.pids.get(rank, 'not started')}) {how}",
        expected="all ranks to reach the end",
        where="training.gpus",
        todo=(_SHORT_OF_MEMORY if code in (None, -signal.SIGKILL) else "look at what it said; ")
        + "run again to go on after the last checkpoint",
    )


@contextmanager
def _signals_passed_on() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and SIGINT go to the ranks, which save and stop; yields what tells the first that came."""
    caught: list[int] = []
    before = set(multiprocessing.active_children())

    def ours() -> list[BaseProcess]:
        return [process for process in multiprocessing.active_children() if process not in before]

    def pass_on(number: int, _: object) -> None:
        caught.append(number)
        for process in ours():
            if process.pid:
                os.kill(process.pid, number)

    main = threading.current_thread() is threading.main_thread()  # Python lets only it handle signals
    old = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for process in ours():  # none, unless starting them failed halfway
            process.kill()
            process.join()
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, elastic does not log; what it would say of failures is told better by `_verdict`."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHERS)]
    try:
        with quiet(*names, below=logging.CRITICAL + 1):
            yield
    finally:
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)


# ---- in the processes that were started -----------------------------------------------------


def _rank(task: Callable[..., None], arguments: tuple[Any, ...], writers: list[Connection], level: int) -> None:
    _end_with_parent()
    ranks = outside()
    for number, other in enumerate(writers):
        if number != ranks.local_rank:
            other.close()
    channel = _Channel(ranks.rank, writers[ranks.local_rank])
    channel.send("pid", os.getpid())
    log.handlers[:], log.propagate = [channel], False
    log.setLevel(level if ranks.main else max(level, logging.WARNING))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // ranks.on_this_machine))
    try:
        task(ranks, *arguments)
    except Interrupted as e:
        channel.send("failed", packed(e, ranks.rank))
        return  # as one that is through: another end would have the launcher hurry the others
    except BaseException as e:
        if not isinstance(e, KeyboardInterrupt):  # the parent knows of it
            channel.send("failed", packed(e, ranks.rank))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: nothing of a failed run is worth waiting for, and NCCL may wait for ever
    channel.send("done", None)


class _Channel(logging.Handler):
    """To the process that started this one: log records and how it ended."""

    def __init__(self, rank: int, writer: Connection) -> None:
        super().__init__()
        self._rank, self._writer = rank, writer

    def send(self, kind: str, value: Any) -> None:
        with self.lock or threading.RLock():
            self._writer.send((self._rank, kind, value))

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.send("log", record)


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
