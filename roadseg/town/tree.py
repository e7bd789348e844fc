"""Write the town as a folder in the official Cityscapes layout."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from roadseg.errors import UsageError
from roadseg.labels import CITYSCAPES
from roadseg.processes import start_worker
from roadseg.town.frame import Frame, render
from roadseg.town.light import Weather

# Lossless and fast: one fixed row filter instead of trying all five halves the time for noisy images.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
_PHOTO_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):
    _PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    _PHOTO_PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG]
_TOWNS = (
    "ahlfurt", "bergau", "casteln", "dornheim", "elmstedt", "fahrental", "grauwyl", "hohenau",
    "ilmbach", "jettingen", "kaltbrunn", "lindow", "moosach", "niedersee", "osterode", "pfalzau",
    "quellheim", "rosenfurt", "seewald", "tannau", "ulmenau", "vierlinden", "wiesental", "zellbrueck",
)  # fmt: skip
TOWNS_PER_SPLIT = 3
KNOWN_SPLITS = ("train", "val", "test")
FRAMES_A_SPLIT = 10_000_000  # more than ever needed, and a multiple of all periods in the scenes


@dataclass(frozen=True)
class Place:
    """Location of one frame: split, town, file stem, and the index of its scene."""

    split: str
    town: str
    stem: str
    index: int


def places(splits: Mapping[str, int]) -> Iterator[Place]:
    """Yield every frame of the tree. Splits share neither towns nor indexes; sequences have 20 frames.

    Place and index of a frame depend only on its split's name and its number there. So a smaller tree is part of a
    larger one, and val is never part of another tree's train. Raises UsageError for too many splits for the
    available towns, or a number of frames out of range.
    """
    order = [*KNOWN_SPLITS, *sorted(set(splits) - set(KNOWN_SPLITS))]
    if len(order) * TOWNS_PER_SPLIT > len(_TOWNS) or any(not 0 <= n <= FRAMES_A_SPLIT for n in splits.values()):
        raise UsageError(
            f"splits {dict(splits)}",
            expected=f"at most {len(_TOWNS) // TOWNS_PER_SPLIT} splits with train, val and test, of 0 frames or more",
        )
    for split, count in splits.items():
        s = order.index(split)
        towns = _TOWNS[s * TOWNS_PER_SPLIT : (s + 1) * TOWNS_PER_SPLIT]
        for k in range(count):
            town, n = towns[k % TOWNS_PER_SPLIT], k // TOWNS_PER_SPLIT
            yield Place(split, town, f"{town}_{n // 20:06d}_{n % 20:06d}", s * FRAMES_A_SPLIT + k)


def write_tree(
    root: Path,
    splits: Mapping[str, int],
    seed: int,
    width_px: int,
    height_px: int,
    weather: Weather,
    workers: int,
    done: Callable[[], object] = int,
) -> None:
    """Render splits {name: frames} into leftImg8bit/ and gtFine/ below root, which may exist.

    The bytes do not depend on `workers`. Nothing is synced to disk, and an interrupted run leaves a partial tree, so
    write to a temporary folder and rename it. done: called after each frame. All 19 classes occur in any split of
    at least 12 frames.
    """
    todo = list(places(splits))
    make_folders(root, sorted({(p.split, p.town) for p in todo}))
    write = partial(_write_place, root, seed, width_px, height_px, weather)
    if workers <= 1:
        for place in todo:
            write(place)
            done()
        return
    # Forking a process that has used OpenCV's threads can hang.
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:
        for _ in pool.imap_unordered(write, todo, chunksize=4):
            done()


def make_folders(root: Path, towns: Iterable[tuple[str, str]]) -> None:
    """Create the folders of (split, town) pairs."""
    for split, town in towns:
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / town).mkdir(parents=True, exist_ok=True)


def _write_place(root: Path, seed: int, width_px: int, height_px: int, weather: Weather, place: Place) -> None:
    write_frame(root, place, render(seed, place.index, width_px, height_px, weather))


def write_frame(root: Path, place: Place, frame: Frame) -> None:
    """Write the five files of one frame into existing folders. The image is last: if it exists, all do."""
    truth = root / "gtFine" / place.split / place.town / f"{place.stem}_gtFine_"
    h, w = frame.label_ids.shape
    colour = cv2.applyColorMap(frame.label_ids, _COLOURS)
    outlines = {"imgHeight": h, "imgWidth": w, "objects": frame.polygons}
    _named(truth, "polygons.json").write_bytes(json.dumps(outlines, separators=(",", ":")).encode())
    _named(truth, "labelIds.png").write_bytes(_png(frame.label_ids))
    _named(truth, "instanceIds.png").write_bytes(_png(frame.instance_ids))
    _named(truth, "color.png").write_bytes(_png(colour))
    photo = root / "leftImg8bit" / place.split / place.town / f"{place.stem}_leftImg8bit.png"
    photo.write_bytes(_png(frame.image, _PHOTO_PNG))


def _named(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _png(pixels: np.ndarray, options: list[int] = _PNG) -> bytes:
    """Encode uint8 RGB, or one channel of uint8 or uint16."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels, options)[1].tobytes()


_COLOURS = np.zeros((256, 1, 3), np.uint8)  # RGB by label id
for _c in CITYSCAPES.classes:
    _COLOURS[_c.id] = _c.color
