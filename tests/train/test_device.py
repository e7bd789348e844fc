"""Which device, how many processes, and batches that they can share."""

from typing import Any

import pytest

from roadseg.errors import ConfigError
from roadseg.train.checks.batch import refuse_uneven_batch
from roadseg.train.device import choose_device, processes_per_machine


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many GPUs there seem to be."""

    def set_count(count: int, mps: bool = False) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)

    return set_count


def test_a_device_that_does_not_exist_is_refused() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError) as e:
        choose_device("cuda:99")
    assert e.value.where == "training.device"


def test_as_many_processes_as_asked_for(gpus: Any) -> None:
    gpus(4)
    assert [processes_per_machine(n, "auto") for n in (0, 1, 2, 4)] == [4, 1, 2, 4]
    assert processes_per_machine(3, "cpu") == 3 and processes_per_machine(0, "cpu") == 1
    gpus(0)
    assert processes_per_machine(0, "auto") == 1 and processes_per_machine(1, "mps") == 1


@pytest.mark.parametrize(
    ("count", "mps", "asked", "device", "started", "where"),
    [
        (2, False, 4, "auto", 1, "training.gpus"),
        (0, False, 2, "auto", 1, "training.gpus"),
        (0, True, 2, "auto", 1, "training.gpus"),
        (0, True, 2, "mps", 1, "training.gpus"),
        (4, False, 2, "cuda:1", 1, "training.gpus"),
        (4, False, 1, "cuda:1", 2, "training.device"),
        (0, True, 1, "auto", 2, "training.device"),
    ],
)
def test_impossible_numbers_of_gpus_are_refused(
    gpus: Any, count: int, mps: bool, asked: int, device: str, started: int, where: str
) -> None:
    gpus(count, mps)
    with pytest.raises(ConfigError) as e:
        processes_per_machine(asked, device, started)
    assert e.value.where == where and e.value.todo


def test_a_batch_that_ranks_can_not_share_is_refused() -> None:
    refuse_uneven_batch(8, 2, 4)
    for batch, accumulate, world, multiples in ((8, 4, 4, "16"), (3, 1, 2, "2 or 4")):
        with pytest.raises(ConfigError) as e:
            refuse_uneven_batch(batch, accumulate, world)
        assert e.value.where == "training.batch_size" and e.value.todo.startswith(f"set {multiples}:")
