"""Worker processes: how many, and that none outlives the run it works for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import cv2


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """For the start of every worker process.

    It must end with its parent, also if that is killed: it would go on writing where a new run writes.
    """
    cv2.setNumThreads(0)  # there is a process a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool, once
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
