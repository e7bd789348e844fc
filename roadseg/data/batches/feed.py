"""Which way batches reach the device: finished crops, boxes that a GPU augments, or all frames in GPU memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from roadseg.data.batches.gpu_resident import batches_from_memory, load
from roadseg.data.batches.loader import Batch, Crops, batches_from_workers
from roadseg.data.batches.sampler import Batches
from roadseg.errors import ConfigError
from roadseg.processes import cores

RESIDENT_SHARE = 0.25  # of GPU memory that frames may take unasked: the rest is for activations


@dataclass(frozen=True)
class Feed:
    """why: for the log."""

    frames_on_gpu: bool
    augment_on_gpu: bool
    workers: int
    why: str


def choose_feed(
    train_bytes: int,
    device: torch.device,
    gpu_bytes: int,
    augment_device: str = "auto",
    frames_on_gpu: str = "auto",
    workers: int = -1,
    siblings: int = 1,
) -> Feed:
    """Values of the settings as in the config's training section. gpu_bytes: all memory of the GPU, 0 without one.
    siblings: processes that train on this machine, this one among them.

    Raises ConfigError for what contradicts itself or what this device can't do.
    """
    refuse_places(device, augment_device, frames_on_gpu)
    cuda = device.type == "cuda"
    if frames_on_gpu == "always" and train_bytes > gpu_bytes:
        raise ConfigError(
            f"always, with {train_bytes / 1e9:.1f} GB of frames, training on {device.type} ({gpu_bytes / 1e9:.1f} GB)",
            expected="room for them",
            where="training.frames_on_gpu",
            todo="set it to auto or never",
        )
    fits = train_bytes <= RESIDENT_SHARE * gpu_bytes
    if frames_on_gpu == "always" or (frames_on_gpu == "auto" and cuda and augment_device != "cpu" and fits):
        why = f"all {train_bytes / 1e9:.1f} GB of train lie in the GPU's {gpu_bytes / 1e9:.1f}; no loader processes"
        return Feed(True, True, 0, why)
    processes = workers if workers >= 0 else min(8, max(0, cores() // siblings - 1)) if cuda else 0
    readers = f"{processes} loader processes" if processes else "the training process"
    if cuda and augment_device != "cpu":
        large = f"; train's {train_bytes / 1e9:.1f} GB are over a quarter of {gpu_bytes / 1e9:.1f}" * (not fits)
        return Feed(False, True, processes, f"boxes are read by {readers} and augmented by the GPU{large}")
    return Feed(False, False, processes, f"crops are read and augmented by {readers}, on the CPU")


def refuse_places(device: torch.device, augment_device: str, frames_on_gpu: str) -> None:
    """As `choose_feed`, for what can be told without the data. Of `device` only the type counts."""
    cuda = device.type == "cuda"
    if frames_on_gpu == "always" and (not cuda or augment_device == "cpu"):
        raise ConfigError(
            f"always, training on {device.type} with training.augment_device {augment_device}",
            expected="a CUDA device, on which frames are augmented too",
            where="training.frames_on_gpu",
            todo="set it to auto" if not cuda else "set it to auto, or training.augment_device to auto",
        )
    if augment_device == "cuda" and not cuda:
        raise ConfigError(f"cuda, but training runs on {device.type}", where="training.augment_device", todo="use auto")


def feed(
    chosen: Feed, crops_of: Crops, batches: Batches, device: torch.device, stopped: Callable[[], object] = bool
) -> Generator[Batch, None, None]:
    """The batches, on `device`; no more of them once `stopped` while it waits for one, or for the frames."""
    if not chosen.frames_on_gpu:
        yield from batches_from_workers(crops_of, batches, chosen.workers, device, chosen.augment_on_gpu, stopped)
    elif resident := load(crops_of.split, device, stopped):
        yield from batches_from_memory(resident, crops_of, batches)
