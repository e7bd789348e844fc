"""A whole split in GPU memory: what is drawn on the host is cut out on the device, and no pixel moves."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from roadseg.data.augment.gpu import Sheet, crops, sheet
from roadseg.data.batches.loader import Batch, Crops, one_ahead
from roadseg.data.batches.sampler import Batches, Sample
from roadseg.data.batches.worker_processes import ASK_EVERY_S, as_it_is, items_of, start_worker
from roadseg.data.shards.index import Split
from roadseg.errors import RoadsegError
from roadseg.progress import progress

DRAWN_AHEAD = 4  # batches


def split_bytes(split: Split) -> int:
    """Of all images and labels as uint8."""
    return sum(4 * frame.height * frame.width for frame in split.frames)


@dataclass(frozen=True)
class FrameBytes:
    """Where the frames of a split lie in one flat buffer: each image followed by its label."""

    split: Split

    @cached_property
    def starts(self) -> list[int]:
        """Byte where each frame's image starts."""
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


@dataclass(frozen=True)
class Resident:
    """All frames of a split on one device. flat: uint8 [bytes]."""

    frames: FrameBytes
    flat: torch.Tensor


def load(split: Split, device: torch.device, stopped: Callable[[], object] = bool) -> Resident | None:
    """None once `stopped`. Raises RoadsegError if `split_bytes` are not free there."""
    try:
        made = Resident(FrameBytes(split), torch.empty(split_bytes(split), dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as e:
        raise RoadsegError(
            f"no room for {split_bytes(split) / 1e9:.1f} GB of frames in GPU memory",
            where=str(device),
            todo="set training.frames_on_gpu to never, or free memory there",
        ) from e
    with progress(len(split), "frames to the GPU" if device.type == "cuda" else "frames", "frame") as bar:
        for index, start in enumerate(made.frames.starts):
            if stopped():
                return None
            image, label = split.read(index)
            for array, at in ((image, start), (label, start + image.size)):
                # A copy, as PyTorch warns of what is read-only; it costs little beside the one to the device.
                made.flat[at : at + array.size] = torch.from_numpy(array.flatten())
            bar.update()
    return made


class _Sheets(Dataset[Any]):
    """Called with the samples of a batch, makes their draws. Holds nothing of the device: it is forked."""

    def __init__(self, frames: FrameBytes, crops_of: Crops) -> None:
        self.frames, self.crops_of = frames, crops_of

    def __getitems__(self, samples: list[Sample]) -> tuple[tuple[Sample, ...], Sheet]:
        return tuple(samples), self.frames.sheet(self.crops_of, samples)


def batches_from_memory(
    resident: Resident, crops_of: Crops, batches: Batches, process: bool | None = None
) -> Generator[Batch, None, None]:
    """`batches` on the device that holds the frames.

    process: whether one of its own makes the draws, None: on CUDA. There it does so some batches ahead: a
    thread here held the interpreter just when the loop wanted to launch its next step, and cost 13 % of
    a step of 30 ms. Raises RoadsegError when that process dies.
    """
    device = resident.flat.device
    cuda = device.type == "cuda"
    process = cuda if process is None else process
    crop_px, fill = crops_of.augmentation.crop_px, crops_of.fill

    def cut(drawn: tuple[tuple[Sample, ...], Sheet]) -> Batch:
        return Batch(*crops(resident.flat, drawn[1], crop_px, fill), drawn[0])

    drawn = items_of(
        DataLoader(
            _Sheets(resident.frames, crops_of),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable will do
            num_workers=int(process),
            collate_fn=as_it_is,  # type: ignore[arg-type]  # what __getitems__ gives is a batch already
            prefetch_factor=DRAWN_AHEAD if process else None,
            timeout=ASK_EVERY_S if process else 0,
            worker_init_fn=start_worker,
        )
    )
    with closing(drawn):
        yield from one_ahead(drawn, cut, device) if cuda else map(cut, drawn)
