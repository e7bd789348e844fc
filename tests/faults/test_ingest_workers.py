"""The processes that read a data set: one that dies is told, and none outlives its parent."""

import os
import signal
from multiprocessing import get_context

import pytest

from roadseg.data.masks.form import MaskForm
from roadseg.errors import RoadsegError
from roadseg.images.decode import Limits
from roadseg.ingest.measure import INLINE_PAIRS, measure_pairs
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CAMVID
from roadseg.processes import start_worker
from tests.faults.processes import gone


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Pair):
    """Kills whoever unpickles it: a worker."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return die, ()


@pytest.mark.fault
def test_a_worker_that_dies_is_one_clear_error(tmp_path):
    pairs = [Deadly("train", str(i), "", "a.png", "b.png") for i in range(INLINE_PAIRS + 4)]
    with pytest.raises(RoadsegError, match="a process that checks images died.*lower data.workers"):
        measure_pairs(tmp_path, pairs, {"": MaskForm("ids", CAMVID)}, Limits(), 2)


def stand_by(ready: object) -> None:
    start_worker()
    ready.set()  # type: ignore[attr-defined]
    signal.pause()


def have_a_child(child_pid: object, ready: object) -> None:
    child = get_context("spawn").Process(target=stand_by, args=(ready,))
    child.start()
    child_pid.value = child.pid  # type: ignore[attr-defined]
    ready.wait(60)  # type: ignore[attr-defined]
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
def test_workers_end_with_a_killed_parent():
    spawn = get_context("spawn")
    child_pid, ready = spawn.Value("i", 0), spawn.Event()
    parent = spawn.Process(target=have_a_child, args=(child_pid, ready))
    parent.start()
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    assert gone([child_pid.value], 10), "the worker outlived its parent by ten seconds"
