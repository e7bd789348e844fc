"""Batches from worker processes: equal for any number of workers, bounded memory, no orphans."""

from __future__ import annotations

import logging
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from roadseg.data.augment.cpu import Augmentation, apply
from roadseg.data.batches import loader
from roadseg.data.batches.loader import Batch, Crops, batches_from_workers, prefetch_that_fits
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards
from roadseg.errors import RoadsegError
from roadseg.processes import keep_freed_memory
from tests.conftest import write_shards

CPU = torch.device("cpu")


def crops_of(shards: Shards, **changes: object) -> Crops:
    return Crops(shards.split("train"), Augmentation((32, 32), **changes), seed=3, fill=(9, 8, 7))


def stream(crops: Crops, workers: int, steps: int = 6, boxes: bool = False) -> Generator[Batch, None, None]:
    order = Order(crops.split.frames, 3)
    return batches_from_workers(crops, Batches(order, 4, 1, steps), workers, CPU, boxes)


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(shards: Shards, workers: int, boxes: bool) -> None:
    crops = crops_of(shards)
    alone, together = (list(stream(crops, n, 14, boxes)) for n in (0, workers))
    assert len(alone) == len(together) == 13  # slots are used more than once
    for a, b in zip(alone, together, strict=True):
        assert a.samples == b.samples
        assert torch.equal(a.image_BHWC, b.image_BHWC) and torch.equal(a.label_BHW, b.label_BHW)
        assert a.image_BHWC.shape == (4, 32, 32, 3) and a.image_BHWC.dtype == torch.uint8
        assert a.label_BHW.shape == (4, 32, 32) and a.label_BHW.dtype == torch.uint8


def test_a_row_is_the_crop_of_its_sample(shards: Shards) -> None:
    crops = crops_of(shards, rotate_deg=5.0)
    for batch in stream(crops, 0):
        for image, label, sample in zip(batch.image_BHWC, batch.label_BHW, batch.samples, strict=True):
            want_image, want_label = crops.crop(sample)
            np.testing.assert_array_equal(image, want_image)
            np.testing.assert_array_equal(label, want_label)
            whole_image, whole_label = crops.split.read(sample.index)
            d = crops.params(sample)
            box = slice(d.box[0], d.box[0] + d.box[2]), slice(d.box[1], d.box[1] + d.box[3])
            np.testing.assert_array_equal(want_image, apply(d, whole_image[box], whole_label[box], crops.fill)[0])


def test_boxes_augmented_together_are_the_crops_but_for_rounding(shards: Shards) -> None:
    crops = crops_of(shards, rotate_deg=0.0)
    for ours, theirs in zip(stream(crops, 0, boxes=True), stream(crops, 0), strict=True):
        far = (ours.image_BHWC.int() - theirs.image_BHWC.int()).abs() > 3
        assert far.float().mean() < 0.002
        assert (ours.label_BHW != theirs.label_BHW).float().mean() < 0.03  # halves fall either way


@pytest.mark.parametrize("rotate_deg", [0.0, 20.0])
@pytest.mark.parametrize("crop", [(20, 30), (300, 10)])
def test_no_crop_needs_more_than_the_largest_box(shards: Shards, rotate_deg: float, crop: tuple[int, int]) -> None:
    a = Augmentation(crop, scale=(0.5, 2.0), rotate_deg=rotate_deg)
    crops = Crops(shards.split("train"), a, 0, (0, 0, 0))
    order = Order(crops.split.frames, 0)
    sizes = [d.box[2] * d.box[3] for d in (crops.params(order(p)) for p in range(500))]
    assert 0.6 * crops.largest_box_px() < max(sizes) <= crops.largest_box_px()


@pytest.mark.parametrize(("workers", "free", "prefetch"), [(4, 13_000, 2), (4, 12_000, 1), (4, 7_600, 1), (0, 1, 2)])
def test_prefetch_is_limited_by_shared_memory(
    workers: int, free: int, prefetch: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Slots of 1,000 bytes in at most 80 % of the free memory: two or one per worker, plus two."""
    with caplog.at_level(logging.WARNING, "roadseg"):
        assert prefetch_that_fits(workers, 1000, free) == prefetch
    assert [r.message for r in caplog.records] == (
        ["/dev/shm has room for only 1 batch per loader process in advance, not 2"] if prefetch == 1 else []
    )


@pytest.mark.fault
def test_shared_memory_of_64_mib_is_refused_before_a_worker_starts(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_free_shared_bytes", lambda: 64 << 20)
    crops = Crops(shards.split("train"), Augmentation((1024, 1024)), 3, (0, 0, 0))
    with pytest.raises(RoadsegError) as e:
        next(batches_from_workers(crops, Batches(Order(crops.split.frames, 3), 5, 0, 2), 2, CPU))
    assert e.value.where == "/dev/shm" and "67 MB" in e.value.found and "105 MB" in e.value.expected
    assert len(list(batches_from_workers(crops, Batches(Order(crops.split.frames, 3), 5, 0, 2), 0, CPU))) == 2


def test_workers_survive_a_fork_after_opencv_used_its_threads(shards: Shards) -> None:
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 9)  # starts the pool
    try:
        assert len(list(stream(crops_of(shards, blur=1.0), 2))) == 5
    finally:
        cv2.setNumThreads(1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="specific to glibc")
def test_arrays_of_a_crop_are_not_faulted_in_again() -> None:
    keep_freed_memory()

    def faults_of_ten_arrays() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            np.ones((768, 768, 3), np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_ten_arrays()
    assert faults_of_ten_arrays() < 432  # pages of one array


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def gone(pids: set[int], within_s: float) -> bool:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(map(runs, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_stream_and_all_other_workers(shards: Shards) -> None:
    assert len(list(DataLoader([1, 2], num_workers=1))) == 2  # another loader, which installs PyTorch's handler
    before = children()
    batches = stream(crops_of(shards), 2, 1000)
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    start = time.monotonic()
    os.kill(min(workers), signal.SIGKILL)
    until = start + 1
    while time.monotonic() < until:  # PyTorch's own handler would raise here, or in whatever else runs
        pass
    with pytest.raises(RoadsegError, match="a loader process died"):
        next(batches)
    batches.close()
    assert gone(workers, 60) and time.monotonic() - start < 60


def private_bytes(pids: set[int]) -> int:
    """Memory of these processes; shared pages count in equal shares."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_memory_does_not_grow_over_epochs(shards: Shards) -> None:
    before = children()
    epoch = 60  # steps; 20 times that would show what a step leaves behind
    batches = stream(crops_of(shards, rotate_deg=3.0), 4, 20 * epoch + 1)
    used = []
    for step, _ in enumerate(batches, 1):
        if step in (epoch, 20 * epoch - 1):
            used.append(private_bytes({os.getpid(), *(children() - before)}))
    assert used[1] <= 1.05 * used[0]


CHILD = """
import sys, torch
from pathlib import Path
from test_loader import *
shards = Shards.load(Path(sys.argv[1]))
batches = stream(crops_of(shards), 2, 10**6)
next(batches)
print(*children(), flush=True)
while True: time.sleep(1)
"""


# A process that is still starting when its parent is killed: it only ever sees init as its parent.
LATE = """
import multiprocessing, os, time
from roadseg.data.batches.worker_processes import start_worker

def late(parent):
    while os.getppid() == parent: time.sleep(0.01)
    start_worker(0)
    time.sleep(600)

started = [multiprocessing.Process(target=late, args=(os.getpid(),)) for _ in range(2)]
for process in started: process.start()
print(*(process.pid for process in started), flush=True)
while True: time.sleep(1)
"""


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("script", [CHILD, LATE], ids=["at work", "still starting"])
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, script: str) -> None:
    write_shards(tmp_path / "shards")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    command = [sys.executable, "-c", script, str(tmp_path / "shards")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as parent:
        assert parent.stdout
        workers = set(map(int, parent.stdout.readline().split()))
        assert len(workers) == 2
        parent.kill()
    assert gone(workers, 60)
