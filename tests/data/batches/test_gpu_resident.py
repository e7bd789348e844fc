"""Frames in the memory of a device, cut out there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches.feed import Feed, feed
from roadseg.data.batches.gpu_resident import batches_from_memory, load, split_bytes
from roadseg.data.batches.loader import Crops, batches_from_workers
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards

CPU = torch.device("cpu")


@pytest.mark.parametrize("augmentation", [Augmentation((32, 40)), Augmentation((60, 110), rotate_deg=9.0, blur=0.5)])
@pytest.mark.parametrize("process", [False, True])
def test_batches_are_those_of_boxes_that_were_read(shards: Shards, augmentation: Augmentation, process: bool) -> None:
    split = shards.split("train")
    crops = Crops(split, augmentation, 3, (9, 8, 7))
    frames = [replace(f, centroids=((1, 5, 60), (2, 20, 30))) for f in split.frames]
    batches = Batches(Order(frames, 3, class_uniform=0.5), 4, 1, 6)
    resident = load(split, CPU)
    assert resident and resident.flat.numel() == split_bytes(split) == 6 * 4 * 48 * 96
    read = batches_from_workers(crops, batches, 0, CPU, augment_on_gpu=True)
    for ours, theirs in zip(batches_from_memory(resident, crops, batches, process), read, strict=True):
        assert ours.samples == theirs.samples
        # The same arithmetic on another start of the coordinates: boxes have their own.
        assert torch.equal(ours.label_BHW, theirs.label_BHW)
        assert torch.equal(ours.image_BHWC, theirs.image_BHWC)


def test_frames_are_read_no_further_once_it_is_stopped(shards: Shards) -> None:
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    crops = Crops(shards.split("train"), Augmentation((32, 40)), 3, (9, 8, 7))
    on_gpu = Feed(frames_on_gpu=True, augment_on_gpu=True, workers=0, why="")
    batches = Batches(Order(crops.split.frames, 3), 4, 0, 6)
    assert list(feed(on_gpu, crops, batches, CPU, stopped)) == [] and len(asked) == 3
    assert len(list(feed(on_gpu, crops, batches, CPU))) == 6
