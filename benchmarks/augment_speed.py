"""Augmented 768x768 samples per second on one core: from shards, from memory, and the usual way.

    python benchmarks/augment_speed.py [--frames 12] [--samples 60] [--keep FOLDER | --shards FOLDER]

The usual way: Pillow decodes the PNGs of image and label, both are resized whole, cropped and mirrored,
torchvision's ColorJitter changes the colors, numpy normalizes to float32. Ours: the crop's box is read from the
shard, resized, mirrored, color-jittered, uint8 (the network normalizes). All with the same ranges: scale 0.5 to 2,
flip, brightness, contrast and saturation +-0.4. Frames are rendered at 2048x1024 unless --shards names the folder of
an earlier run with --keep. Rounds of all variants are interleaved and medians printed; seconds are CPU time of this
process, so that other processes do not count; files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from machine import cpu_name
from PIL import Image
from torchvision.transforms import ColorJitter

from roadseg.data.augment.cpu import Augmentation, apply
from roadseg.data.batches.loader import Crops
from roadseg.data.batches.sampler import Sample
from roadseg.data.shards.index import Shard, Shards, Split, write_frame
from roadseg.files import sha256_file
from roadseg.labels import CITYSCAPES
from roadseg.processes import keep_freed_memory
from roadseg.town import render

ROUNDS = 7
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def write(folder: Path, frames: int) -> None:
    """Render frames and write them as PNGs and as shards of two formats."""
    made = []
    for i in range(frames):
        frame = render(1, i, 2048, 1024)
        label = CITYSCAPES.id_to_train[frame.label_ids].astype(np.uint8)
        Image.fromarray(frame.image).save(folder / f"{i:03d}.png")
        Image.fromarray(label).save(folder / f"{i:03d}_label.png")
        made.append((frame.image, label))
    for form in ("raw", "jpeg"):
        (folder / form).mkdir()
        path = folder / form / "train-00000.bin"
        with open(path, "wb") as f:
            rows = tuple(write_frame(f, str(i), "", *pair, form=form) for i, pair in enumerate(made))  # type: ignore[arg-type]
        shards = {"train": (Shard(path.name, sha256_file(path), rows),)}
        grey = (127.5, 127.5, 127.5)
        Shards(
            folder=folder / form,
            source="town",
            label_set=CITYSCAPES,
            mean=grey,
            std=grey,
            class_pixels={"train": [1] * 20},
            fingerprints={},
            shards=shards,
            form=form,
        ).save()  # type: ignore[arg-type]


def usual(pngs: list[Path], size: int) -> Callable[[int], object]:
    jitter = ColorJitter(0.4, 0.4, 0.4)

    def sample(i: int) -> object:
        rng = np.random.default_rng(i)
        path = pngs[i % len(pngs)]
        image = Image.open(path).convert("RGB")
        label = Image.open(path.with_name(path.stem + "_label.png"))
        scale = rng.uniform(0.5, 2.0)
        scaled = round(image.width * scale), round(image.height * scale)
        image, label = image.resize(scaled, Image.Resampling.BILINEAR), label.resize(scaled, Image.Resampling.NEAREST)
        left, top = (int(rng.integers(max(1, side - size + 1))) for side in scaled)
        box = left, top, left + size, top + size  # Pillow fills the outside with 0
        image, label = image.crop(box), label.crop(box)
        if rng.random() < 0.5:
            image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
        pixels = (np.asarray(jitter(image), np.float32) / 255 - MEAN) / STD
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), np.asarray(label)

    return sample


def from_shards(split: Split, a: Augmentation) -> Callable[[int], object]:
    crops = Crops(split, a, 0, (127, 127, 127))
    return lambda i: crops.crop(Sample(i // len(split), i % len(split)))


def from_memory(split: Split, a: Augmentation) -> Callable[[int], object]:
    crops, (image, label) = Crops(split, a, 0, (127, 127, 127)), (x.copy() for x in split.read(0))

    def sample(i: int) -> object:
        d = crops.params(Sample(i, 0))
        top, left, height, width = d.box
        box = slice(top, top + height), slice(left, left + width)
        return apply(d, image[box], label[box], crops.fill)

    return sample


def measure(forms: dict[str, Callable[[int], object]], samples: int, slow: str) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for name, sample in forms.items():
        for i in range(5 if name == slow else samples):  # every frame once, so that it is mapped and verified
            sample(i)
    for r in range(ROUNDS):
        for name, sample in forms.items():
            count = max(3, samples // 20) if name == slow else samples
            start = time.process_time()
            for i in range(r * count, (r + 1) * count):
                sample(i)
            rates[name].append(count / (time.process_time() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--samples", type=int, default=60, help="per variant and round; a twentieth for the usual way")
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--shards", type=Path, help="folder with raw/ and jpeg/ from a run with --keep")
    parser.add_argument("--keep", type=Path, help="render into this folder and leave it there")
    a = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the loader's processes; here for all variants
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.shards or a.keep or Path(temporary)
        if not a.shards:
            folder.mkdir(exist_ok=True)
            write(folder, a.frames)
        pngs = sorted(p for p in folder.glob("*.png") if not p.stem.endswith("_label"))
        raw, jpeg = (Shards.load(folder / form).split("train") for form in ("raw", "jpeg"))
        drawn = Augmentation((a.size, a.size))
        slow = "the usual way, from PNG"
        forms = {
            slow: usual(pngs, a.size),
            "shard, raw": from_shards(raw, drawn),
            "shard, jpeg": from_shards(jpeg, drawn),
            "augmentation alone, box in memory": from_memory(raw, drawn),
        }
        rates = measure(forms, a.samples, slow)
    print(f"{cpu_name()}, one core, {len(pngs)} frames of 2048x1024, crops of {a.size}x{a.size}, {ROUNDS} rounds")
    base = statistics.median(rates[slow])
    print("| form | samples/s, median | best | times the usual way |\n|---|---|---|---|")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {max(values):.0f} | {median / base:.1f} |")


if __name__ == "__main__":
    main()
