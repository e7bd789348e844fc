"""Iterate over a PyTorch DataLoader that can be stopped and reports dead workers."""

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

POLL_S = 1.0  # while waiting for an item: check for a stop and for dead processes
LOCK_TIMEOUT_S = 5.0  # workers hold the lock for microseconds; a longer time means its holder was killed


def identity(item: Any) -> Any:
    """A collate_fn for datasets whose items are whole batches."""
    return item


def start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    keep_freed_memory()
    torch.set_num_threads(1)
    # Signals often reach the whole process group, but only the training loop may handle them, to save a checkpoint
    # first. A worker ends when the loader ends it or when its parent is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def items_of(loader: DataLoader[Any], stopped: Callable[[], object] = bool) -> Generator[Any, None, None]:
    """The loader's items, until its end or until `stopped()` is true while waiting for one.

    Raises RoadsegError if an item is one, or if a process has died, when the next item is requested. No process
    outlives this generator, even if an exception keeps it alive by its traceback: workers ignore the SIGTERM that
    PyTorch sends at exit.
    """
    with _without_sigchld_handler():
        source = iter(loader)
    if processes := getattr(source, "_workers", []):
        source._workers_done_event = _EndEvent(source._workers_done_event, processes)  # type: ignore[attr-defined]
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
            source._shutdown_workers()  # type: ignore[attr-defined]  # else called only by its finalizer
            for process in processes:
                if process.is_alive():  # blocked in a read
                    process.kill()
                    process.join()


@contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Remove the SIGCHLD handler that PyTorch installs with a process's first loader.

    It raises wherever the main thread is when a worker dies: while it sends a message to another rank, while it writes
    a file, or in a finalizer, which swallows the error. Other loaders still detect a death by polling, every 5 s.
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
        "or a shard was truncated while it was read; run again to continue",
    )


class _EndEvent:
    """The parent's view of PyTorch's event that ends the workers.

    Workers read the event under a shared lock. A worker killed at that moment holds the lock forever, and the parent
    would wait forever (observed once in about 300 kills on a busy machine).
    """

    def __init__(self, event: Any, processes: list[Any]) -> None:
        self._event, self._processes, self._ended = event, processes, False

    def is_set(self) -> bool:
        return self._ended

    def set(self) -> None:
        self._ended = True
        if self._event._cond.acquire(True, LOCK_TIMEOUT_S):
            self._event._cond.release()
            self._event.set()
        else:
            for process in self._processes:
                process.kill()
