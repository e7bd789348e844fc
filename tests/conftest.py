"""What many tests need: a small label set, shards in memory's size, a release without training."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from roadseg.data.shards import Shard, Shards, write_frame
from roadseg.files import sha256_file
from roadseg.labels import IGNORE, LabelClass, LabelSet

cv2.setNumThreads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the networks of the tests are too small for more

THREE = LabelSet(
    "three",
    (
        LabelClass("road", 7, 0, (128, 64, 128), "flat"),
        LabelClass("sky", 23, 1, (70, 130, 180), "sky"),
        LabelClass("car", 26, 2, (0, 0, 142), "vehicle"),
        LabelClass("void", 0, IGNORE, (0, 0, 0)),
    ),
    terms="made by a test",
)


def scene(seed: int, height: int = 48, width: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colours follow its label of three classes and some void, with noise."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    label[: height // 2] = 1
    x, y = rng.integers(0, width - 20), rng.integers(height // 3, height - 12)
    label[y : y + 10, x : x + 18] = 2
    label[-2:] = IGNORE
    colours = np.array([[90, 90, 90], [150, 180, 220], [200, 30, 30]] + [[0, 0, 0]] * 253, np.int16)
    image = colours[label] + rng.integers(-20, 20, (height, width, 3), dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8), label


def write_shards(folder: Path, train: int = 6, val: int = 3) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        path = folder / f"{split}-00000.bin"
        with open(path, "wb") as f:
            frames = tuple(write_frame(f, f"{split}{i}", "s", *scene(first + i)) for i in range(count))
        shards[split] = (Shard(path.name, sha256_file(path), frames),)
    made = Shards(
        folder,
        "test",
        THREE,
        (120.0, 120.0, 120.0),
        (60.0, 60.0, 60.0),
        {"train": [500, 400, 60, 40], "val": [500, 400, 60, 40]},
        {"train": "t" * 64, "val": "v" * 64},
        shards,
    )
    made.save()
    return made


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "shards")


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not os.environ.get("ROADSEG_REAL_DATA"):
        pytest.skip("ROADSEG_REAL_DATA is not set")
    return Path(os.environ["ROADSEG_REAL_DATA"])
