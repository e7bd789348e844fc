"""A loader process that is killed while it holds what the others, and the training, wait for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.processes import running

LOCKED = """
import os, signal, sys, time
from torch.utils.data import DataLoader, Dataset
from roadseg.data.batches.worker_processes import identity, items_of, start_worker
from roadseg.errors import RoadsegError

class Deadly(Dataset):
    def __getitems__(self, indices):
        if 4 in indices:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
            frame.f_locals["done_event"]._cond.acquire()  # as done_event.is_set() does, once a batch
            os.kill(os.getpid(), signal.SIGKILL)
        return indices

loader = DataLoader(
    Deadly(), batch_sampler=[[i] for i in range(100)], num_workers=2, collate_fn=identity, prefetch_factor=2,
    timeout=1.0, worker_init_fn=start_worker,
)
try:
    for item in items_of(loader):
        time.sleep(0.01)
except RoadsegError as e:
    print("told:", e, flush=True)
"""


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_with_the_lock_that_ends_the_others_it_is_told_all_the_same(tmp_path: Path) -> None:
    with running([sys.executable, "-c", LOCKED], tmp_path / "log") as process:
        code = process.wait(60)
    assert code == 0 and "told: a loader process died" in (tmp_path / "log").read_text()
