"""Items made by a loader's processes: asked for one by one, under a stop, and never left waiting for the dead."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from roadseg.errors import RoadsegError
from roadseg.processes import end_with_parent, keep_freed_memory

POLL_S = 1.0  # whether to stop, and whether all live, while waiting for an item
LOCK_HELD_S = 5.0  # by a worker, for microseconds; longer: by one that was killed


def identity(item: Any) -> Any:
    """For DataLoader's collate_fn: what its dataset gives is an item already."""
    return item


def start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    keep_freed_memory()
    torch.set_num_threads(1)
    # Signals often reach the whole group; only the loop may answer them, with a checkpoint first. A
    # worker ends when the loader says so, or when it finds its parent gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def items_of(loader: DataLoader[Any], stopped: Callable[[], object] = bool) -> Generator[Any, None, None]:
    """What the loader's processes make, until its end or until `stopped` while they keep it waiting.

    An item that is a RoadsegError is raised, and one is when a process has died: here, where an item is asked
    for. No process outlives this generator, also when it is left by an exception whose traceback is kept:
    they ignore the SIGTERM that PyTorch would end them with at exit.
    """
    with _no_handler_of_deaths():
        source = iter(loader)
    if processes := getattr(source, "_workers", []):
        source._workers_done_event = _End(source._workers_done_event, processes)  # type: ignore[attr-defined]
    try:
        while True:
            if any(not process.is_alive() for process in processes):
                raise _died()
            try:
                item = next(source)
            except StopIteration:
                return
            except RuntimeError as e:
                if str(e).startswith("DataLoader worker"):
                    raise _died() from e
                if not str(e).startswith("DataLoader timed out"):
                    raise
                if stopped():
                    return
                continue
            if isinstance(item, RoadsegError):
                raise item
            yield item
    finally:
        if processes:
            source._shutdown_workers()  # type: ignore[attr-defined]  # else only its finaliser calls it
            for process in processes:
                if process.is_alive():  # held up in a read
                    process.kill()
                    process.join()


@contextmanager
def _no_handler_of_deaths() -> Iterator[None]:
    """PyTorch's handler of SIGCHLD, which a process's first loader sets, is taken back.

    It raises wherever the main thread is when a process dies: within a message to another rank, a file being
    written, or a finaliser, which swallows it. Loaders that are not ours notice a death by asking, every 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "") == _set_SIGCHLD_handler.__module__:
        before = signal.SIG_DFL
    try:
        yield
    finally:
        main = threading.current_thread() is threading.main_thread()
        if main and before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)


def _died() -> RoadsegError:
    return RoadsegError(
        "a loader process died",
        todo="memory or /dev/shm may be full: lower training.workers or training.batch_size; "
        "or a shard was shortened while it was read; run again to go on",
    )


class _End:
    """PyTorch's event that ends the workers, as their parent sees it.

    They look at it under a lock that all share: one that is killed just then holds it for ever, and
    the parent would wait for it for ever (seen once in some 300 kills on a busy machine).
    """

    def __init__(self, event: Any, processes: list[Any]) -> None:
        self._event, self._processes, self._ended = event, processes, False

    def is_set(self) -> bool:
        return self._ended

    def set(self) -> None:
        self._ended = True
        if self._event._cond.acquire(True, LOCK_HELD_S):
            self._event._cond.release()
            self._event.set()
        else:
            for process in self._processes:
                process.kill()
