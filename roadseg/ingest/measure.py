"""Decode every file once, on all cores, and measure it. Workers return small results, never pixels.

All checks together may take at most a fifth of the decoding time (benchmarks/ingest_speed.py). Therefore
exact_copies.py hashes pixels only where a copy is possible, ids are counted from changes between rows, pairs
are sent to workers in chunks, and workers keep freed memory. Most of the remaining time is SHA-256 of the files.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from roadseg.data.masks.form import MaskForm
from roadseg.data.masks.read import mask_bytes, read_ids, train_ids, unknown_colors, unknown_names
from roadseg.errors import ImageError, RoadsegError
from roadseg.files import sha256_bytes
from roadseg.images import formats as image_formats
from roadseg.images.decode import Limits, Photograph, read_bytes, read_label, read_photograph
from roadseg.ingest.checks.findings import plural
from roadseg.ingest.checks.interpolated_masks import interpolated_share
from roadseg.ingest.count_ids import count_ids
from roadseg.ingest.image_stats import ImageStats, image_stats
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import IGNORE
from roadseg.processes import cores, keep_freed_memory, start_worker

INLINE_PAIRS = 16  # for fewer pairs, starting processes takes longer than the work
CHUNK_PAIRS = 4  # pairs sent to a worker at once; sending them one by one costs 1 % more
GRID_ROWS, GRID_COLUMNS = 16, 32
MAX_IDS = 512  # kept per label; a mask of class ids has some dozens
_MAX_LISTED = 8

Problem = tuple[str, str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredPair:
    """What was measured on one pair of image and label.

    problems: (code, file, description). width, height: of the upright image, 0 if unreadable. image_format:
    "png", "jpeg", "webp", "bmp" or "tiff". orientation: EXIF 1..8 as stored, 1 if absent. label_bytes,
    label_sha256: of the label file, or of the image's annotations in a COCO file. pixels_digest: equal for equal
    files and, after exact_copies.with_pixel_digests, for equal pixels in different files; "" if unreadable.
    histogram: pixels by train id; the last entry counts void and unknown. id_pixels: (stored id, pixels), known
    or not, the most common first, at most `MAX_IDS`. mask_mode: of the label file, see image_formats.mode.
    places: uint8 [16, 32], train ids of the label at the centers of a grid. interpolated: see
    interpolated_masks.interpolated_share.
    """

    pair: Pair
    problems: tuple[Problem, ...]
    width: int = 0
    height: int = 0
    image_format: str = ""
    orientation: int = 1
    image_sha256: str = ""
    label_sha256: str = ""
    image_bytes: int = 0
    label_bytes: int = 0
    pixels_digest: str = ""
    stats: ImageStats | None = None
    histogram: tuple[int, ...] = ()
    id_pixels: tuple[tuple[int, int], ...] = ()
    mask_mode: str = ""
    places: bytes = b""
    interpolated: float = 0.0


@dataclass(frozen=True)
class Task:
    """What a worker needs to measure any pair. classes: the number of learned classes."""

    root: Path
    forms: Mapping[str, MaskForm]
    limits: Limits
    classes: int


def measure_pairs(
    root: Path, pairs: Sequence[Pair], forms: Mapping[str, MaskForm], limits: Limits, workers: int, classes: int = 0
) -> list[MeasuredPair]:
    """Measure all pairs, in their order. workers: 0 for one per core.

    forms: by `Pair.part`. classes: the number of learned classes; 0 takes it from the forms. Raises RoadsegError
    if a worker dies.
    """
    task = Task(root, forms, limits, classes or _classes(forms))
    with worker_pool(task, len(pairs), workers) as pool:
        return measure_all(task, pairs, pool)


@contextmanager
def worker_pool(task: Task, pairs: int, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield worker processes for `measure_all` and for later decoding; None if starting them takes too long.

    workers: 0 for one per core. Raises RoadsegError if a worker dies, whatever its task was.
    """
    workers = workers or cores()
    if workers == 1 or pairs < INLINE_PAIRS:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")  # OpenCV and torch can hang in a forked child
    pool = ProcessPoolExecutor(min(workers, -(-pairs // CHUNK_PAIRS)), spawn, _init_worker, (task,))
    with _one_blas_thread(), pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise RoadsegError(
                "a process that checks images died",
                expected="memory for one decoded image a process",
                todo="lower data.workers or data.max_image_pixels; a script that calls roadseg must do so "
                'below `if __name__ == "__main__":`',
            ) from None


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limit OpenBLAS to one thread in processes started inside the block.

    Its idle threads spin after import, which doubles the cost of starting a process (0.17 s of a core).
    """
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when the library is loaded, so this process is not affected
    try:
        yield
    finally:
        os.environ.pop("OPENBLAS_NUM_THREADS")
        if before is not None:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def measure_all(task: Task, pairs: Sequence[Pair], pool: ProcessPoolExecutor | None) -> list[MeasuredPair]:
    """Measure all pairs, in their order. pool: from `worker_pool` for this task, or None.

    The number of pending chunks is bounded, so memory grows only by the results, two kilobytes each.
    """
    from roadseg.progress import progress  # here, because workers need no tqdm and it doubles their import time

    measured = []
    with progress(len(pairs), "check", "images") as bar:
        for one in (measure_pair(task, p) for p in pairs) if pool is None else _in_processes(pairs, pool):
            measured.append(one)
            bar.update()
    return measured


def _classes(forms: Mapping[str, MaskForm]) -> int:
    learned = [c.train_id for form in forms.values() for c in form.label_set.classes if c.train_id != IGNORE]
    return max(learned, default=-1) + 1


def _in_processes(pairs: Sequence[Pair], pool: ProcessPoolExecutor) -> Iterator[MeasuredPair]:
    pending: deque[Future[list[MeasuredPair]]] = deque()
    for i in range(0, len(pairs), CHUNK_PAIRS):
        if len(pending) == 4 * cores():
            yield from pending.popleft().result()
        pending.append(pool.submit(_measure_chunk, pairs[i : i + CHUNK_PAIRS]))
    while pending:
        yield from pending.popleft().result()


_worker_task: list[Task] = []  # set once per worker: its lookup tables are costly to rebuild for each chunk


def _init_worker(task: Task) -> None:
    start_worker()
    keep_freed_memory()
    _worker_task[:] = [task]


def _measure_chunk(pairs: Sequence[Pair]) -> list[MeasuredPair]:
    return [measure_pair(_worker_task[0], pair) for pair in pairs]


def measure_pair(task: Task, pair: Pair) -> MeasuredPair:
    """Read and measure the files of one pair. Never raises for a bad file: it is recorded in `problems`."""
    form, limits, problems = task.forms[pair.part], task.limits, list[Problem]()
    image_data, photo = _decoded(
        lambda: read_bytes(task.root / pair.image, limits), lambda d: read_photograph(d, limits),
        problems, "unreadable-image", pair.image,
    )  # fmt: skip
    of_image = (
        _image_fields(photo, image_data) if photo else {}
    )  # before reading the label evicts the pixels from the CPU cache
    label_data, ids = _decoded(
        lambda: mask_bytes(task.root, pair.label, form, limits), lambda d: read_ids(d, form, limits),
        problems, "unreadable-label", pair.label,
    )  # fmt: skip
    counted = count_ids(ids) if ids is not None else []
    of_label = _label_fields(task, form, label_data, ids, counted) if ids is not None else {}
    problems += _unknown(task, pair, form, label_data, counted)
    if photo and _swapped(task, form, image_data, photo, counted):
        problems.append(("swapped", pair.image, f"holds only classes, while {pair.label} is no label"))
    instances = None
    if pair.instances:
        _, instances = _decoded(
            lambda: read_bytes(task.root / pair.instances, limits), lambda d: read_label(d, limits),
            problems, "unreadable-instances", pair.instances,
        )  # fmt: skip
    for other, path in ((photo.pixels if photo else None, pair.image), (instances, pair.instances)):
        if ids is not None and other is not None and other.shape[:2] != ids.shape:
            problems.append(("size-differs", path, f"{_size(other)}, but {pair.label} {_size(ids)}"))
    return MeasuredPair(pair, tuple(problems), mask_mode=image_formats.mode(label_data), **of_image, **of_label)


def _decoded(
    read: Callable[[], bytes], decode: Callable[[bytes], T], problems: list[Problem], code: str, path: str
) -> tuple[bytes, T | None]:
    """(the file's bytes, the decoded value); on failure the value is None and `problems` gets an entry."""
    data = b""
    try:
        data = read()
        return data, decode(data)
    except ImageError as e:
        problems.append((code, path, e.found + (f"; expected {e.expected}" if e.expected else "")))
    except OSError as e:
        problems.append((code, path, e.strerror or type(e).__name__))
    return data, None


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _image_fields(photo: Photograph, data: bytes) -> dict[str, Any]:
    return {
        "width": photo.pixels.shape[1],
        "height": photo.pixels.shape[0],
        "image_format": photo.format,
        "orientation": photo.orientation,
        "image_sha256": (sha256 := sha256_bytes(data)),
        "image_bytes": len(data),
        "pixels_digest": sha256,
        "stats": image_stats(photo.pixels),
    }


def _label_fields(
    task: Task, form: MaskForm, data: bytes, ids: np.ndarray, counted: list[tuple[int, int]]
) -> dict[str, Any]:
    pixels = [0] * (IGNORE + 1)
    for id_, count in counted:
        pixels[form.id_to_train[id_]] += count
    learned = pixels[: task.classes]
    return {
        "label_sha256": sha256_bytes(data),
        "label_bytes": len(data),
        "histogram": (*learned, ids.size - sum(learned)),
        "id_pixels": tuple(counted[:MAX_IDS]),
        "places": train_ids(ids.take(_places(*ids.shape)), form).tobytes(),
        "interpolated": interpolated_share(ids) if form.kind in ("ids", "colors") else 0.0,
    }


@lru_cache(maxsize=16)
def _places(high: int, wide: int) -> np.ndarray:
    """int64 [16, 32]: flat positions in [high, wide] of the centers of a grid."""
    rows = (2 * np.arange(GRID_ROWS) + 1) * high // (2 * GRID_ROWS)
    columns = (2 * np.arange(GRID_COLUMNS) + 1) * wide // (2 * GRID_COLUMNS)
    return rows[:, None] * wide + columns


def _unknown(task: Task, pair: Pair, form: MaskForm, data: bytes, counted: list[tuple[int, int]]) -> Iterator[Problem]:
    unknown = _unknown_ids(form, counted)
    if unknown and form.kind == "colors":
        colors, count = unknown_colors(data, form, task.limits)
        yield (
            "unknown-color",
            pair.label,
            _listed([f"{c} on {plural(n, 'pixel')}" for c, n in colors.items()], "colours", count),
        )
    elif unknown and form.kind == "ids":
        yield "unknown-id", pair.label, _listed([f"id {i} on {plural(n, 'pixel')}" for i, n in unknown], "ids")
    elif unknown:
        names = unknown_names(data, form)
        entries = [f"the class {ascii(name)[:60]} of {plural(n, 'shape')}" for name, n in names.items()]
        yield "unknown-id", pair.label, _listed(entries, "names")


def _unknown_ids(form: MaskForm, counted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(i, n) for i, n in counted if i not in form.label_set.known_ids]


def _listed(entries: list[str], what: str, count: int = 0) -> str:
    more = f" and {max(count, len(entries)) - _MAX_LISTED:,} more {what}" if len(entries) > _MAX_LISTED else ""
    return ", ".join(entries[:_MAX_LISTED]) + more


def _swapped(task: Task, form: MaskForm, image_data: bytes, photo: Photograph, counted: list[tuple[int, int]]) -> bool:
    """True if most of the label is unknown ids, while the image consists of class ids only."""
    if 2 * sum(n for _, n in _unknown_ids(form, counted)) < sum(n for _, n in counted):
        return False
    if form.kind == "colors":
        try:
            return not _unknown_ids(form, count_ids(read_ids(image_data, form, task.limits)))
        except ImageError:  # a JPEG holds no mask
            return False
    grey = photo.pixels[..., 0]
    if form.kind != "ids" or any(not np.array_equal(grey, photo.pixels[..., i]) for i in (1, 2)):
        return False
    return not _unknown_ids(form, count_ids(grey))
