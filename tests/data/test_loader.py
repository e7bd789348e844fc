import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadseg.data.augment import Augmentation
from roadseg.data.loader import Crops, loader
from roadseg.data.sampler import Batches, epoch_order
from roadseg.data.shards import Shards


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 99), cut=st.integers(0, 15))
def test_every_epoch_holds_every_sample_once_and_a_resumed_stream_is_the_same(
    samples: int, batch: int, seed: int, cut: int
) -> None:
    whole = list(Batches(samples, batch, seed, 0, 20))
    assert list(Batches(samples, batch, seed, cut, 20)) == whole[cut:]
    stream = [key for keys in whole for key in keys]
    for epoch in range(len(stream) // samples):
        part = stream[epoch * samples : (epoch + 1) * samples]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(samples))


def test_epochs_differ_in_order() -> None:
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(0, 1, 50))
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(1, 0, 50))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: Shards, workers: int) -> None:
    crops = Crops(shards.split("train"), Augmentation((32, 32)), seed=3, fill=(0, 0, 0))

    def stream(n: int) -> list:
        return list(loader(crops, Batches(6, 4, 3, 1, 6), n, pin=False))

    alone, together = stream(0), stream(workers)
    assert len(alone) == len(together) == 5
    for a, b in zip(alone, together, strict=True):
        assert a.samples == b.samples
        assert torch.equal(a.image_BHWC, b.image_BHWC) and torch.equal(a.label_BHW, b.label_BHW)
        assert a.image_BHWC.shape == (4, 32, 32, 3) and a.image_BHWC.dtype == torch.uint8
