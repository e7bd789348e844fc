"""Thumbnails of images and labels that may be broken: a picture, or the reason for none.

Shapes: H W the image. Void is drawn with dark stripes. Unknown ids and colors are drawn with yellow and black
stripes and widened, so that a single pixel is visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from roadseg.data.masks.form import UNKNOWN, MaskForm
from roadseg.data.masks.read import mask_bytes, read_ids, train_ids
from roadseg.errors import ImageError
from roadseg.images.decode import Limits, encode_jpeg, read_bytes, read_image
from roadseg.labels import IGNORE
from roadseg.processes import cores
from roadseg.report.page import stripes

SIDE_PX = 240
_MAX_JPEG_BYTES = 12_000  # per JPEG; a photograph of this size takes about 8 kB at the first quality
_QUALITIES = (74, 50, 25)
_THREADS_PAY_ABOVE = 3  # up to here decoding in the main thread is faster; see images/decode.py
_CHUNK_FILES = 4  # sent to a process at once, because the forms' tables are sent along
_STRAY = np.array((255, 230, 0), np.uint8)


@dataclass(frozen=True)
class ThumbnailFile:
    """A file below the root. part: None for an image; for a label the part of the mix it is from, "" if not mixed."""

    path: str
    part: str | None = None


@dataclass(frozen=True)
class Thumbnail:
    """JPEG or PNG bytes, b"" if the file cannot be shown; width, height in pixels. reason: why not, "" if fine."""

    picture: bytes
    width: int
    height: int
    reason: str = ""


def thumbnails(
    root: Path,
    wanted: Iterable[ThumbnailFile],
    forms: Mapping[str, MaskForm],
    palette: np.ndarray,
    limits: Limits,
    pool: Executor | None = None,
) -> dict[ThumbnailFile, Thumbnail]:
    """Decode every file once, in the pool if one is given.

    forms: of the labels, by part. palette: uint8 [256, 3] RGB by train id. Never raises because of a file's content.
    """
    ordered = list(dict.fromkeys(wanted))
    make = partial(_thumbnail, root, forms=forms, palette=palette, limits=limits)
    if pool:
        return dict(zip(ordered, pool.map(make, ordered, chunksize=_CHUNK_FILES), strict=True))
    threads = min(8, cores())
    if threads <= _THREADS_PAY_ABOVE:
        return {w: make(w) for w in ordered}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(ordered, pool.map(make, ordered), strict=True))


def _thumbnail(
    root: Path, wanted: ThumbnailFile, *, forms: Mapping[str, MaskForm], palette: np.ndarray, limits: Limits
) -> Thumbnail:
    data = b""
    try:
        if wanted.part is None:
            return _photograph(read_image(_inside(root, wanted.path, limits), limits))
        form = forms[wanted.part]
        _require_inside(wanted.path)
        data = mask_bytes(root, wanted.path, form, limits)
        return _mask(colorize(read_ids(data, form, limits), form, palette))
    except OSError as e:
        reason = e.strerror or type(e).__name__
    except ImageError as e:
        reason = e.found
    # For example a color mask where ids are expected: showing it explains the problem.
    if wanted.part is not None and data:
        try:
            return _photograph(read_image(data, limits), reason)
        except ImageError:
            pass
    return Thumbnail(b"", SIDE_PX, SIDE_PX // 2, reason)


def _inside(root: Path, path: str, limits: Limits) -> bytes:
    _require_inside(path)
    return read_bytes(root / path, limits)


def _require_inside(path: str) -> None:
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ImageError("is outside of the data root")


def _fit(height: int, width: int) -> tuple[int, int]:
    """(width, height), at most SIDE_PX each."""
    scale = min(1.0, SIDE_PX / width, SIDE_PX / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _photograph(image: np.ndarray, reason: str = "") -> Thumbnail:
    width, height = _fit(*image.shape[:2])
    while min(image.shape[0] / height, image.shape[1] / width) >= 4:  # cv2 averages 2 x 2 pixels the fastest
        halved = image.shape[1] // 2, image.shape[0] // 2
        image = cv2.resize(image[: 2 * halved[1], : 2 * halved[0]], halved, interpolation=cv2.INTER_AREA)
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    for quality in _QUALITIES:
        jpeg = encode_jpeg(small, quality)
        if len(jpeg) <= _MAX_JPEG_BYTES:
            break
    return Thumbnail(jpeg, width, height, reason)


def _mask(colored: np.ndarray) -> Thumbnail:
    height, width = colored.shape[:2]
    png = cv2.imencode(".png", cv2.cvtColor(colored, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 6])[1]
    return Thumbnail(png.tobytes(), width, height)


def colorize(ids: np.ndarray, form: MaskForm, palette: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] RGB, at most SIDE_PX per side, from uint8 or uint16 [H, W] ids of the form's label set."""
    size = _fit(*ids.shape)
    train = cv2.resize(train_ids(ids, form), size, interpolation=cv2.INTER_NEAREST)
    hatched = stripes(size[1], size[0])
    colored = np.where((train == IGNORE)[..., None], hatched, palette[train])
    unknown = np.ones(UNKNOWN + 1, np.uint8)
    unknown[[c.id for c in form.label_set.classes if 0 <= c.id < UNKNOWN]] = 0
    stray = cv2.LUT(ids, unknown[:256]) if ids.dtype == np.uint8 else unknown[ids]
    if stray.any():
        share = cv2.resize(stray.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        lost = cv2.dilate((share > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        loud = np.where(hatched > 50, np.uint8(0), _STRAY)
        colored = np.where(lost[..., None], loud, colored)
    return colored.astype(np.uint8)
