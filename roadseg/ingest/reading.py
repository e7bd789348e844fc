"""Every file decoded once, on all cores: what of it matters is small, the pixels stay in the worker."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from roadseg.errors import ImageError, RoadsegError
from roadseg.images import Limits, read_bytes, read_image, read_label
from roadseg.ingest.findings import plural
from roadseg.ingest.pairs import Pair
from roadseg.labels import LabelSet
from roadseg.processes import cores, start_worker
from roadseg.progress import progress

HASH_SIDE = 11  # 2 x 11 x 11 = 242 bits
INLINE_PAIRS = 16  # below this, starting processes takes longer than the work
_SHOWN_IDS = 8


@dataclass(frozen=True)
class Seen:
    """One pair after its files were decoded.

    problems: (code, file, what). width, height: of the upright image, 0 if unreadable. pixels_sha256: of
    the decoded image, so equal for lossless copies in another format. look: uint64 [4], a difference
    hash. histogram: pixels by train id, void and unknown ids last; empty if unreadable. ids: the
    distinct ids of the label, known or not.
    """

    pair: Pair
    problems: tuple[tuple[str, str, str], ...]
    width: int = 0
    height: int = 0
    image_sha256: str = ""
    label_sha256: str = ""
    image_bytes: int = 0
    label_bytes: int = 0
    pixels_sha256: str = ""
    look: tuple[int, ...] = ()
    histogram: tuple[int, ...] = ()
    ids: frozenset[int] = frozenset()


def read_all(root: Path, pairs: Sequence[Pair], label_set: LabelSet, limits: Limits, workers: int) -> list[Seen]:
    """What `look_at` says of every pair, in their order. workers 0: one a core.

    Work in flight is bounded, so memory does not grow with the number of images but for the results'
    few hundred bytes each. Raises RoadsegError if a worker dies.
    """
    workers = workers or cores()
    task = partial(look_at, root, label_set=label_set, limits=limits)
    seen = []
    with progress(len(pairs), "check", "images") as bar:
        inline = workers == 1 or len(pairs) < INLINE_PAIRS
        for one in map(task, pairs) if inline else _in_processes(task, pairs, workers):
            seen.append(one)
            bar.update()
    return seen


def _in_processes(task: partial[Seen], pairs: Sequence[Pair], workers: int) -> Iterator[Seen]:
    spawn = multiprocessing.get_context("spawn")  # OpenCV and torch can hang in a forked child
    flying: deque[Future[Seen]] = deque()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker) as pool:
        try:
            for pair in pairs:
                if len(flying) == 4 * workers:
                    yield flying.popleft().result()
                flying.append(pool.submit(task, pair))
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool:
            raise RoadsegError(
                "a process that checks images died",
                expected="memory for one decoded image a process",
                todo="lower data.workers or data.max_image_pixels; a script that calls roadseg must do so "
                'below `if __name__ == "__main__":`',
            ) from None


def look_at(root: Path, pair: Pair, *, label_set: LabelSet, limits: Limits) -> Seen:
    problems: list[tuple[str, str, str]] = []
    image, image_data = _decode(root, pair.image, "unreadable-image", limits, problems)
    label, label_data = _decode(root, pair.label, "unreadable-label", limits, problems)
    sizes = {}
    if image is not None:
        height, width = image.shape[:2]
        sizes = {
            "width": width,
            "height": height,
            "pixels_sha256": hashlib.sha256(image.data).hexdigest() + f"-{width}x{height}",
            "look": look(image),
        }
    counted = _count(pair, label, label_set, problems) if label is not None else {}
    if label is None and image is not None and _looks_like_a_label(image, label_set):
        problems.append(("swapped", pair.image, f"holds only ids of classes, while {pair.label} is no label"))
    instances = _decode(root, pair.instances, "unreadable-instances", limits, problems)[0] if pair.instances else None
    for other, path in ((image, pair.image), (instances, pair.instances)):
        if label is not None and other is not None and other.shape[:2] != label.shape:
            problems.append(("size-differs", path, f"{_size(other)}, but {pair.label} {_size(label)}"))
    return Seen(
        pair,
        tuple(problems),
        image_sha256=hashlib.sha256(image_data).hexdigest(),
        label_sha256=hashlib.sha256(label_data).hexdigest(),
        image_bytes=len(image_data),
        label_bytes=len(label_data),
        **sizes,
        **counted,
    )


def _decode(
    root: Path, path: str, code: str, limits: Limits, problems: list[tuple[str, str, str]]
) -> tuple[np.ndarray | None, bytes]:
    data = b""
    try:
        data = read_bytes(root / path, limits)
        return (read_image if code == "unreadable-image" else read_label)(data, limits), data
    except ImageError as e:
        problems.append((code, path, e.found + (f"; expected {e.expected}" if e.expected else "")))
    except OSError as e:
        problems.append((code, path, e.strerror or type(e).__name__))
    return None, data


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _count(pair: Pair, label: np.ndarray, label_set: LabelSet, problems: list[tuple[str, str, str]]) -> dict:
    counts = np.bincount(label.ravel(), minlength=256)
    ids = np.flatnonzero(counts)
    unknown = sorted((i for i in ids.tolist() if i not in label_set.known_ids), key=lambda i: -counts[i])
    if unknown:
        shown = ", ".join(f"id {i} on {plural(int(counts[i]), 'pixel')}" for i in unknown[:_SHOWN_IDS])
        more = f" and {len(unknown) - _SHOWN_IDS} more ids" if len(unknown) > _SHOWN_IDS else ""
        problems.append(("unknown-id", pair.label, shown + more))
    by_train = np.zeros(256, np.int64)
    np.add.at(by_train, label_set.id_to_train, counts[:256])
    learned = by_train[: label_set.num_classes].tolist()
    return {"histogram": (*learned, label.size - sum(learned)), "ids": frozenset(ids.tolist())}


def _looks_like_a_label(image: np.ndarray, label_set: LabelSet) -> bool:
    grey = image[..., 0]
    if not (np.array_equal(grey, image[..., 1]) and np.array_equal(grey, image[..., 2])):
        return False
    return label_set.known_ids.issuperset(np.flatnonzero(np.bincount(grey.ravel())).tolist())


def look(image: np.ndarray) -> tuple[int, ...]:
    """A difference hash of uint8 [H, W, 3]: 242 bits in 4 words of 64.

    Grey, averaged down to 12 x 12, each cell compared with its right and its lower neighbour. Survives
    recompression, resizing, noise, blur, brightness and crops of 2 % a side; not flips or rotations.
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (HASH_SIDE + 1,) * 2, interpolation=cv2.INTER_AREA)
    right, down = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    packed = np.packbits(np.concatenate([right.ravel(), down.ravel()]))
    words = np.frombuffer(packed.tobytes().ljust(32, b"\0"), "<u8")
    return tuple(int(w) for w in words)
