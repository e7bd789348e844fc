"""Worker processes: their number, their setup, and their end with the parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time

import cv2

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """Initializer of every worker process.

    A worker must end with its parent even if that is killed: it would keep writing to files of a new run.
    """
    cv2.setNumThreads(0)  # there is one process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles it, and ends the pool with SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler inherited from the parent
    end_with_parent()


def end_with_parent() -> None:
    """Make this multiprocessing child end within a second of its parent, however the parent ends.

    Other mechanisms fail sometimes: PyTorch's loader processes read their parent's id only once they run, too late if
    the parent was killed before, and siblings may hold the pipe that multiprocessing watches.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def keep_freed_memory() -> None:
    """Make malloc keep freed arrays of a few MB for reuse. Has an effect on glibc only.

    By default glibc returns them to the kernel and page-faults them in again: a third of the time of a 768x768 crop.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)
    except (OSError, AttributeError, TypeError):
        return
