"""Choose how batches reach the device: finished crops, boxes to augment there, or from GPU memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from roadseg.data.batches.gpu_frames import batches_from_frames, load_frames
from roadseg.data.batches.loader import Batch, Crops, batches_from_workers
from roadseg.data.batches.sampler import Batches
from roadseg.errors import ConfigError
from roadseg.processes import cores

GPU_SHARE_FOR_FRAMES = 0.25  # of GPU memory that "auto" may fill with frames: the rest is for activations


@dataclass(frozen=True)
class LoaderPlan:
    """How batches reach the device. why: for the log."""

    frames_on_gpu: bool
    augment_on_gpu: bool
    workers: int
    why: str


def choose_loader(
    train_bytes: int,
    device: torch.device,
    gpu_bytes: int,
    augment_device: str = "auto",
    frames_on_gpu: str = "auto",
    workers: int = -1,
    siblings: int = 1,
) -> LoaderPlan:
    """augment_device, frames_on_gpu, workers: as in the config's training section. gpu_bytes: total memory of the GPU,
    0 without one. siblings: training processes on this machine, including this one.

    Raises ConfigError for settings that contradict each other or that this device does not support.
    """
    check_devices(device, augment_device, frames_on_gpu)
    cuda = device.type == "cuda"
    if frames_on_gpu == "always" and train_bytes > gpu_bytes:
        raise ConfigError(
            f"always, but train has {train_bytes / 1e9:.1f} GB of frames and the GPU {gpu_bytes / 1e9:.1f} GB",
            expected="frames that fit into GPU memory",
            where="training.frames_on_gpu",
            todo="set it to auto or never",
        )
    fits = train_bytes <= GPU_SHARE_FOR_FRAMES * gpu_bytes
    if frames_on_gpu == "always" or (frames_on_gpu == "auto" and cuda and augment_device != "cpu" and fits):
        why = (
            f"all {train_bytes / 1e9:.1f} GB of train are kept in the {gpu_bytes / 1e9:.1f} GB of GPU memory; "
            "no loader processes"
        )
        return LoaderPlan(True, True, 0, why)
    processes = workers if workers >= 0 else min(8, max(0, cores() // siblings - 1)) if cuda else 0
    readers = f"{processes} loader processes read" if processes else "the training process reads"
    if cuda and augment_device != "cpu":
        large = f"; train's {train_bytes / 1e9:.1f} GB are over a quarter of {gpu_bytes / 1e9:.1f} GB" * (not fits)
        return LoaderPlan(False, True, processes, f"{readers} boxes, the GPU augments them{large}")
    return LoaderPlan(False, False, processes, f"{readers} crops and augment{'s' * (not processes)} them on the CPU")


def check_devices(device: torch.device, augment_device: str, frames_on_gpu: str) -> None:
    """The checks of `choose_loader` that need no data. Only the type of `device` is used."""
    cuda = device.type == "cuda"
    if frames_on_gpu == "always" and (not cuda or augment_device == "cpu"):
        raise ConfigError(
            f"always, but training runs on {device.type} with training.augment_device {augment_device}",
            expected="a CUDA device that also augments",
            where="training.frames_on_gpu",
            todo="set it to auto" if not cuda else "set it to auto, or training.augment_device to auto",
        )
    if augment_device == "cuda" and not cuda:
        raise ConfigError(f"cuda, but training runs on {device.type}", where="training.augment_device", todo="use auto")


def batches_of(
    plan: LoaderPlan, crops: Crops, batches: Batches, device: torch.device, stopped: Callable[[], object] = bool
) -> Generator[Batch, None, None]:
    """The batches on `device`. Ends early once `stopped()` is true while it waits for a batch or for frames."""
    if not plan.frames_on_gpu:
        yield from batches_from_workers(crops, batches, plan.workers, device, plan.augment_on_gpu, stopped)
    elif frames := load_frames(crops.split, device, stopped):
        yield from batches_from_frames(frames, crops, batches)
