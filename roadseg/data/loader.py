"""Batches of augmented samples, by worker processes, in the order of the sampler."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from roadseg.data.augment import Augmentation, augment, generator
from roadseg.data.sampler import Batches
from roadseg.data.shards import Split


@dataclass(frozen=True)
class Batch:
    """image_BHWC: uint8 RGB. label_BHW: uint8 train ids. samples: (epoch, index) of each row."""

    image_BHWC: torch.Tensor
    label_BHW: torch.Tensor
    samples: tuple[tuple[int, int], ...]

    def pin_memory(self) -> Batch:
        return Batch(self.image_BHWC.pin_memory(), self.label_BHW.pin_memory(), self.samples)


class Crops(Dataset):
    """Item (epoch, index) is that frame's crop in that epoch."""

    def __init__(self, split: Split, augmentation: Augmentation, seed: int, fill: tuple[int, int, int]) -> None:
        self.split, self.augmentation, self.seed, self.fill = split, augmentation, seed, fill

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        epoch, index = key
        image, label = self.split.read(index)
        rng = generator(self.seed, 2, epoch, index)
        return key, *augment(image, label, self.augmentation, rng, self.fill)


def collate(rows: list[tuple[tuple[int, int], np.ndarray, np.ndarray]]) -> Batch:
    keys, images, labels = zip(*rows, strict=True)
    return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), keys)


def loader(crops: Crops, batches: Batches, workers: int, pin: bool) -> DataLoader:
    """Iterates over `batches`; `workers` processes read ahead, 0 reads in this one.

    OpenCV's threads are switched off here and in the workers: its pool does not survive a fork.
    """
    cv2.setNumThreads(0)
    return DataLoader(
        crops,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of key lists will do
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Signals often reach the whole group; only the loop may answer them, with a checkpoint first. A
    # worker ends when the loader says so, or when it finds its parent gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
