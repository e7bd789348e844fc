"""Frames that are kept on a device and cut out there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches.gpu_frames import batches_from_frames, load_frames, split_bytes
from roadseg.data.batches.loader import Crops, batches_from_workers
from roadseg.data.batches.plan import LoaderPlan, batches_of
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards

CPU = torch.device("cpu")


@pytest.mark.parametrize("augmentation", [Augmentation((32, 40)), Augmentation((60, 110), rotate_deg=9.0, blur=0.5)])
@pytest.mark.parametrize("worker", [False, True])
def test_batches_equal_those_from_boxes(shards: Shards, augmentation: Augmentation, worker: bool) -> None:
    split = shards.split("train")
    crops = Crops(split, augmentation, 3, (9, 8, 7))
    frames = [replace(f, centroids=((1, 5, 60), (2, 20, 30))) for f in split.frames]
    batches = Batches(Order(frames, 3, class_uniform=0.5), 4, 1, 6)
    on_device = load_frames(split, CPU)
    assert on_device and on_device.flat.numel() == split_bytes(split) == 6 * 4 * 48 * 96
    read = batches_from_workers(crops, batches, 0, CPU, augment_on_gpu=True)
    for ours, theirs in zip(batches_from_frames(on_device, crops, batches, worker), read, strict=True):
        assert ours.samples == theirs.samples
        # The same arithmetic on another start of the coordinates: boxes have their own.
        assert torch.equal(ours.label_BHW, theirs.label_BHW)
        assert torch.equal(ours.image_BHWC, theirs.image_BHWC)


def test_loading_frames_ends_when_stopped(shards: Shards) -> None:
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    crops = Crops(shards.split("train"), Augmentation((32, 40)), 3, (9, 8, 7))
    on_gpu = LoaderPlan(frames_on_gpu=True, augment_on_gpu=True, workers=0, why="")
    batches = Batches(Order(crops.split.frames, 3), 4, 0, 6)
    assert list(batches_of(on_gpu, crops, batches, CPU, stopped)) == [] and len(asked) == 3
    assert len(list(batches_of(on_gpu, crops, batches, CPU))) == 6
