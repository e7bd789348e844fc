"""Keep a whole split in GPU memory: the host draws crop parameters, the device cuts the crops."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from roadseg.data.augment.gpu import BatchParams, batch_params, cut_crops
from roadseg.data.batches.loader import Batch, Crops, one_ahead
from roadseg.data.batches.sampler import Batches, Sample
from roadseg.data.batches.worker_processes import POLL_S, identity, items_of, start_worker
from roadseg.data.shards.index import Split
from roadseg.errors import RoadsegError
from roadseg.progress import progress

PREFETCH = 4  # batches whose parameters are drawn in advance


def split_bytes(split: Split) -> int:
    """Bytes of all images and labels as uint8."""
    return sum(4 * frame.height * frame.width for frame in split.frames)


@dataclass(frozen=True)
class FrameOffsets:
    """Layout of a split's frames in one flat buffer: each image followed by its label."""

    split: Split

    @cached_property
    def starts(self) -> list[int]:
        """Byte offset of each frame's image."""
        sizes = [4 * frame.height * frame.width for frame in self.split.frames]
        return np.cumsum([0, *sizes[:-1]]).tolist()

    def batch_params(self, crops: Crops, samples: list[Sample]) -> BatchParams:
        params = [crops.params(sample) for sample in samples]
        images, labels, rows = [], [], []
        for sample, d in zip(samples, params, strict=True):
            frame, start = self.split.frames[sample.index], self.starts[sample.index]
            first = d.box[0] * frame.width + d.box[1]
            images.append(start + 3 * first)
            labels.append(start + 3 * frame.height * frame.width + first)
            rows.append(frame.width)
        return batch_params(params, images, labels, rows)


@dataclass(frozen=True)
class FramesOnGpu:
    """All frames of a split on one device. flat: uint8 [bytes]."""

    offsets: FrameOffsets
    flat: torch.Tensor


def load_frames(split: Split, device: torch.device, stopped: Callable[[], object] = bool) -> FramesOnGpu | None:
    """Read all frames to the device; None if `stopped()` meanwhile. Raises RoadsegError if they do not fit."""
    try:
        frames = FramesOnGpu(FrameOffsets(split), torch.empty(split_bytes(split), dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as e:
        raise RoadsegError(
            f"{split_bytes(split) / 1e9:.1f} GB of frames do not fit into GPU memory",
            where=str(device),
            todo="set training.frames_on_gpu to never, or free memory there",
        ) from e
    with progress(len(split), "frames to the GPU" if device.type == "cuda" else "frames", "frame") as bar:
        for index, start in enumerate(frames.offsets.starts):
            if stopped():
                return None
            image, label = split.read(index)
            for array, at in ((image, start), (label, start + image.size)):
                # Copied because PyTorch warns about read-only arrays; cheap beside the copy to the device.
                frames.flat[at : at + array.size] = torch.from_numpy(array.flatten())
            bar.update()
    return frames


class _ParamsDataset(Dataset[Any]):
    """Maps the samples of a batch to their crop parameters. Uses no device, so it can be forked."""

    def __init__(self, offsets: FrameOffsets, crops: Crops) -> None:
        self.offsets, self.crops = offsets, crops

    def __getitems__(self, samples: list[Sample]) -> tuple[tuple[Sample, ...], BatchParams]:
        return tuple(samples), self.offsets.batch_params(self.crops, samples)


def batches_from_frames(
    frames: FramesOnGpu, crops: Crops, batches: Batches, worker: bool | None = None
) -> Generator[Batch, None, None]:
    """`batches` on the device that holds the frames.

    worker: draw the parameters in a process of its own, some batches ahead; None: on CUDA. A thread in this process
    competed for the GIL when the loop launched its next step, and cost 13 % of a step of 30 ms.
    Raises RoadsegError when the process dies.
    """
    device = frames.flat.device
    cuda = device.type == "cuda"
    worker = cuda if worker is None else worker
    crop_px, fill = crops.augmentation.crop_px, crops.fill

    def cut(item: tuple[tuple[Sample, ...], BatchParams]) -> Batch:
        samples, params = item
        return Batch(*cut_crops(frames.flat, params, crop_px, fill), samples)

    batch_list = items_of(
        DataLoader(
            _ParamsDataset(frames.offsets, crops),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable will do
            num_workers=int(worker),
            collate_fn=identity,  # type: ignore[arg-type]  # __getitems__ returns a batch
            prefetch_factor=PREFETCH if worker else None,
            timeout=POLL_S if worker else 0,
            worker_init_fn=start_worker,
        )
    )
    with closing(batch_list):
        yield from one_ahead(batch_list, cut, device) if cuda else map(cut, batch_list)
