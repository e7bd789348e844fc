"""Every file decoded once, on all cores: what of it matters is small, the pixels stay in the worker.

All checks together are to take less than a fifth of what the decoding takes (benchmarks/ingest_speed.py).
So pixels are hashed in copies.py where there may be a copy, ids are counted by changes, pairs go to the workers
by handfuls, and workers keep their memory. Most of what is left is SHA-256 of the files.
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

import cv2
import numpy as np

from roadseg.data.masks.form import MaskForm
from roadseg.data.masks.read import mask_bytes, read_ids, train_ids, unknown_colors, unknown_names
from roadseg.errors import ImageError, RoadsegError
from roadseg.files import sha256_bytes
from roadseg.images import formats as image_formats
from roadseg.images.decode import Limits, Photograph, read_bytes, read_label, read_photograph
from roadseg.ingest.checks.findings import plural
from roadseg.ingest.checks.interpolated_masks import interpolated_share
from roadseg.ingest.image_stats import ImageStats, image_stats
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import IGNORE
from roadseg.processes import cores, keep_freed_memory, start_worker

INLINE_PAIRS = 16  # below this, starting processes takes longer than the work
CHUNK_PAIRS = 4  # pairs that go to a worker at once; one by one, sending them costs 1 % more
GRID_ROWS, GRID_COLUMNS = 16, 32
MAX_IDS = 512  # that are kept of one label; a label of class ids has some dozens
_MAX_LISTED = 8
_EXACT_IN_FLOAT32 = 1 << 24

Problem = tuple[str, str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredPair:
    """One pair after its files were decoded.

    problems: (code, file, what). width, height: of the upright image, 0 if unreadable. image_format:
    "png", "jpeg", "webp", "bmp" or "tiff". orientation: EXIF 1..8 as stored, 1 when none. label_bytes,
    label_sha256: of the label's file, or of what a COCO file says of the image. pixels_digest: equal for
    equal files, and after copies.with_copies_told for equal pixels in whatever files; "" if unreadable.
    histogram: pixels by train id, void and unknown last. id_pixels: (id as stored, pixels), known or
    not, the most common first, `MOST_IDS` at most. mask_mode: of the label's file, as image_formats.mode
    says. places: uint8 [16, 32] train ids of the label, sampled at the centres of a grid. blends: see
    blends.blended.
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
    """What looking at any pair needs to know. classes: train ids are below it."""

    root: Path
    forms: Mapping[str, MaskForm]
    limits: Limits
    classes: int


def measure_pairs(
    root: Path, pairs: Sequence[Pair], forms: Mapping[str, MaskForm], limits: Limits, workers: int, classes: int = 0
) -> list[MeasuredPair]:
    """What `look_at` says of every pair, in their order. workers 0: one a core.

    forms: by `Pair.part`. classes: how many the manifest learns; 0 for as many as the forms have. Raises
    RoadsegError if a worker dies.
    """
    task = Task(root, forms, limits, classes or _classes(forms))
    with worker_pool(task, len(pairs), workers) as pool:
        return measure_all(task, pairs, pool)


@contextmanager
def worker_pool(task: Task, pairs: int, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `look_at_all` of that task and for what is decoded after it; None where they don't pay.

    workers 0: one a core. Raises RoadsegError if one dies, whatever it was given to do.
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
    """For processes that are started meanwhile: those that NumPy and OpenCV start at import and that nobody needs
    here spin for a while, which doubles what starting a process takes (0.17 s of a core)."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read where the library is loaded, so this process keeps its own
    try:
        yield
    finally:
        os.environ.pop("OPENBLAS_NUM_THREADS")
        if before is not None:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def measure_all(task: Task, pairs: Sequence[Pair], pool: ProcessPoolExecutor | None) -> list[MeasuredPair]:
    """What `look_at` says of every pair, in their order. pool: of `readers` for this task.

    Work in flight is bounded, so memory does not grow with the number of images but for the results' two
    kilobytes each.
    """
    from roadseg.progress import progress  # workers have no bar, and tqdm is half of what they import besides OpenCV

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


_worker_task: list[Task] = []  # sent once: its tables would be made anew for each handful


def _init_worker(task: Task) -> None:
    start_worker()
    keep_freed_memory()
    _worker_task[:] = [task]


def _measure_chunk(pairs: Sequence[Pair]) -> list[MeasuredPair]:
    return [measure_pair(_worker_task[0], pair) for pair in pairs]


def measure_pair(task: Task, pair: Pair) -> MeasuredPair:
    """Reads the pair's files and measures them; what is wrong with a file is told, not raised."""
    form, limits, problems = task.forms[pair.part], task.limits, list[Problem]()
    image_data, photo = _decoded(
        lambda: read_bytes(task.root / pair.image, limits), lambda d: read_photograph(d, limits),
        problems, "unreadable-image", pair.image,
    )  # fmt: skip
    of_image = (
        _image_fields(photo, image_data) if photo else {}
    )  # before the label takes the pixels' place in the cache
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
    """(the file's bytes, what they hold), or, where there is none, a problem more."""
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
    """int64 [16, 32]: where in [high, wide], counted row by row, the centres of a grid lie."""
    rows = (2 * np.arange(GRID_ROWS) + 1) * high // (2 * GRID_ROWS)
    columns = (2 * np.arange(GRID_COLUMNS) + 1) * wide // (2 * GRID_COLUMNS)
    return rows[:, None] * wide + columns


def count_ids(ids: np.ndarray) -> list[tuple[int, int]]:
    """(id, pixels) of every id in uint8 or uint16 [H, W], the most common first, equal ones by id.

    By what changes from a row to the next where that is little: 0.4 ms for two megapixels of a Cityscapes
    label, where np.bincount takes 7 and cv2.calcHist 4.
    """
    flat = np.ascontiguousarray(ids).reshape(-1)
    counts = _counts_by_changes(flat, ids.shape[1])
    if counts is None:
        counts = _counts_of_noise(flat)
    present = np.flatnonzero(counts)
    present = present[np.argsort(-counts[present], kind="stable")]
    return list(zip(present.tolist(), counts[present].tolist(), strict=True))


def _counts_of_noise(flat: np.ndarray) -> np.ndarray:
    if flat.dtype != np.uint8:
        return np.bincount(flat)
    pieces = (flat[i : i + _EXACT_IN_FLOAT32] for i in range(0, flat.size, _EXACT_IN_FLOAT32))
    histograms = [cv2.calcHist([p], [0], None, [256], [0, 256]).ravel() for p in pieces]
    return np.stack(histograms).astype(np.int64).sum(axis=0)


def _counts_by_changes(flat: np.ndarray, width: int) -> np.ndarray | None:
    """int64 [256 or 65536] of pixels by id, None where over an eighth of the words of 8 bytes differ from those above.

    As if each row were as the first; then a pixel that differs from the one above it moves a column's rest, from
    there to the bottom, to its id. Rows are taken as whole words, so that they slant where the width is odd.
    """
    each = 8 // flat.itemsize
    across = -(-width // each)
    rows = flat.size // (across * each)
    words = flat[: rows * across * each].view(np.uint64)
    at = np.flatnonzero(words[across:] != words[:-across])
    if at.size > words.size // 8:
        return None
    above, below = words.take(at).view(flat.dtype), words[across:].take(at).view(flat.dtype)
    moved = np.flatnonzero(above != below)
    rest = (rows - 1 - at // across)[moved // each].astype(np.float64)  # exact up to 2^53

    def count(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(values, weights, minlength=1 << 8 * flat.itemsize)

    changes = count(below.take(moved), rest) - count(above.take(moved), rest)
    return rows * count(flat[: across * each]) + changes.astype(np.int64) + count(flat[words.size * each :])


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
    """Whether the label holds hardly any class, and the image nothing else."""
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
