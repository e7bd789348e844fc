"""A training that is killed, stopped, starved of disk, fed with NaN: nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards
from roadseg.errors import RoadsegError
from roadseg.train import checkpoint
from tests.conftest import write_shards
from tests.faults import training_runs as runs
from tests.faults.processes import gone
from tests.faults.training_runs import STEPS, Driver, Run

pytestmark = pytest.mark.fault
KEEP_ALL = "from roadseg.train import checkpoint; checkpoint.prune = lambda folder, keep: None"


@dataclass(frozen=True)
class Whole:
    """An uninterrupted training: its shards, the digest of its checkpoint of every step, its history."""

    shards: Shards
    digests: dict[int, str]
    history: bytes


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with runs.driver() as started:
        yield started


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    shards = write_shards(folder / "shards")
    runs.to_the_end(lambda: driver.start(folder / "w", shards.folder, prelude=KEEP_ALL))
    found = runs.digests(folder / "w")
    assert sorted(found) == list(range(1, STEPS + 1))
    return Whole(shards, found, (runs.work(folder / "w") / "history.jsonl").read_bytes())


def assert_like(whole: Whole, workspace: Path) -> None:
    """Weights, average, batch norm and optimizer of the last step, and all losses and scores before it."""
    assert runs.digests(workspace)[STEPS] == whole.digests[STEPS]
    assert (runs.work(workspace) / "history.jsonl").read_bytes() == whole.history


# ── kills and signals ───────────────────────────────────────────────────────────────────────────

DIE_INSIDE_A_SAVE = """
import os, signal, sys

main, left = os.getpid(), [{count}]

def die(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.scandir", "os.listdir") and os.getpid() == main:
        if "/checkpoints" in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(main, signal.SIGKILL)

sys.addaudithook(die)
"""


def killed_inside_a_save(start: Callable[[str], Run], rng: random.Random) -> bool:
    """Before its n-th operation on a checkpoint's files, of ten or so a save; False if it got through before."""
    run = start(DIE_INSIDE_A_SAVE.format(count=rng.randint(3, 40)))
    while run.code() is None and runs.newest_step(run.workspace) < STEPS:
        time.sleep(0.002)
    code = run.code()
    if code is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return False
    assert code == -signal.SIGKILL, run.text()
    return True


def killed_at_a_random_step(start: Callable[[str], Run], rng: random.Random) -> bool:
    """After one of the next steps is saved, and up to about a step later."""
    run = start("")
    run.reaches(min(runs.newest_step(run.workspace) + rng.randint(1, 4), STEPS))
    time.sleep(rng.uniform(0, 0.15))
    run.kill(group=rng.random() < 0.5)
    return True


def killed_and_resumed(
    driver: Driver, whole: Whole, folder: Path, workers: int, seed: int, plain: int, inside: int
) -> None:
    """So many kills of both sorts in random order; whenever a training got to its end, another is begun."""
    rng, number = random.Random(seed), 0
    kinds = [killed_at_a_random_step] * plain + [killed_inside_a_save] * inside
    rng.shuffle(kinds)

    def start(prelude: str) -> Run:
        flags = ("--training.workers", str(workers))
        return driver.start(folder / f"w{number}", whole.shards.folder, *flags, prelude=prelude)

    while kinds:
        if kinds[-1](start, rng):
            kinds.pop()
        if runs.newest_step(folder / f"w{number}") == STEPS:
            assert_like(whole, folder / f"w{number}")
            number += 1
    runs.to_the_end(lambda: start(""))
    assert_like(whole, folder / f"w{number}")


@pytest.mark.parametrize(("workers", "seed"), [(0, 1), (2, 2)])
def test_killed_at_random_steps_and_inside_saves_it_ends_bit_identical(
    driver: Driver, whole: Whole, tmp_path: Path, workers: int, seed: int
) -> None:
    killed_and_resumed(driver, whole, tmp_path, workers, seed, plain=2, inside=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 4])
def test_fifty_kills_ten_of_them_inside_a_save(driver: Driver, whole: Whole, tmp_path: Path, workers: int) -> None:
    killed_and_resumed(driver, whole, tmp_path, workers, seed=50 + workers, plain=40, inside=10)


SLOW = """
import time
from roadseg.train.ema import EMA

update = EMA.update
EMA.update = lambda self, step: (time.sleep(0.3), update(self, step))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_within_30_s_and_is_143(driver: Driver, whole: Whole, tmp_path: Path, workers: int) -> None:
    """Sent to the whole group, as a job's end is, between the checkpoints of validations."""
    flags = ("--training.workers", str(workers), "--training.checkpoint-every", "1000")
    run = driver.start(tmp_path / "w", whole.shards.folder, *flags, prelude=SLOW)
    run.reaches(3)  # of a validation
    children = run.children()
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(30) == 143, run.text()
    assert "roadseg train: stopped by SIGTERM after step" in run.text()
    found = checkpoint.newest(runs.work(tmp_path / "w") / "checkpoints")
    assert found and 3 <= found[0] < STEPS and f"after step {found[0]}; run again to go on" in run.text()
    assert gone(children, 10)
    runs.to_the_end(lambda: driver.start(tmp_path / "w", whole.shards.folder))
    assert_like(whole, tmp_path / "w")


# ── disks ───────────────────────────────────────────────────────────────────────────────────────

FILLED = """
import os
from pathlib import Path
from roadseg.train import checkpoint

save = checkpoint.save

def save_on_a_full_disk(folder, step, *rest, **more):
    if step == 3:
        room = {share} * next(folder.glob("*.safetensors")).stat().st_size
        disk = os.statvfs(folder)
        with open({ballast!r}, "wb") as f:
            f.write(bytes(max(0, int(disk.f_bavail * disk.f_frsize - room))))
    save(folder, step, *rest, **more)

checkpoint.save = save_on_a_full_disk
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_disk_that_fills_up_while_saving(driver: Driver, whole: Whole, small_disk: Path, share: float) -> None:
    """share: of a checkpoint, that there is still room for."""
    workspace, ballast = small_disk / "w", small_disk / "ballast"
    run = driver.start(workspace, whole.shards.folder, prelude=FILLED.format(share=share, ballast=str(ballast)))
    assert run.wait() == 1, run.text()
    errors = [line for line in run.text().splitlines() if line.startswith("roadseg train:")]
    assert len(errors) == 1 and "Traceback" not in run.text()
    assert re.search(
        r"checkpoints/step-00000003.safetensors: no space left for \d+\.\d MB; free \d+\.\d MB on that disk .*, "
        r"then run again: it goes on after step 2$",
        errors[0],
    )
    assert not list(workspace.rglob("*.tmp")) and not list(workspace.rglob("step-00000003*"))
    found = checkpoint.newest(runs.work(workspace) / "checkpoints")
    assert found and found[0] == 2
    ballast.unlink()
    runs.to_the_end(lambda: driver.start(workspace, whole.shards.folder))
    assert_like(whole, workspace)


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_disk_that_is_full_before_the_first_checkpoint(
    driver: Driver, whole: Whole, small_disk: Path, gpus: int
) -> None:
    """Its first file is the one that can't be written, in the process that was started or in a rank of it."""
    workspace, ballast = small_disk / "w", small_disk / "ballast"
    flags = ("--training.checkpoint-every", "2", "--training.gpus", str(gpus), "--training.device", "cpu")
    first = driver.start(workspace, whole.shards.folder, *flags, "--training.steps", "100000")
    first.reaches(2)
    first.kill(group=True)
    with suppress(OSError), open(ballast, "wb") as f:
        while True:
            f.write(bytes(1 << 12))
            f.flush()
    again = driver.start(workspace, whole.shards.folder, *flags)
    assert again.wait() == 1, again.text()
    (error,) = [line for line in again.text().splitlines() if line.startswith("roadseg train:")]
    assert re.search(r"/w/\S+: (No space left on device|no space left for .* MB); free .*, then run again", error), (
        error
    )
    assert "unexpected" not in error and "Traceback" not in again.text()


def test_a_read_only_folder_is_not_reported_as_saved(small_disk: Path) -> None:
    network, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters())
    checkpoint.save(small_disk / "c", 1, network, average, optimizer)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RoadsegError, match="step-00000002.*read-only; make it writable or .*goes on after step 1"):
        checkpoint.save(small_disk / "c", 2, network, average, optimizer)
    found = checkpoint.newest(small_disk / "c")
    assert found and found[0] == 1


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────

SPOILT = """
from roadseg.model.deeplab import DeepLabV3Plus

forward, calls = DeepLabV3Plus.forward, [0]

def spoilt(self, image):
    output = forward(self, image)
    calls[0] += self.training
    if self.training and calls[0] == {step}:
        logits = output if hasattr(output, "register_hook") else output.logits
        {how}
    return output

DeepLabV3Plus.forward = spoilt
"""


@pytest.mark.parametrize(
    ("step", "how"),
    [
        (7, "logits.data.fill_(float('nan'))"),
        (5, "logits.register_hook(lambda gradient: gradient * float('inf'))"),
    ],
    ids=["NaN loss", "Inf gradient"],
)
def test_numbers_that_are_none_are_named_and_nothing_of_them_is_saved(
    driver: Driver, whole: Whole, tmp_path: Path, step: int, how: str
) -> None:
    run = driver.start(tmp_path / "w", whole.shards.folder, prelude=SPOILT.format(step=step, how=how))
    assert run.wait() == 1, run.text()
    assert f"at step {step}, nothing of which was saved" in run.text()
    order = Order(whole.shards.split("train").frames, 0)
    samples = next(iter(Batches(order, 2, step - 1, step)))
    assert all(f"{s.index} (epoch {s.epoch})" in run.text() for s in samples)
    # All that training goes on from is what it was after the step before: weights, average, batch norm, optimizer.
    found = runs.digests(tmp_path / "w")
    assert max(found) == step - 1 and found[step - 1] == whole.digests[step - 1]
    runs.to_the_end(lambda: driver.start(tmp_path / "w", whole.shards.folder))
    assert_like(whole, tmp_path / "w")


# ── loader processes ────────────────────────────────────────────────────────────────────────────


def test_a_killed_loader_process_is_a_clear_failure_and_leaves_no_orphans(
    driver: Driver, whole: Whole, tmp_path: Path
) -> None:
    flags = ("--training.workers", "2", "--training.steps", "100000", "--training.checkpoint-every", "1000")
    run = driver.start(tmp_path / "w", whole.shards.folder, *flags)
    until = time.monotonic() + runs.DEADLINE_S
    while len(workers := run.children()) < 2:
        assert time.monotonic() < until and run.code() is None, run.text()
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(min(workers), signal.SIGKILL)
    assert run.wait(60) == 1, run.text()
    assert "roadseg train: a loader process died; memory or /dev/shm may be full" in run.text()
    assert "run again to go on" in run.text() and gone(workers, 10)


SMALL_SHARED_MEMORY = """
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)
NEWNS, PRIVATE = 0x20000, 0x4000 | 0x40000
done = libc.unshare(NEWNS) or libc.mount(None, b"/", None, PRIVATE, None)
if done or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=64m"):
    os._exit(77)
"""


@pytest.mark.parametrize(("batch_size", "fits"), [(1200, False), (2, True)])
def test_64_mib_of_shared_memory(driver: Driver, whole: Whole, tmp_path: Path, batch_size: int, fits: bool) -> None:
    """Four slots of 22 MB don't fit, as is said before a process starts; small ones do."""
    flags = ("--training.workers", "2", "--training.batch-size", str(batch_size))
    run = driver.start(tmp_path / "w", whole.shards.folder, *flags, prelude=SMALL_SHARED_MEMORY)
    if fits and run.code() is None:
        while run.code() is None and runs.newest_step(tmp_path / "w") < 1:
            time.sleep(0.01)
    if (code := run.code() if fits else run.wait(60)) == 77:
        pytest.skip("a mount of its own is not permitted here")
    if fits:
        assert code is None, run.text()
        run.kill(group=True)
        return
    assert code == 1, run.text()
    assert re.search(r"roadseg train: /dev/shm: \d+ MB of shared memory are free; expected \d+ MB for 2", run.text())
    assert "--shm-size" in run.text() and not run.children()


# ── two runs that want the same ─────────────────────────────────────────────────────────────────


def test_a_second_run_is_refused_at_once_and_a_dead_owner_s_lock_is_free_at_once(
    driver: Driver, whole: Whole, tmp_path: Path
) -> None:
    """Also while the dead owner's loader processes, which were forked with its lock, are still there."""
    flags = ("--training.workers", "2", "--training.steps", "100000")
    owner = driver.start(tmp_path / "w", whole.shards.folder, *flags)
    owner.reaches(2)
    started = time.monotonic()
    second = driver.start(tmp_path / "w", whole.shards.folder, *flags, "--no-wait")
    assert second.wait() == 5, second.text()
    assert time.monotonic() - started < 2
    assert f"is being made by process {owner.pid} on " in second.text()
    workers = owner.children()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # held up in a read, say: they can't see that their parent is gone
    try:
        owner.kill()
        step = runs.newest_step(tmp_path / "w")
        third = driver.start(tmp_path / "w", whole.shards.folder, *flags, "--no-wait")
        third.reaches(step + 1)
        third.kill(group=True)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    assert gone(workers, 30)
