"""A whole split in GPU memory: batches are drawn on the host and cut out on the device, without workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from roadseg.data.gpu_augment import Sheet, crops, sheet
from roadseg.data.loader import Batch, Crops, one_ahead
from roadseg.data.sampler import Batches, Sample
from roadseg.data.shards import Split
from roadseg.errors import RoadsegError
from roadseg.progress import progress


def split_bytes(split: Split) -> int:
    """Of all images and labels as uint8."""
    return sum(4 * frame.height * frame.width for frame in split.frames)


@dataclass(frozen=True)
class Resident:
    """All frames of a split on one device: flat uint8 [bytes], each image followed by its label."""

    split: Split
    flat: torch.Tensor

    @cached_property
    def starts(self) -> list[int]:
        """Byte of `flat` where each frame's image starts."""
        sizes = [4 * frame.height * frame.width for frame in self.split.frames]
        return np.cumsum([0, *sizes[:-1]]).tolist()

    def sheet(self, crops_of: Crops, samples: list[Sample]) -> Sheet:
        draws = [crops_of.draw(sample) for sample in samples]
        images, labels, rows = [], [], []
        for sample, d in zip(samples, draws, strict=True):
            frame, start = self.split.frames[sample.index], self.starts[sample.index]
            first = d.box[0] * frame.width + d.box[1]
            images.append(start + 3 * first)
            labels.append(start + 3 * frame.height * frame.width + first)
            rows.append(frame.width)
        return sheet(draws, images, labels, rows)


def load(split: Split, device: torch.device) -> Resident:
    """Raises RoadsegError if `split_bytes` are not free there."""
    try:
        made = Resident(split, torch.empty(split_bytes(split), dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as e:
        raise RoadsegError(
            f"no room for {split_bytes(split) / 1e9:.1f} GB of frames in GPU memory",
            where=str(device),
            todo="set training.frames_on_gpu to never, or free memory there",
        ) from e
    with progress(len(split), "frames to the GPU" if device.type == "cuda" else "frames", "frame") as bar:
        for index, start in enumerate(made.starts):
            image, label = split.read(index)
            for array, at in ((image, start), (label, start + image.size)):
                # A copy, as PyTorch warns of what is read-only; it costs little beside the one to the device.
                made.flat[at : at + array.size] = torch.from_numpy(array.flatten())
            bar.update()
    return made


def batches_from_memory(resident: Resident, crops_of: Crops, batches: Batches) -> Generator[Batch, None, None]:
    """`batches` on the device that holds the frames; draws are made a few batches ahead in a thread."""
    device = resident.flat.device
    crop_px, fill = crops_of.augmentation.crop_px, crops_of.fill

    def cut(drawn: tuple[tuple[Sample, ...], Sheet]) -> Batch:
        return Batch(*crops(resident.flat, drawn[1], crop_px, fill), drawn[0])

    drawn = _in_a_thread((tuple(samples), resident.sheet(crops_of, samples)) for samples in batches)
    try:
        if device.type == "cuda":
            yield from one_ahead(drawn, cut, device)
        else:
            yield from map(cut, drawn)
    finally:
        drawn.close()


def _in_a_thread(source: Iterator[Any], ahead: int = 4) -> Generator[Any, None, None]:
    """The items of `source`, made by a thread that is up to `ahead` of them in front; errors are raised here."""
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(ahead)
    closed = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not closed.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in source:
                put((True, item))
                if closed.is_set():
                    return
            put((False, None))
        except BaseException as e:
            put((False, e))

    thread = threading.Thread(target=run, name="draws", daemon=True)
    thread.start()
    try:
        while True:
            more, item = items.get()
            if not more:
                if item:
                    raise item
                return
            yield item
    finally:
        closed.set()
        thread.join()
