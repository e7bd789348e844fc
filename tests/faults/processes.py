"""Processes that tests start, wait for, kill, and look for when they should be gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import roadseg

DEADLINE_S = 240


def environment(*paths: Path) -> dict[str, str]:
    """With this code and `paths` to import from. One thread, as in the tests: it decides how floats are summed."""
    found = os.pathsep.join(map(str, (Path(roadseg.__file__).parents[1], *paths)))
    return {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}


@contextmanager
def running(command: list[str], log: Path, *paths: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a process group of its own, killed in the end; what it prints is added to `log`."""
    with open(log, "ab") as f:
        process = subprocess.Popen(command, env=environment(*paths), stdout=f, stderr=f, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def when(process: subprocess.Popen[bytes], there: Callable[[], bool]) -> bool:
    """Wait until `there()`; False if the process ended before."""
    until = time.monotonic() + DEADLINE_S
    while not there():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, "it neither ends nor goes on"
        time.sleep(0.002)
    return True


def children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def gone(pids: Collection[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
