"""Random 768x768 crops with labels per second on one core: from shards of each format, and from PNG pairs.

python benchmarks/shard_speed.py [--root CITYSCAPES] [--frames 8] [--crops 60] [--folder DIR]

Without --root it renders town frames of 2048x1024. Every reader returns the same crops as new arrays; from PNG the
whole frame is decoded by cv2, by torchvision, and by Pillow as in the reference project's data set class.
Cold: the files are dropped from the page cache before every crop. --folder: the disk to measure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import torch
import torchvision.io
from machine import cpu_name
from PIL import Image

from roadseg.data.shards.files import MappedFiles
from roadseg.data.shards.images import Format
from roadseg.data.shards.index import Shard, Split, write_frame
from roadseg.files import sha256_file
from roadseg.town import render
from roadseg.town.tree import Place, make_folders
from roadseg.town.tree import write_frame as write_town_frame

CROP_PX = 768
ROUNDS = 5
COLD_CROPS = 12
Crop = tuple[int, int, int]  # frame, top, left
Read = Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Reader:
    """make: returns a reader without open files. files: the files that it reads."""

    name: str
    make: Callable[[], Read]
    files: tuple[Path, ...]


def pairs(root: Path) -> list[tuple[Path, Path]]:
    images = sorted(root.glob("leftImg8bit/*/*/*_leftImg8bit.png"))
    labels = [
        Path(str(p).replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_labelIds.png")) for p in images
    ]
    return list(zip(images, labels, strict=True))


def shard_reader(folder: Path, form: Format, frames: list[tuple[np.ndarray, np.ndarray]]) -> Reader:
    path = folder / f"{form}.bin"
    with open(path, "wb") as f:
        rows = tuple(write_frame(f, str(i), "", *frame, form=form) for i, frame in enumerate(frames))
        f.flush()
        os.fsync(f.fileno())
    shard = Shard(path.name, sha256_file(path), rows, path.stat().st_size)
    out = np.empty((CROP_PX, CROP_PX, 3), np.uint8)

    def make() -> Read:
        split = Split(MappedFiles(folder), [shard], form)

        def read(frame: int, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
            image, label = split.read_box(frame, top, left, CROP_PX, CROP_PX)
            np.copyto(out, image)  # raw returns a view, whose pixels are not read yet
            return out, label

        return read

    return Reader(form, make, (path,))


def decoded(path: Path, flag: int) -> np.ndarray:
    pixels = cv2.imread(str(path), flag)
    assert pixels is not None, path
    return pixels


def png_readers(found: list[tuple[Path, Path]]) -> list[Reader]:
    def crop(image: np.ndarray, label: np.ndarray, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        box = slice(top, top + CROP_PX), slice(left, left + CROP_PX)
        return np.ascontiguousarray(image[box]), np.ascontiguousarray(label[box])

    def with_cv2(frame: int, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = (decoded(p, flag) for p, flag in zip(found[frame], (1, -1), strict=True))
        image, label = crop(image, label, top, left)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), label

    def with_torchvision(frame: int, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = (torchvision.io.decode_image(str(p)) for p in found[frame])
        return crop(image.permute(1, 2, 0).numpy(), label[0].numpy(), top, left)

    def with_pillow(frame: int, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = (Image.open(p) for p in found[frame])
        return crop(np.array(image.convert("RGB")), np.array(label), top, left)

    files = tuple(p for pair in found for p in pair)
    named: dict[str, Read] = {
        "PNG by cv2": with_cv2,
        "PNG by torchvision": with_torchvision,
        "PNG by Pillow": with_pillow,
    }
    return [Reader(name, partial(_same, read), files) for name, read in named.items()]


def _same(read: Read) -> Read:
    return read


def draw(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> Crop:
    frame = int(rng.integers(len(sizes)))
    height, width = sizes[frame]
    return frame, int(rng.integers(height - CROP_PX + 1)), int(rng.integers(width - CROP_PX + 1))


def warm_rate(read: Read, crops: list[Crop]) -> float:
    start = time.perf_counter()
    for crop in crops:
        read(*crop)
    return len(crops) / (time.perf_counter() - start)


def cold_ms(reader: Reader, crop: Crop) -> float:
    for path in reader.files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # does not drop pages that are mapped
        os.close(fd)
    read = reader.make()
    start = time.perf_counter()
    read(*crop)
    return (time.perf_counter() - start) * 1e3


def measure(readers: list[Reader], sizes: list[tuple[int, int]], crops: int) -> None:
    rates: dict[str, list[float]] = {r.name: [] for r in readers}
    cold: dict[str, list[float]] = {r.name: [] for r in readers}
    rng = np.random.default_rng(0)
    for _ in range(COLD_CROPS):
        crop = draw(rng, sizes)
        for r in readers:
            cold[r.name].append(cold_ms(r, crop))
    opened = {r.name: r.make() for r in readers}
    for number in range(ROUNDS + 1):
        for r in readers:
            count = crops if r.name in get_args(Format) else max(4, crops // 10)
            rate = warm_rate(opened[r.name], [draw(rng, sizes) for _ in range(count)])
            if number:  # the first round opens files and verifies raw's bands
                rates[r.name].append(rate)
    base = statistics.median(rates["PNG by cv2"])
    for r in readers:
        rate = statistics.median(rates[r.name])
        size = sum(p.stat().st_size for p in r.files) / len(sizes) / 1e6
        print(
            f"{r.name:20s} {size:6.2f} MB a frame  warm {rate:7.1f} crops/s (best {max(rates[r.name]):7.1f}), "
            f"{rate / base:6.1f}x cv2  cold {statistics.median(cold[r.name]):6.1f} ms a crop"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        folder = Path(name)
        if not a.root:
            make_folders(folder, [("train", "bench")])
            for i in range(a.frames):
                write_town_frame(
                    folder, Place("train", "bench", f"bench_{i:06d}", i), render(1, i, 2048, 1024, "clear")
                )
        found = pairs(a.root or folder)[: a.frames]
        frames = [(decoded(p, 1)[..., ::-1].copy(), decoded(q, -1)) for p, q in found]
        os.sync()
        print(f"{cpu_name()}, one core, {len(frames)} frames of {a.root or 'the town'}, {ROUNDS} rounds")
        shards = [shard_reader(folder, form, frames) for form in get_args(Format)]
        measure(shards + png_readers(found), [label.shape for _, label in frames], a.crops)


if __name__ == "__main__":
    main()
