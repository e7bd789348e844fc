"""Images per second that one GPU augments, and that a loader delivers to it from shards, without training.

    PYTHONPATH=. python benchmarks/gpu_feed.py [--frames 208] [--workers 8] [--batch 16] [--size 768]
    PYTHONPATH=. python benchmarks/gpu_feed.py --quick        a smoke test: small frames, no GPU needed

1. Renders town frames of 2048x1024 with all cores and writes them as shards.
2. Augmentation alone, from frames in GPU memory (scale 0.5 to 2, flip, brightness, contrast, saturation;
   also with 10 degrees of rotation): our kernel, the same in plain PyTorch, and F.grid_sample; timed by CUDA
   events, interleaved, medians. Bytes are the minimum traffic: each box read once, each crop written once.
   The bound is a copy of 2 GiB in the same run, counting bytes read and written. Outputs rotate through
   more memory than the L2 cache holds.
3. The loader with --workers processes: crops made on the CPU, boxes augmented on the GPU, and all frames
   in GPU memory. Cold: files dropped from the page cache, every frame once, including the start of the
   processes. Warm: after every process has read the frames.
A few batches of every variant are compared first. A failure is printed and the rest continues.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import cpu_name
from torch import Tensor

from roadseg.data.augment import gpu as gpu_augment
from roadseg.data.augment.cpu import Augmentation
from roadseg.data.augment.gpu import BatchParams
from roadseg.data.batches.gpu_frames import FramesOnGpu, load_frames
from roadseg.data.batches.loader import Batch, Crops
from roadseg.data.batches.plan import LoaderPlan, batches_of
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shard, Shards, write_frame
from roadseg.files import sha256_file
from roadseg.labels import CITYSCAPES
from roadseg.processes import cores, start_worker
from roadseg.town import render

FILL = (127, 127, 127)
ROUNDS = 5
TILES = ((16, 64, 4), (8, 64, 4), (8, 128, 4), (4, 128, 4), (32, 32, 4), (16, 64, 8), (16, 128, 8))


def say(text: str, since: float = time.monotonic()) -> None:
    print(f"[{time.monotonic() - since:5.1f} s] {text}", flush=True)


def write_shard(folders: dict[str, Path], size: tuple[int, int], number: int, indices: list[int]) -> dict[str, Shard]:
    """Write the same frames in every format."""
    frames = [render(1, i, *size) for i in indices]
    labels = [CITYSCAPES.id_to_train[frame.label_ids].astype(np.uint8) for frame in frames]
    made = {}
    for form, folder in folders.items():
        path = folder / f"train-{number:05d}.bin"
        with open(path, "wb") as f:
            rows = [
                write_frame(f, str(i), "", frame.image, label, form=form)  # type: ignore[arg-type]
                for i, frame, label in zip(indices, frames, labels, strict=True)
            ]
            f.flush()
            os.fsync(f.fileno())  # dirty pages can't be dropped from the cache
        made[form] = Shard(path.name, sha256_file(path), tuple(rows))
    return made


def write_shards(folders: dict[str, Path], frames: int, size: tuple[int, int]) -> None:
    for folder in folders.values():
        folder.mkdir(parents=True)
    jobs = [part.tolist() for part in np.array_split(np.arange(frames), min(frames, 2 * cores()))]
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"), start_worker) as pool:
        made = list(pool.map(partial(write_shard, folders, size), range(len(jobs)), jobs))
    grey = (127.5, 127.5, 127.5)
    for form, folder in folders.items():
        rows = {"train": tuple(shards[form] for shards in made)}
        Shards(
            folder=folder,
            source="town",
            label_set=CITYSCAPES,
            mean=grey,
            std=grey,
            class_pixels={"train": [1] * 20},
            fingerprints={},
            shards=rows,
            form=form,
        ).save()  # type: ignore[arg-type]
        say(f"{form} shards: {sum(p.stat().st_size for p in folder.glob('*.bin')) / 1e6:.0f} MB")


def crops_of(folder: Path, a: argparse.Namespace, rotate_deg: float = 0.0) -> Crops:
    split = Shards.load(folder).split("train")  # a new one: another may keep files mapped
    return Crops(split, Augmentation((a.size, a.size), rotate_deg=rotate_deg), 0, FILL)


def per_call_s(call: Callable[[int], object], calls: int, device: torch.device) -> float:
    """Mean seconds of a call, by CUDA events on a GPU."""
    kept: deque[object] = deque(maxlen=8)  # so that the next call does not write to cached memory
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            kept.append(call(i))
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for i in range(calls):
        kept.append(call(i))
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def copy_bytes_per_s(device: torch.device, n: int) -> float:
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    per_call_s(lambda _: target.copy_(source), 3, device)
    return 2 * n / min(per_call_s(lambda _: target.copy_(source), 10, device) for _ in range(3))


def by_grid_sample(flat: Tensor, s: BatchParams, tensors: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The usual way on a GPU: each box as float, F.grid_sample for image and label, a matrix product for color."""
    images, labels = [], []
    transforms = tensors[1]
    for row, (image_at, label_at, height, width, row_px, _) in enumerate(s.layout.tolist()):
        box = flat.as_strided((1, 3, height, width), (1, 1, 3 * row_px, 3), image_at).float()
        ids = flat.as_strided((1, 1, height, width), (1, 1, row_px, 1), label_at).float()
        affine, color = transforms[row, :6].view(2, 3), transforms[row, 6:].view(3, 4)
        steps = torch.arange(size, device=flat.device, dtype=torch.float32)
        x, y = steps[None, :].expand(size, size), steps[:, None].expand(size, size)
        at = torch.stack([x, y, torch.ones_like(x)], -1) @ affine.T
        grid = ((2 * at + 1) / torch.tensor([width, height], device=flat.device) - 1)[None]
        inside = (grid.abs() <= 1).all(-1)
        pixels = F.grid_sample(box, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        tinted = (color[:, :3] @ pixels.reshape(3, -1) + color[:, 3:]).clamp(0, 255).view(3, size, size)
        near = F.grid_sample(ids, grid, mode="nearest", padding_mode="border", align_corners=False)[0]
        images.append(torch.where(inside, tinted, 127.0).to(torch.uint8).permute(1, 2, 0))
        labels.append(torch.where(inside, near, 255.0).to(torch.uint8)[0])
    return torch.stack(images), torch.stack(labels)


@dataclass(frozen=True)
class Prepared:
    """Crop parameters of several batches, and the bytes that one batch has to move."""

    flat: Tensor
    batch_list: list[BatchParams]
    placed: list[tuple[Tensor, Tensor]]
    crop_px: tuple[int, int]
    moved_bytes: float


def prepare(frames: FramesOnGpu, crops: Crops, a: argparse.Namespace, device: torch.device) -> Prepared:
    order = Order(crops.split.frames, 0)
    batch_list = [
        frames.offsets.batch_params(crops, samples) for samples in Batches(order, a.batch, 0, 4 if a.quick else 48)
    ]
    placed = [(torch.from_numpy(s.layout).to(device), torch.from_numpy(s.transforms).to(device)) for s in batch_list]
    # A crop reads as many pixels as its affine covers, at most the whole box.
    affines = [s.transforms[:, :6].reshape(-1, 2, 3)[:, :, :2] for s in batch_list]
    covered = [np.abs(np.linalg.det(m)) * a.size**2 for m in affines]
    boxes = [s.layout[:, 2] * s.layout[:, 3] for s in batch_list]
    read = statistics.mean(float(np.minimum(c, b).sum()) for c, b in zip(covered, boxes, strict=True))
    return Prepared(frames.flat, batch_list, placed, (a.size, a.size), 4 * (read + a.batch * a.size**2))


def whole(d: Prepared, i: int) -> object:
    return gpu_augment.cut_crops(d.flat, d.batch_list[i % len(d.batch_list)], d.crop_px, FILL)


def kernel(d: Prepared, i: int) -> tuple[Tensor, Tensor]:
    from roadseg.data.augment import gpu_kernel

    return gpu_kernel.cut_crops(d.flat, *d.placed[i % len(d.placed)], d.crop_px, FILL)


def plain(d: Prepared, i: int) -> tuple[Tensor, Tensor]:
    return gpu_augment.cut_crops_plain(d.flat, *d.placed[i % len(d.placed)], d.crop_px, FILL)


def grid_sample(d: Prepared, i: int) -> object:
    k = i % len(d.batch_list)
    return by_grid_sample(d.flat, d.batch_list[k], d.placed[k], d.crop_px[0])


def augmentation_alone(folder: Path, a: argparse.Namespace, device: torch.device) -> None:
    bound = copy_bytes_per_s(device, (16 << 20) if a.quick else (2 << 30))
    say(f"copy on the device: {bound / 1e12:.3f} TB/s, bytes read and written")
    frames = load_frames(crops_of(folder, a).split, device)
    print("| augmentation alone | images/s | µs a batch | GB/s | share of the copy's |\n|---|---|---|---|---|")
    for rotate_deg in (0.0, 10.0):
        d = prepare(frames, crops_of(folder, a, rotate_deg), a, device)
        forms: dict[str, tuple[Callable[[int], object], int]] = {
            "as the loader calls it": (partial(whole, d), 96),
            "plain PyTorch": (partial(plain, d), 4),
            "F.grid_sample": (partial(grid_sample, d), 4),
        }
        if device.type == "cuda":
            forms = {"kernel": (partial(kernel, d), 96), **forms}
        compare(forms, d.moved_bytes, bound, f"rotation {rotate_deg:g}", a, device)
        if device.type == "cuda":
            tiles(partial(kernel, d), device)


def compare(
    forms: dict[str, tuple[Callable[[int], object], int]],
    moved: float,
    bound: float,
    what: str,
    a: argparse.Namespace,
    device: torch.device,
) -> None:
    took: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(ROUNDS + 1):  # the first compiles and warms up
        for name, (call, calls) in forms.items():
            try:
                seconds = per_call_s(call, 2 if a.quick else calls, device)
                took[name] += [seconds] if round_ else []
            except Exception:
                traceback.print_exc()
    for name, seconds_of in took.items():
        if seconds_of:
            s = statistics.median(seconds_of)
            rate = moved / s
            cells = f"{a.batch / s:,.0f} | {s * 1e6:.0f} | {rate / 1e9:.0f} | {rate / bound:.1%}"
            print(f"| {what}: {name} | {cells} |", flush=True)


def tiles(call: Callable[[int], object], device: torch.device) -> None:
    """Print the kernel's time for several tile sizes."""
    from roadseg.data.augment import gpu_kernel

    before, found = (gpu_kernel.TILE, gpu_kernel.WARPS), []
    for height, width, warps in TILES:
        gpu_kernel.TILE, gpu_kernel.WARPS = (height, width), warps
        per_call_s(call, 8, device)
        s = statistics.median(per_call_s(call, 96, device) for _ in range(3))
        found.append(f"{height}x{width}/{warps} warps {s * 1e6:.0f} µs")
    gpu_kernel.TILE, gpu_kernel.WARPS = before
    print("tiles: " + ", ".join(found), flush=True)


def drop_from_cache(folder: Path) -> None:
    gc.collect()
    for path in folder.glob("*.bin"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(folder: Path, a: argparse.Namespace, plan: LoaderPlan, device: torch.device) -> Generator[Batch, None, None]:
    crops = crops_of(folder, a)
    order = Order(crops.split.frames, 0)
    return batches_of(plan, crops, Batches(order, a.batch, 0, 10**6), device)


def loader_rates(folder: Path, a: argparse.Namespace, plan: LoaderPlan, device: torch.device) -> str:
    """Images/s cold and warm."""
    epoch = -(-a.frames // a.batch)
    drop_from_cache(folder)
    began = time.monotonic()
    batches = start(folder, a, plan, device)
    for _ in itertools.islice(batches, epoch):
        pass
    cold = epoch * a.batch / (time.monotonic() - began)
    for path in folder.glob("*.bin"):
        path.read_bytes()
    for _ in itertools.islice(batches, 4 * epoch):  # each process reads most frames
        pass
    warm = []
    for _ in range(3):
        began, count = time.monotonic(), 0
        while time.monotonic() - began < a.seconds / 3:
            next(batches)
            count += a.batch
        warm.append(count / (time.monotonic() - began))
    batches.close()
    return f"{cold:,.0f} | {statistics.median(warm):,.0f} | {min(warm):,.0f} to {max(warm):,.0f}"


def agreement(folder: Path, a: argparse.Namespace, device: torch.device) -> None:
    """Print how far each variant differs from crops made by OpenCV, over a few batches."""
    ways = {"boxes": LoaderPlan(False, True, 2, ""), "in GPU memory": LoaderPlan(True, True, 0, "")}
    with closing(start(folder, a, LoaderPlan(False, False, 2, ""), device)) as batches:
        wanted = list(itertools.islice(batches, 4))
    for name, plan in ways.items():
        with closing(start(folder, a, plan, device)) as batches:
            got = list(itertools.islice(batches, 4))
        assert [b.samples for b in got] == [b.samples for b in wanted]
        far = [(b.image_BHWC.int() - w.image_BHWC.int()).abs() for b, w in zip(got, wanted, strict=True)]
        other = [(b.label_BHW != w.label_BHW).float().mean().item() for b, w in zip(got, wanted, strict=True)]
        share = statistics.mean((f > 2).float().mean().item() for f in far)
        worst = max(int(f.max()) for f in far)
        say(f"{name}: {share:.3%} of values differ by over 2 (most {worst}), {statistics.mean(other):.3%} of labels")
    if device.type == "cuda":
        d = prepare(load_frames(crops_of(folder, a).split, device), crops_of(folder, a, 10.0), a, device)
        for i in range(3):
            ours, plainly = kernel(d, i), plain(d, i)
            far_ = (ours[0].int() - plainly[0].int()).abs()
            say(
                f"kernel and plain PyTorch: {(far_ > 0).float().mean():.4%} of values differ (most {int(far_.max())}), "
                f"{(ours[1] != plainly[1]).float().mean():.4%} of labels"
            )


def loader(folder: Path, a: argparse.Namespace, device: torch.device, form: str) -> None:
    cuda = device.type == "cuda"
    ways = {
        f"{form}: crops made on the CPU, {a.workers} processes": LoaderPlan(False, False, a.workers, ""),
        f"{form}: boxes augmented on the GPU, {a.workers} processes": LoaderPlan(False, True, a.workers, ""),
    }
    if cuda:
        ways[f"{form}: boxes augmented on the GPU, {2 * a.workers} processes"] = LoaderPlan(
            False, True, 2 * a.workers, ""
        )
    if form == a.forms.split(",")[0]:
        ways["all frames in GPU memory (cold: with loading them)"] = LoaderPlan(True, True, 0, "")
    print("| loader, no training | cold images/s | warm images/s | range |\n|---|---|---|---|", flush=True)
    for name, plan in ways.items():
        try:
            print(f"| {name} | {loader_rates(folder, a, plan, device)} |", flush=True)
        except Exception:
            print(f"| {name} | failed | | |")
            traceback.print_exc()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=208)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each warm measurement")
    parser.add_argument("--forms", default="raw,jpeg", help="of shards")
    parser.add_argument("--folder", type=Path, help="where shards go; a temporary folder by default")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    size = (2048, 1024)
    if a.quick:
        a.frames, a.workers, a.batch, a.size, a.seconds, size = 8, 2, 4, 64, 0.3, (256, 128)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{name}; {cpu_name()}, {cores()} cores; PyTorch {torch.__version__}, Python {platform.python_version()}")
    print(f"{a.frames} frames of {size[0]}x{size[1]}, batches of {a.batch} crops of {a.size}x{a.size}")
    with tempfile.TemporaryDirectory(dir=a.folder) as temporary:
        folders = {form: Path(temporary) / form for form in a.forms.split(",")}
        write_shards(folders, a.frames, size)
        first = next(iter(folders.values()))
        parts = [partial(agreement, first, a, device), partial(augmentation_alone, first, a, device)]
        parts += [partial(loader, folder, a, device, form) for form, folder in folders.items()]
        for part in parts:
            try:
                part()
            except Exception:
                traceback.print_exc()
            say("done")


if __name__ == "__main__":
    main()
