"""What ranks tell one another, with each rank's view of one store in this process."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from roadseg.errors import DataError, PeerFailed, PeerLost
from roadseg.train.distributed import run_store
from roadseg.train.distributed.environment import Cluster
from roadseg.train.distributed.run_store import RunStore


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunStore, RunStore]]:
    store = dist.FileStore(str(tmp_path / "store"), -1)  # type: ignore[attr-defined]
    monkeypatch.setattr(run_store, "_connected", lambda: store)
    yield RunStore(Cluster(rank=0, world=2), "run 0"), RunStore(Cluster(rank=1, world=2), "run 0")


def test_a_published_value_reaches_the_others_of_the_same_run(two: tuple[RunStore, RunStore]) -> None:
    main, other = two
    threading.Timer(0.3, lambda: main.publish("key", "value")).start()
    assert other.wait("key", within_s=10) == "value"
    with pytest.raises(PeerLost):
        RunStore(other.cluster, "run 1").wait("key", within_s=0.3)


def test_a_barrier_waits_for_every_rank(two: tuple[RunStore, RunStore]) -> None:
    main, other = two
    with pytest.raises(PeerLost):
        main.barrier("ready", within_s=0.3)
    other.barrier("ready", within_s=1)  # rank 0 was there


def test_a_failure_ends_what_waits_and_the_first_one_counts(two: tuple[RunStore, RunStore]) -> None:
    main, other = two
    main.raise_failure()
    threading.Timer(0.3, lambda: main.fail(DataError("bad frame", where="x.png"))).start()
    began = time.monotonic()
    with pytest.raises(PeerFailed) as e:
        other.wait("key", within_s=20)
    assert "rank 0 failed: x.png: bad frame" in e.value.found and time.monotonic() - began < 5
    other.fail(ValueError("a consequence"))
    with pytest.raises(PeerFailed) as e:
        main.raise_failure()
    assert "bad frame" in e.value.found
