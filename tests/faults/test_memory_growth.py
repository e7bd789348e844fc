"""Memory of a training with loader processes: what an epoch leaves behind would fill a machine overnight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import MICRO, write_shards
from tests.faults import training_runs as runs
from tests.faults.processes import children, running, when

FRAMES = 24  # and samples an epoch, of which a step takes two
HALF = (FRAMES // 4, FRAMES // 2)


def used_bytes(pids: set[int]) -> int:
    """Memory of these processes, what they share split among them."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def by_epoch(folder: Path, epochs: int, workers: int, flags: Sequence[str] = ()) -> list[int]:
    """Bytes of the training and its loader processes, in the middle of each epoch, of a process of its own.

    Not a fork: pages that it shares with its parent become its own one by one, and look like growth.
    """
    shards, workspace = write_shards(folder / "shards", train=FRAMES), folder / "w"
    command = [sys.executable, "-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(workspace)]
    command += ["--transform.shards", str(shards.folder), "--training.workers", str(workers)]
    command += ["--training.steps", "100000", "--training.validate-every", str(FRAMES // 2), *flags]
    command += ["--training.checkpoint-every", str(HALF[0])]
    used = []
    with running(command, folder / "log") as process:
        for epoch in range(epochs):
            middle = epoch * HALF[1] + HALF[0]
            there = partial(lambda step: runs.newest_step(workspace) >= step, middle)
            assert when(process, there), (folder / "log").read_text()
            workers_now = children(process.pid)
            assert len(workers_now) >= workers
            used.append(used_bytes({process.pid, *workers_now}))
    return used


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("epochs", "workers"),
    [(6, 2), pytest.param(20, 4, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_memory_grows_by_5_percent_at_most_after_the_first_epoch(tmp_path: Path, epochs: int, workers: int) -> None:
    used = by_epoch(tmp_path, epochs + 1, workers)
    # The second epoch's is the first that holds all that a validation and a checkpoint need.
    assert max(used[-2:]) <= 1.05 * used[1], [u >> 20 for u in used]
