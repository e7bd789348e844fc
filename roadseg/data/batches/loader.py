"""Load batches of augmented samples in sampler order, with worker processes.

Workers write to slots of shared memory that are allocated once and used in turn: the memory need is known before the
first sample, and a GPU copies directly from them. Workers write finished crops, or, if a GPU augments, the boxes that
the crops are cut from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from roadseg.data.augment.cpu import Augmentation, CropParams, apply, sample_params
from roadseg.data.augment.gpu import BatchParams, batch_params, cut_crops
from roadseg.data.batches.sampler import Batches, Sample
from roadseg.data.batches.worker_processes import POLL_S, identity, items_of, start_worker
from roadseg.data.shards.index import Split
from roadseg.errors import RoadsegError

log = logging.getLogger(__name__)
PREFETCH = 2  # batches that each worker prepares in advance
EXTRA_SLOTS = 2  # for batches outside the workers: one being copied to the device, one in use
SHARED_MEMORY = Path("/dev/shm")
USABLE_SHARE = 0.8  # of the free shared memory


@dataclass(frozen=True)
class Batch:
    """image_BHWC: uint8 RGB. label_BHW: uint8 train ids. samples: one per row. Both tensors are on one device."""

    image_BHWC: torch.Tensor
    label_BHW: torch.Tensor
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Crops:
    """Makes the augmented crops of a split, each a function of (seed, sample)."""

    split: Split
    augmentation: Augmentation
    seed: int
    fill: tuple[int, int, int]

    def params(self, sample: Sample) -> CropParams:
        frame = self.split.frames[sample.index]
        return sample_params(self.augmentation, sample.generator(self.seed), frame.height, frame.width, sample.center)

    def crop(self, sample: Sample, out: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3], label uint8 [H, W]), written to `out` if given."""
        d = self.params(sample)
        return apply(d, *self.split.read_box(sample.index, *d.box), self.fill, out)

    def largest_box_px(self) -> int:
        """Pixels of the largest box that any crop can need."""
        a = self.augmentation
        high, wide = a.crop_px
        if a.rotate_deg:
            high, wide = _longest(high, wide, a.rotate_deg), _longest(wide, high, a.rotate_deg)
        high, wide = ceil(high / a.scale[0]) + 5, ceil(wide / a.scale[0]) + 5
        sizes = {(frame.height, frame.width) for frame in self.split.frames}
        return max(min(height, high) * min(width, wide) for height, width in sizes)


def _longest(side: int, other: int, rotate_deg: float) -> int:
    """Largest extent along `side` of a rectangle rotated by up to `rotate_deg`."""
    angle = min(np.deg2rad(rotate_deg), np.arctan2(other, side))
    return ceil(side * np.cos(angle) + other * np.sin(angle))


@dataclass(frozen=True)
class FilledSlot:
    """A slot with a batch. params: for boxes that are still to be augmented, else None."""

    slot: int
    samples: tuple[Sample, ...]
    used_bytes: int
    params: BatchParams | None = None


class _CropWriter(Dataset[Any]):
    """Maps (slot, samples) to a slot with finished crops: all images, then all labels."""

    def __init__(self, crops: Crops, slots: torch.Tensor) -> None:
        self.crops, self.slots = crops, slots

    def __getitems__(self, work: tuple[int, list[Sample]]) -> FilledSlot | RoadsegError:
        try:
            return self.write(*work)
        except RoadsegError as e:
            return e  # raised in the parent: PyTorch would turn its message into a traceback

    def write(self, slot: int, samples: list[Sample]) -> FilledSlot:
        image, label = _views(self.slots[slot], len(samples), self.crops.augmentation.crop_px)
        for sample, *out in zip(samples, image.numpy(), label.numpy(), strict=True):
            self.crops.crop(sample, (out[0], out[1]))
        return FilledSlot(slot, tuple(samples), image.numel() + label.numel())


class _BoxWriter(_CropWriter):
    """Writes the boxes of the samples, each image followed by its label."""

    def write(self, slot: int, samples: list[Sample]) -> FilledSlot:
        memory = self.slots[slot].numpy()
        params, starts, at = [], [], 0
        for sample in samples:
            p = self.crops.params(sample)
            image, label = self.crops.split.read_box(sample.index, *p.box)
            params.append(p)
            starts.append(at)
            memory[at : at + image.size].reshape(image.shape)[:] = image
            memory[at + image.size : at + image.size + label.size].reshape(label.shape)[:] = label
            at += image.size + label.size
        sides = [p.box[2:] for p in params]
        labels = [start + 3 * h * w for start, (h, w) in zip(starts, sides, strict=True)]
        return FilledSlot(slot, tuple(samples), at, batch_params(params, starts, labels, [w for _, w in sides]))


def _views(memory: torch.Tensor, rows: int, crop_px: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = rows * crop_px[0] * crop_px[1]
    image, label = memory[: 3 * pixels], memory[3 * pixels : 4 * pixels]
    return image.view(rows, *crop_px, 3), label.view(rows, *crop_px)


@dataclass(frozen=True)
class _SlottedBatches:
    """The batches, each with the slot to write it to."""

    batches: Batches
    slots: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, list[Sample]]]:
        return ((number % self.slots, samples) for number, samples in enumerate(self.batches))


def prefetch_that_fits(workers: int, slot_bytes: int, free_bytes: int | None) -> int:
    """Batches that each worker may prepare in advance, 1 to PREFETCH, so that all slots fit in shared memory.

    free_bytes: None if unknown. Raises RoadsegError if not even one per worker fits.
    """
    if not workers or free_bytes is None:
        return PREFETCH
    fit = (int(free_bytes * USABLE_SHARE) // slot_bytes - EXTRA_SLOTS) // workers
    if fit < 1:
        raise RoadsegError(
            f"{free_bytes / 1e6:.0f} MB of shared memory are free",
            expected=f"{(workers + EXTRA_SLOTS) * slot_bytes / USABLE_SHARE / 1e6:.0f} MB "
            f"for {workers} loader processes and batches of {slot_bytes / 1e6:.0f} MB",
            where=str(SHARED_MEMORY),
            todo="give the container more (docker run --shm-size), or lower training.workers, training.batch_size "
            "or training.crop_px; training.workers 0 needs none",
        )
    if fit < PREFETCH:
        log.warning("%s has room for only %d batch per loader process in advance, not %d", SHARED_MEMORY, fit, PREFETCH)
    return min(fit, PREFETCH)


def _free_shared_bytes() -> int | None:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize


def batches_from_workers(
    crops: Crops,
    batches: Batches,
    workers: int,
    device: torch.device,
    augment_on_gpu: bool = False,
    stopped: Callable[[], object] = bool,
) -> Generator[Batch, None, None]:
    """`batches` on `device`, read in advance by `workers` processes; 0: read in this process.

    stopped: polled while waiting for workers; the batches end once it is true. On CUDA, the next batch is copied, and
    augmented with augment_on_gpu, while the last one is used. Raises RoadsegError if shared memory is too small, if a
    worker dies, and any RoadsegError that a worker raised.
    """
    # OpenCV's thread pool does not survive a fork, neither here nor in the workers.
    cv2.setNumThreads(0)
    pixels = crops.largest_box_px() if augment_on_gpu else int(np.prod(crops.augmentation.crop_px))
    slot_bytes = -(-4 * pixels * batches.rows // 4096) * 4096
    prefetch = prefetch_that_fits(workers, slot_bytes, _free_shared_bytes())
    slots = torch.empty((prefetch * workers + EXTRA_SLOTS, slot_bytes), dtype=torch.uint8)
    if workers:
        slots.share_memory_().zero_()  # touch all pages: running out of memory must fail here, not in a worker
    source = items_of(
        DataLoader(
            (_BoxWriter if augment_on_gpu else _CropWriter)(crops, slots),
            batch_sampler=_SlottedBatches(batches, len(slots)),  # type: ignore[arg-type]  # any iterable will do
            num_workers=workers,
            collate_fn=identity,  # type: ignore[arg-type]  # __getitems__ returns a whole batch
            prefetch_factor=prefetch if workers else None,
            timeout=POLL_S if workers else 0,
            worker_init_fn=start_worker,
        ),
        stopped,
    )
    crop_px, fill = crops.augmentation.crop_px, crops.fill

    def on_device(filled: FilledSlot) -> Batch:
        memory = slots[filled.slot, : filled.used_bytes]
        memory = memory.to(device, non_blocking=True) if device.type == "cuda" else memory.clone()
        if filled.params:
            return Batch(*cut_crops(memory, filled.params, crop_px, fill), filled.samples)
        return Batch(*_views(memory, len(filled.samples), crop_px), filled.samples)

    with closing(source):
        if device.type != "cuda":
            yield from map(on_device, source)
            return
        first = next(source, None)  # pin the memory only after the workers are forked
        pinned = _pin(slots)
        try:
            yield from one_ahead(chain([] if first is None else [first], source), on_device, device)
        finally:
            torch.cuda.synchronize(device)
            if pinned:
                torch.cuda.cudart().cudaHostUnregister(slots.data_ptr())


def one_ahead(
    source: Iterator[Any], launch: Callable[[Any], Batch], device: torch.device
) -> Generator[Batch, None, None]:
    """launch(item) for each item on its own CUDA stream, one item in advance.

    A batch is yielded when it is complete, so that this wait counts as waiting for data.
    """
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for item in source:
        with torch.cuda.stream(stream):
            batch, done = launch(item), torch.cuda.Event()
            done.record()
        if ahead:
            yield _complete(*ahead)
        ahead = batch, done
    if ahead:
        yield _complete(*ahead)


def _complete(batch: Batch, done: torch.cuda.Event) -> Batch:
    # Workers may overwrite this batch's slot once the batch after the next is requested.
    done.synchronize()
    for tensor in (batch.image_BHWC, batch.label_BHW):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch


def _pin(slots: torch.Tensor) -> bool:
    status = torch.cuda.cudart().cudaHostRegister(slots.data_ptr(), slots.numel(), 1)  # for every device
    if int(status):
        log.warning("shared memory could not be pinned (%s); copies to the GPU are slower", status)
    return not int(status)
