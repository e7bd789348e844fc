"""Speed of ingest with all checks, against decoders that only read image and label with as many processes.

The frames are 2048x1024 PNGs in the Cityscapes tree, all in train: scenes of the rendered town or of a real tree
(--root), shifted, flipped and brightened so that no two are equal, and encoded to about their original size. Rounds
are interleaved. Each row prints the median rate, the median over rounds of its ratio to kornia_rs, and the same
ratio for CPU time (user and system, all processes), which other load hardly affects. All rows include starting the
processes. Usage:

    python benchmarks/ingest_speed.py [--frames 1000] [--root TREE] [--keep FOLDER] [--rounds 3] [--processes 2]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from ingest_memory import peak
from machine import cpu_name

from roadseg.images.decode import read_image, read_label
from roadseg.processes import start_worker

WIDTH, HEIGHT = 2048, 1024
SCENES = 24
# Decodes as fast as Cityscapes' own files, which also choose a filter per row. Files with one fixed filter, as many
# tools write labels, decode faster.
ENCODING = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS]
Files = tuple[str, str]


def scene(root: Path | None, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [H, W, 3] RGB, uint8 [H, W] of ids)."""
    if root is None:
        from roadseg.town import render

        frame = render(1, index, WIDTH, HEIGHT)
        return frame.image, frame.label_ids
    images = sorted(root.glob("leftImg8bit/*/*/*_leftImg8bit.png"))
    image = images[index % len(images)]
    label = str(image).replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit", "_gtFine_labelIds")
    return read_image(image), read_label(Path(label))


def write_variants(root: Path, source: Path | None, frames: int, scenes: int, index: int) -> None:
    """Write all frames derived from one scene."""
    image, ids = scene(source, index)
    for number in range(index, frames, scenes):
        variant = number // scenes
        shift, flip = variant * 389 % WIDTH, variant % 2 * 2 - 1
        brighter = np.clip(image[:, ::flip].astype(np.int16) + variant % 25 - 12, 0, 255).astype(np.uint8)
        photo, truth = files(number)
        cv2.imwrite(str(root / photo), np.roll(brighter, shift, 1)[..., ::-1], ENCODING)
        cv2.imwrite(str(root / truth), np.roll(ids[:, ::flip], shift, 1), ENCODING)


def files(number: int) -> Files:
    stem = f"bench/bench_{number // 30:06d}_{number % 30:06d}"
    return f"leftImg8bit/train/{stem}_leftImg8bit.png", f"gtFine/train/{stem}_gtFine_labelIds.png"


def write_tree(root: Path, source: Path | None, frames: int, processes: int) -> None:
    scenes = len(list(source.glob("leftImg8bit/*/*/*_leftImg8bit.png"))) if source else SCENES
    for path in files(0):
        (root / path).parent.mkdir(parents=True)
    with pool(processes) as workers:
        list(workers.map(partial(write_variants, root, source, frames, scenes), range(scenes)))


def pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker)


def by_kornia(root: Path, pair: Files) -> int:
    from kornia_rs import io

    image, label = (
        io.read_image_png_u8(str(root / path), mode) for path, mode in zip(pair, ("rgb", "mono"), strict=True)
    )
    return image.size + label.size


def by_cv2(root: Path, pair: Files) -> int:
    image = cv2.imread(str(root / pair[0]), cv2.IMREAD_COLOR)
    label = cv2.imread(str(root / pair[1]), cv2.IMREAD_UNCHANGED)
    assert image is not None and label is not None
    return image.size + label.size


def decode(how: Callable[[Path, Files], int], root: Path, pairs: list[Files], processes: int) -> None:
    if processes == 1:
        cv2.setNumThreads(0)
        sizes = [how(root, pair) for pair in pairs]
    else:
        with pool(processes) as workers:
            sizes = list(workers.map(partial(how, root), pairs, chunksize=4))
    assert sum(sizes) == len(pairs) * WIDTH * HEIGHT * 4


def whole_ingest(root: Path, pairs: list[Files], processes: int) -> None:
    from roadseg.config.sections import Data
    from roadseg.ingest.stage import ingest

    with tempfile.TemporaryDirectory() as work:
        manifest = ingest(Data(source="cityscapes", workers=processes), root, Path(work))
        assert len(manifest.samples) == len(pairs) and Path(work, "manifest.jsonl").exists()


def all_checks(root: Path, pairs: list[Files], processes: int) -> None:
    from roadseg.config.sections import Data
    from roadseg.images.decode import Limits
    from roadseg.ingest.checks.judge import check
    from roadseg.ingest.sources.select import find

    found = find(Data(source="cityscapes"), root)
    checked = check(root, found.pairs, found.label_set, found.forms, Limits(), processes)
    assert len(checked.samples) == len(pairs)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of a call, including its child processes."""

    def cpu_s() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    cpu, begin = cpu_s(), time.perf_counter()
    work()
    return time.perf_counter() - begin, cpu_s() - cpu


def measure(root: Path, frames: int, rounds: int, processes: int) -> None:
    pairs = [files(i) for i in range(frames)]
    few = pairs[: max(1, frames // 4)]
    rows: dict[str, tuple[int, Callable[[], None]]] = {
        f"kornia_rs alone, {processes} processes": (frames, lambda: decode(by_kornia, root, pairs, processes)),
        f"roadseg, all checks, {processes} processes": (frames, lambda: all_checks(root, pairs, processes)),
        "the same, manifest, HTML report": (frames, lambda: whole_ingest(root, pairs, processes)),
        f"cv2 alone, {processes} processes": (len(few), lambda: decode(by_cv2, root, few, processes)),
        "cv2 loop, 1 process": (len(few), lambda: decode(by_cv2, root, few, 1)),
    }
    decode(by_kornia, root, pairs, processes)  # fills the page cache
    walls: dict[str, list[float]] = {name: [] for name in rows}  # seconds per pair
    cpus: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (count, work) in rows.items():
            wall, cpu = timed(work)
            walls[name].append(wall / count)
            cpus[name].append(cpu / count)
    first = next(iter(rows))
    print(f"{'':42s} pairs/s  ratio  cpu ms/pair  ratio")
    for name in rows:
        ratio = statistics.median(a / b for a, b in zip(walls[first], walls[name], strict=True))
        cpu_ratio = statistics.median(a / b for a, b in zip(cpus[first], cpus[name], strict=True))
        rate, cpu_ms = 1 / statistics.median(walls[name]), 1000 * statistics.median(cpus[name])
        print(f"{name:42s} {rate:7.1f}  {ratio:5.3f}  {cpu_ms:11.2f}  {cpu_ratio:5.3f}")


def memory(root: Path, frames: int, processes: int) -> None:
    """Peak memory on the first tenth of the frames and on all of them."""
    tops = []
    for count in (frames // 10, frames):
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            for path in (path for i in range(count) for path in files(i)):
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                os.link(root / path, Path(folder, path))
            tops.append(peak(Path(folder), count, processes)[0])
            print(f"{count:6,d} frames: peak of parent and workers {tops[-1] / 2**20:.0f} MiB")
    print(f"ratio {tops[1] / tops[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--root", type=Path, help="a Cityscapes tree whose frames are varied; without, the town")
    parser.add_argument("--keep", type=Path, help="where the tree is written, or lies already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        tree = a.keep or Path(folder, "tree")
        if not tree.exists():
            write_tree(tree, a.root, a.frames, a.processes)
        sizes = [sum((tree / path).stat().st_size for path in files(i)) for i in range(a.frames)]
        print(f"{cpu_name()}, {a.frames:,} frames of {WIDTH}x{HEIGHT}, {sum(sizes) / len(sizes) / 1e6:.2f} MB per pair")
        measure(tree, a.frames, a.rounds, a.processes)
        memory(tree, a.frames, a.processes)


if __name__ == "__main__":
    main()
