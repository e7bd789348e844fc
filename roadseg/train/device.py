"""Choose the training device, and how many processes of this machine train together."""

from __future__ import annotations

import torch

from roadseg.errors import ConfigError
from roadseg.train.distributed.process_group import ALONE, Ranks


def device_name(name: str) -> str:
    """`name`; for "auto" CUDA, else Apple's MPS, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of `device_name`; each of several ranks gets its own GPU.

    Raises ConfigError if the device does not exist here.
    """
    name = device_name(name)
    if name == "cuda" and ranks.world > 1:
        name = f"cuda:{ranks.local_rank}"
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
        raise ConfigError(
            f"{name}, and PyTorch finds {count or 'no'} such device{'s' * (count > 1)} here",
            where="training.device",
            todo="set it to auto, or check the driver (nvidia-smi) and that PyTorch was built for it",
        ) from e
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def processes_per_machine(gpus: int, device: str, processes_started: int = 1) -> int:
    """How many processes each machine starts. gpus, device: training.gpus and training.device.

    processes_started: how many a launcher has started already. Raises ConfigError for GPUs that do not exist and for
    one device that several processes would share.
    """
    kind = device_name(device)
    found = torch.cuda.device_count() if torch.cuda.is_available() and kind == "cuda" else 0
    count = gpus or max(found, 1)
    single_device = kind == "mps" or kind.startswith("cuda:")
    if single_device and count > 1:
        raise ConfigError(
            f"{count} with training.device {device}, which is one",
            expected="1",
            where="training.gpus",
            todo="set training.device to cuda, or training.gpus to 1",
        )
    if single_device and processes_started > 1:
        raise ConfigError(
            f"{device}, a single device, for each of {processes_started} processes that were started together",
            expected="cuda, of which each process takes the one that its LOCAL_RANK names, or cpu",
            where="training.device",
            todo="set it to one of these, or start one process",
        )
    if count > 1 and not (kind == "cpu" and device == "cpu") and count > found:
        raise ConfigError(
            f"{count} GPUs, but this machine has {found or 'none'}",
            expected=f"1 to {found}, or 0 for all" if found else "1, or 0",
            where="training.gpus",
            todo="training.device cpu trains in as many processes without a GPU",
        )
    return count
