"""The only image decoder: bytes to RGB pixels or to label ids, under limits.

Photographs (`read_image`): grey is repeated to three channels, palettes are looked up, alpha is dropped without
blending, 16 bits keep their high byte, CMYK and YCCK JPEG are converted (Adobe's are stored inverted), EXIF
orientation is applied, the first frame or page is read, color profiles are ignored.
Label maps (`read_label`): a palette PNG gives its indexes; grey of 1, 2 and 4 bits its unscaled values; 16 bits stay.
Color, alpha, lossy and float masks are refused, and no orientation is applied.
Any changed byte of a PNG is detected. JPEG has no checksum: a broken structure and everything libjpeg warns about
(such as a truncated file with a new end marker) is an error.

Decoders were chosen by speed (2048x1024, one thread). Plain PNG: kornia_rs, 22 ms against OpenCV's 58, and 3 ms
against 5.5 for label maps. It holds the GIL, so only the main thread (of worker processes, too) uses it; other threads
use OpenCV and get the same pixels. JPEG: simplejpeg, 6 ms against Pillow's 20. Everything else: Pillow.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import kornia_rs.io
import numpy as np
import simplejpeg
from PIL import Image

from roadseg.errors import ImageError
from roadseg.images import formats as image_formats
from roadseg.images.formats import CleanFile
from roadseg.images.pillow import open_with_pillow, pillow_errors, quiet_pillow, undecodable

MAX_SIDE_PX = 1_000_000  # libpng's limit


@dataclass(frozen=True)
class Limits:
    """Files over these limits are refused before they are read (bytes) or decoded (pixels, by their header)."""

    max_bytes: int = 256_000_000
    max_pixels: int = 64_000_000


def probe(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) as stored, before EXIF orientation, from the header only. Raises ImageError."""
    return image_formats.size(data)


def read_bytes(path: Path, limits: Limits = Limits()) -> bytes:
    """A file's bytes. Raises ImageError if it is not a regular file or too large, OSError if unreadable."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is not a regular file", where=str(path))
    if status.st_size > limits.max_bytes:
        raise ImageError(
            f"the file has {status.st_size:,} bytes", expected=f"at most {limits.max_bytes:,}", where=str(path)
        )
    with open(path, "rb", buffering=0) as f:
        return f.read(status.st_size + 1)  # a file that grows meanwhile is then truncated, and refused


@dataclass(frozen=True)
class Photograph:
    """pixels: uint8 [H, W, 3] RGB, upright, contiguous and writable. format: "png", "jpeg", "webp", "bmp"
    or "tiff". orientation: EXIF 1..8 as stored, 1 if absent."""

    pixels: np.ndarray
    format: str
    orientation: int


def read_image(source: Path | bytes, limits: Limits = Limits()) -> np.ndarray:
    """uint8 [H, W, 3] RGB, upright, contiguous and writable. Raises ImageError, or OSError for a path."""
    return read_photograph(source, limits).pixels


def read_photograph(source: Path | bytes, limits: Limits = Limits()) -> Photograph:
    """`read_image` with the file's format and orientation. Raises ImageError, or OSError for a path."""
    with errors_with_path(source):
        file = _open(source, limits)
        if file.color_type in (0, 2) and file.depth == 8:
            pixels = _decode_png(file, 1 if file.color_type == 0 else 3)
            if pixels.ndim == 2:
                pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        elif file.format == "jpeg" and image_formats.mode(file.data) in ("grey", "rgb"):
            pixels = _decode_jpeg(file)
        else:
            pixels = _decode_pillow(file, as_label=False)
        return Photograph(_upright(pixels, file.orientation), file.format, file.orientation)


def read_label(source: Path | bytes, limits: Limits = Limits()) -> np.ndarray:
    """uint8 or uint16 [H, W] of ids as stored. Raises ImageError, or OSError for a path."""
    with errors_with_path(source):
        file = _open(source, limits)
        if file.format == "jpeg":
            raise ImageError("a mask saved as jpeg", expected="a lossless format", todo="export as PNG")
        plain = file.color_type == 0 and file.depth in (8, 16)
        if plain or (file.color_type == 3 and file.depth == 8 and _on_main_thread()):
            return _decode_png(file, 1)
        return _decode_pillow(file, as_label=True)


@contextmanager
def errors_with_path(source: Path | str | bytes) -> Iterator[None]:
    """Add the path of a failing file to its ImageError; bytes have none."""
    try:
        yield
    except ImageError as e:
        if e.where or isinstance(source, bytes):
            raise
        raise ImageError(e.found, expected=e.expected, where=str(source), todo=e.todo) from None


def _open(source: Path | bytes, limits: Limits) -> CleanFile:
    data = read_bytes(source, limits) if isinstance(source, Path) else source
    if len(data) > limits.max_bytes:
        raise ImageError(f"the file has over {limits.max_bytes:,} bytes", expected=f"at most {limits.max_bytes:,}")
    format_, width, height = image_formats.size(data)
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the {format_} header says {width} x {height} = {width * height:,} pixels",
            expected=f"at most {limits.max_pixels:,}",
        )
    if max(width, height) > MAX_SIDE_PX:
        raise ImageError(
            f"the {format_} header says {width} x {height} pixels", expected=f"sides up to {MAX_SIDE_PX:,}"
        )
    return image_formats.clean(data, format_, width, height)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _decode_png(file: CleanFile, channels: int) -> np.ndarray:
    """uint8 or uint16 [H, W] of grey values or palette indexes, or uint8 [H, W, 3]."""
    if not _on_main_thread():
        return _decode_png_cv2(file)
    decode = kornia_rs.io.decode_image_png_u16 if file.depth == 16 else kornia_rs.io.decode_image_png_u8
    try:
        pixels = decode(file.data, (file.height, file.width), "mono" if channels == 1 else "rgb")
    except BaseException as e:
        # A Rust panic derives from BaseException and would end a server's thread or a worker pool.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        image_formats.check_idat(file.data)  # raises a more precise error
        raise _malformed_png() from None
    return pixels[:, :, 0] if channels == 1 else pixels


def _decode_png_cv2(file: CleanFile) -> np.ndarray:
    """Checksums are verified first because libpng reports damage on stderr."""
    image_formats.check_idat(file.data)
    flags = cv2.IMREAD_UNCHANGED if file.color_type == 0 else cv2.IMREAD_COLOR_RGB
    try:
        pixels = cv2.imdecode(np.frombuffer(file.data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise _malformed_png()
    return pixels


def _malformed_png() -> ImageError:
    return ImageError("the png can't be decoded: its compressed pixels are malformed")


def _decode_jpeg(file: CleanFile) -> np.ndarray:
    """Grey or YCbCr. Strict: where libjpeg only warns, it has invented pixels."""
    try:
        if simplejpeg.decode_jpeg_header(file.data)[:2] != (file.height, file.width):
            raise _size_mismatch(file)
        return simplejpeg.decode_jpeg(file.data, "RGB", strict=True)
    except ValueError as e:
        raise undecodable("jpeg", str(e)) from None


def _size_mismatch(file: CleanFile) -> ImageError:
    """For a file crafted to pass the limits with one size and to decode with another."""
    return ImageError(
        f"the {file.format} says {file.width} x {file.height} pixels in one place and another size elsewhere"
    )


def _decode_pillow(file: CleanFile, *, as_label: bool) -> np.ndarray:
    if file.format == "png":
        image_formats.check_idat(file.data)
    with pillow_errors(file.format), _opened(file) as image:
        return _ids(image, file) if as_label else _rgb(image, file)


def _opened(file: CleanFile) -> Image.Image:
    image = open_with_pillow(file.data, file.format)
    if image.size != (file.width, file.height):
        raise _size_mismatch(file)
    if file.format == "tiff":  # reads its tags late, and libtiff writes to stderr
        with quiet_pillow(), _stderr_closed():
            image.load()
    return image


@contextmanager
def _stderr_closed() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # a daemon without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _rgb(image: Image.Image, file: CleanFile) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I;16"):
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat((255 - high if file.white_is_zero else high)[:, :, None], 3, axis=2)
    if mode in ("I", "F", "LAB"):
        kind = {"I": "32-bit integers", "F": "floating point", "LAB": "Lab colors"}[mode]
        raise ImageError(f"the pixels are {kind}", expected="8 or 16 bits of grey or RGB")
    if mode == "CMYK" and image.format == "JPEG" and not file.adobe:
        # Pillow inverts every CMYK JPEG, as only Adobe's need.
        return np.array(Image.frombytes("CMYK", image.size, image.tobytes().translate(_INVERT)).convert("RGB"))
    if mode == "RGBa":
        image = image.convert("RGBA")
    return np.array(image if mode == "RGB" else image.convert("RGB"))


_INVERT = bytes(range(255, -1, -1))


def _ids(image: Image.Image, file: CleanFile) -> np.ndarray:
    if file.white_is_zero:
        raise ImageError("a mask whose white is 0", expected="one whose black is 0", todo="export as PNG")
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    if image.mode == "L" and file.depth in (2, 4):
        return np.array(image) // np.uint8({2: 85, 4: 17}[file.depth])  # Pillow stretches them to 0..255
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)
    raise ImageError(
        f"a mask of {_MODES.get(image.mode, image.mode)}",
        expected="one channel of ids (grey or palette, 8 or 16 bits)",
        todo="convert its colors to ids first",
    )


_MODES = {
    "RGB": "RGB colors",
    "RGBA": "RGBA colors",
    "LA": "grey and alpha",
    "CMYK": "CMYK colors",
    "F": "floating-point numbers",
    "I": "32-bit integers",
}


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1..8 as the EXIF 2.32 standard, 4.6.4 A, defines it."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def encode_label_png(label: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """PNG of uint8 [H, W] ids, one 8-bit channel, with uint8 [256, 3] RGB colors when given.

    Each row is stored as the difference to the row above (the Up filter). Neighboring rows of masks are nearly
    equal, so zlib's fastest level is both faster and smaller than OpenCV's encoder.
    """
    assert label.dtype == np.uint8 and label.ndim == 2
    height, width = label.shape
    rows = np.empty((height, width + 1), np.uint8)
    rows[:, 0] = 2
    rows[0, 1:] = label[0]
    np.subtract(label[1:], label[:-1], out=rows[1:, 1:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0 if palette is None else 3, 0, 0, 0))]
    if palette is not None:
        assert palette.dtype == np.uint8 and palette.shape == (256, 3)
        chunks.append((b"PLTE", palette.tobytes()))
    chunks += [(b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b)) for name, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def encode_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """JPEG of uint8 [H, W, 3] RGB, quality 1..100, chroma halved both ways."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[
        1
    ].tobytes()
