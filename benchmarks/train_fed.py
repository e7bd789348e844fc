"""Images per second of training with data from files, 768x768, compared to common alternatives.

    PYTHONPATH=. python benchmarks/train_fed.py [--frames 208] [--steps 1200] [--batch 16] [--size 768] [--workers 8]

One run on one machine, 19 classes, random weights, AdamW, bf16 on CUDA:
1. roadseg's own training (the command's code, default model with its two auxiliary heads), fed by worker
   processes from raw shards on disk; images/s and the share of time spent waiting for data are from its own
   log, over the second half of the steps, without compilation and graph capture.
2. The reference model in a plain loop over a torch DataLoader of the same frames as PNGs: decoded by OpenCV,
   cropped, mirrored, normalized in float32.
3. segmentation_models.pytorch's DeepLabV3Plus with the same backbone, and the backbone alone (its coarsest map's
   sum as loss): eager steps on one batch on the device, without loading.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from gpu_feed import say, write_shards
from machine import cpu_name
from reference_model import ReferenceModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from roadseg.config.sections import load_config
from roadseg.data.shards.index import Shards
from roadseg.files import read_json, read_json_lines
from roadseg.labels import CITYSCAPES, IGNORE
from roadseg.processes import cores, start_worker
from roadseg.town import render
from roadseg.train.stage import train_candidate

CLASSES = 19
WARM_STEPS, ROUNDS = 12, 5


def write_pngs(folder: Path, size: tuple[int, int], index: int) -> None:
    frame = render(1, index, *size)
    cv2.imwrite(str(folder / f"{index:04d}.png"), frame.image[..., ::-1])
    label = CITYSCAPES.id_to_train[frame.label_ids].astype(np.uint8)
    cv2.imwrite(str(folder / f"{index:04d}_label.png"), label)


class Pngs(Dataset[tuple[Tensor, Tensor]]):
    """A random crop of a PNG pair, mirrored half the time, normalized: float32 [3, S, S] and int64 [S, S]."""

    def __init__(self, folder: Path, size: int) -> None:
        self._files, self._size = sorted(p for p in folder.glob("*.png") if not p.stem.endswith("_label")), size

    def __len__(self) -> int:
        return 100 * len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        cv2.setNumThreads(0)
        path = self._files[index % len(self._files)]
        rng = np.random.default_rng(index)
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        label = cv2.imread(str(path.with_name(f"{path.stem}_label.png")), cv2.IMREAD_UNCHANGED)
        top, left = (int(rng.integers(0, n - self._size + 1)) for n in label.shape)
        box = slice(top, top + self._size), slice(left, left + self._size)
        image, label = image[box], label[box]
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        values = (image.astype(np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)), torch.from_numpy(
            label.astype(np.int64)
        )


def ours(folder: Path, work: Path, a: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """images_per_s and waiting_share of the later rows of the training's own log."""
    config = load_config(
        None,
        {
            "model": {"backbone_weights": "none"},
            "training": {
                "steps": a.steps, "batch_size": a.batch, "crop_px": [a.size, a.size], "optimizer": "adamw",
                "frames_on_gpu": "never", "workers": a.workers, "device": device.type, "pictures": 0,
                "compile": "always" if device.type == "cuda" else "never", "validate_every": a.steps,
            },
        },
    )  # fmt: skip
    began = time.monotonic()
    work.mkdir()
    train_candidate(config, Shards.load(folder), work)
    rows = read_json_lines(work / "log" / "timing.jsonl")
    later = rows[len(rows) // 2 :] or [read_json(work / "log" / "bottleneck.json")]  # a row is ten seconds
    say(f"roadseg: {a.steps} steps with compilation, export and packing in {time.monotonic() - began:.0f} s")
    return {key: statistics.median(row[key] for row in later) for key in ("images_per_s", "waiting_share")}


def plain_step(network: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=device.type == "cuda")

    def step(image: Tensor, label: Tensor) -> None:
        image = image.to(device, non_blocking=True, memory_format=torch.channels_last)
        label = label.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = network(image)
        if isinstance(out, list):
            loss = out[-1].float().sum() * 1e-6
        else:
            logits = F.interpolate(out.float(), size=label.shape[1:], mode="bilinear")
            loss = F.cross_entropy(logits, label, ignore_index=IGNORE)
        loss.backward()
        optimizer.step()

    return step


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reference(folder: Path, a: argparse.Namespace, device: torch.device) -> float:
    step = plain_step(ReferenceModel(CLASSES), device)
    loader = iter(DataLoader(Pngs(folder, a.size), a.batch, shuffle=True, num_workers=a.workers, pin_memory=True))
    for _ in range(a.peer_steps // 2):
        step(*next(loader))
    finish(device)
    start = time.perf_counter()
    for _ in range(a.peer_steps):
        step(*next(loader))
    finish(device)
    return a.batch * a.peer_steps / (time.perf_counter() - start)


def unloaded(network: nn.Module, a: argparse.Namespace, device: torch.device) -> float:
    step = plain_step(network, device)
    image = torch.randn(a.batch, 3, a.size, a.size).to(device)
    label = torch.randint(0, CLASSES, (a.batch, a.size, a.size)).to(device)
    rates = []
    for round_ in range(ROUNDS + 1):
        steps = WARM_STEPS if not round_ else max(2, a.peer_steps // 4)
        start = time.perf_counter()
        for _ in range(steps):
            step(image, label)
        finish(device)
        rates.append(a.batch * steps / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def attempt(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as e:  # a missing peer must not end the whole measurement
        say(f"{name} failed: {type(e).__name__}: {str(e)[:300]}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=208)
    parser.add_argument("--frame", default="2048x1024", help="width x height of a frame")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--peer-steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--workers", type=int, default=8)
    a = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("roadseg").setLevel(logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{name}; {cpu_name()}, {cores()} cores; PyTorch {torch.__version__}; batch {a.batch} of {a.size}x{a.size}")
    width, height = map(int, a.frame.split("x"))
    rates: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards({"raw": root / "raw"}, a.frames, (width, height))
        (root / "png").mkdir()
        with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"), start_worker) as pool:
            list(pool.map(partial(write_pngs, root / "png", (width, height)), range(a.frames)))
        say("PNGs written")
        mine = attempt("roadseg", lambda: ours(root / "raw", root / "work", a, device))
        rates["roadseg, fed from shards"] = mine and mine["images_per_s"]
        if mine:
            say(f"roadseg waited for data {mine['waiting_share']:.1%} of the time")
        rates["reference model, DataLoader over PNGs"] = attempt(
            "reference", lambda: reference(root / "png", a, device)
        )

    def smp() -> float:
        from segmentation_models_pytorch import DeepLabV3Plus

        return unloaded(DeepLabV3Plus("tu-mobilenetv2_100", encoder_weights=None, classes=CLASSES), a, device)

    rates["segmentation_models.pytorch, same backbone, not loading"] = attempt("smp", smp)
    backbone = timm.create_model("mobilenetv2_100", features_only=True, output_stride=16)
    rates["the backbone alone, eager, not loading"] = attempt("backbone", lambda: unloaded(backbone, a, device))
    print("| training | images/s |\n|---|---|")
    for form, rate in rates.items():
        print(f"| {form} | {'failed' if rate is None else f'{rate:.0f}'} |")


if __name__ == "__main__":
    main()
