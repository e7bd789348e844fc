"""Worker processes: how many, and that none outlives the run it works for."""

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
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """For the start of every worker process.

    It must end with its parent, also if that is killed: it would go on writing where a new run writes.
    """
    cv2.setNumThreads(0)  # there is a process a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool, once,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, which must not be answered as the parent answers it
    end_with_parent()


def end_with_parent() -> None:
    """Let this process, which multiprocessing forked or spawned, end within a second of its parent, however that ends.

    Other ways fail now and then: PyTorch's loader processes remember who their parent is once they run, which is
    too late if it was killed meanwhile, and the pipe that multiprocessing watches may be held by siblings.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def keep_freed_memory() -> None:
    """Lets this process reuse arrays of a few MB at once. Elsewhere than on glibc nothing changes.

    glibc hands them back to the kernel when they are freed and has them faulted in again, page by
    page: a third of the time of a 768x768 crop.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)
    except (OSError, AttributeError, TypeError):
        return
