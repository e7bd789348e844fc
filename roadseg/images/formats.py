"""Inspect the bytes of an image file before any pixel is decoded.

Sizes come from headers alone, so a decompression bomb costs nothing. For PNG and JPEG, `clean` then checks the
structure of the whole file (end marker, checksums of a PNG's chunks) and strips what pixels do not need: text
and profiles that may unpack to gigabytes, thumbnails, orientation tags that decoders would apply. Decoders get only
its result. The checksums of a PNG's pixel data are left to decoders that verify them, and to `check_idat` for the
others. WebP, BMP and TIFF are opened by Pillow, which raises on truncated data when it decodes them.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, TiffImagePlugin

from roadseg.errors import ImageError
from roadseg.images.pillow import open_with_pillow, pillow_errors, quiet_pillow

MAX_CHUNKS = 200_000  # of a PNG; a 256 MB file of 8 kB chunks has 31,000
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each costs a pass over all pixels

_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_MODES = {0: "grey", 2: "rgb", 3: "palette", 4: "greya", 6: "rgba"}
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_MODES = {1: "grey", 3: "rgb", 4: "cmyk"}
_JPEG_KEPT_APP = (0xE0, 0xEE)  # JFIF and Adobe define the color space
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_PILLOW_MODES = {
    "1": "grey", "L": "grey", "LA": "greya", "P": "palette", "RGB": "rgb", "RGBA": "rgba", "CMYK": "cmyk",
    "I;16": "grey16", "I;16B": "grey16", "I;16L": "grey16",
}  # fmt: skip
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_ORIENTATION, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 258, 262, 274, 322, 323


@dataclass(frozen=True)
class CleanFile:
    """A file that passed the checks, stripped to its pixels.

    orientation: EXIF 1..8. depth: bits per sample. color_type: of a PNG, else -1. adobe: the JPEG has Adobe's
    marker, so its CMYK is stored inverted. white_is_zero: the TIFF's grey is inverted. format, width,
    height: from `size`.
    """

    data: bytes
    orientation: int = 1
    depth: int = 8
    color_type: int = -1
    adobe: bool = False
    white_is_zero: bool = False
    format: str = ""
    width: int = 0
    height: int = 0


def sniff(data: bytes) -> str:
    """ "png", "jpeg", "webp", "bmp" or "tiff" by the first bytes. Raises ImageError for anything else."""
    if not data:
        raise ImageError("the file is empty", todo="fetch it again, or remove it")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM"):
        return "bmp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    head = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "SVG" if b"<svg" in head else "GIF" if head.startswith(b"gif8") else "something else"
    raise ImageError(f"the content is {kind}", expected="PNG, JPEG, WebP, BMP or TIFF")


def size(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) as stored, before any EXIF orientation, from the header only.

    Raises ImageError for unknown formats, for headers that are cut off, and for sizes below 1.
    """
    format_ = sniff(data)
    try:
        if format_ == "png":
            width, height = _png_size(data)
        elif format_ == "jpeg":
            width, height, _ = _jpeg_frame(data)
        else:
            width, height = _open_other(data, format_).size
    except (struct.error, IndexError):
        raise ImageError(f"the {format_} is cut off within its header", todo="fetch it again") from None
    if width < 1 or height < 1:
        raise ImageError(f"the {format_} header says {width} x {height} pixels", expected="at least 1 x 1")
    return format_, width, height


def mode(data: bytes) -> str:
    """How the file stores its values, from the header only; "" where unknown.

    "grey", "greya", "palette", "rgb", "rgba" or "cmyk" for up to 8 bits, with the suffix "16" for more; "rgb" for
    any color JPEG; "json" for text that starts like JSON.
    """
    try:
        format_ = sniff(data)
        if format_ == "png":
            depth, color_type = struct.unpack_from(">BB", data, 24)
            return _PNG_MODES.get(color_type, "") + ("16" if depth == 16 else "")
        if format_ == "jpeg":
            return _JPEG_MODES.get(_jpeg_frame(data)[2], "")
        return _PILLOW_MODES.get(_open_other(data, format_).mode, "")
    except ImageError:
        return "json" if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else ""
    except (struct.error, IndexError):
        return ""


def clean(data: bytes, format_: str, width: int, height: int) -> CleanFile:
    """Check the file structure of a PNG (except `check_idat`) or JPEG and strip it; read a TIFF's or WebP's tags.

    Raises ImageError for truncated and malformed files, and for what costs far more to decode than its size says.
    """
    cleaners = {"png": _clean_png, "jpeg": _clean_jpeg, "webp": _clean_webp, "bmp": _clean_bmp, "tiff": _clean_tiff}
    try:
        return replace(cleaners[format_](data), format=format_, width=width, height=height)
    except (struct.error, IndexError):
        raise _truncated(format_) from None


def _truncated(format_: str) -> ImageError:
    return ImageError(f"the {format_} is truncated", expected="a whole file", todo="fetch it again")


def _png_size(data: bytes) -> tuple[int, int]:
    name, width, height = struct.unpack_from(">4sII", data, 12)
    if name != b"IHDR":
        raise ImageError("the png does not begin with its IHDR chunk")
    return width, height


def _clean_png(data: bytes) -> CleanFile:
    """Keeps IHDR, PLTE, IDAT and IEND; in an APNG that is the default image."""
    length, depth, color_type, compression, filtering, interlace = struct.unpack_from(">8xI12xBBBBB", data)
    if length != 13 or (compression, filtering) != (0, 0) or interlace > 1:
        raise ImageError("the png header is malformed")
    if depth not in _PNG_DEPTHS.get(color_type, ()):
        raise ImageError(f"the png header says color type {color_type} with {depth} bits, which does not exist")
    view, at, orientation = memoryview(data), 8, 1
    kept: list[bytes | memoryview] = [data[:8]]
    needed = [b"IHDR", b"PLTE", b"IDAT"] if color_type == 3 else [b"IHDR", b"IDAT"]
    names: list[bytes] = []
    chunks = 0
    while chunks < MAX_CHUNKS:
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise _truncated("png")
        count = _equal_chunks(data, at, end) if name == b"IDAT" else 1
        end += (count - 1) * (end - at)
        chunks += count
        if name in _PNG_KEPT and name != b"IDAT":
            _check_crc(view, at, end)
        if name in needed:
            kept.append(view[at:end])
            names += [name] if name not in names[-1:] or name != b"IDAT" else []
        elif name == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : end - 4])
        elif name == b"IEND":
            break
        elif not name[0] & 0x20 and name not in _PNG_KEPT:
            raise ImageError("the png has an unknown critical chunk")
        at = end
    else:
        raise ImageError(f"the png has over {MAX_CHUNKS:,} chunks")
    if names != needed:
        raise ImageError("the png's chunks are missing, doubled or out of order")
    kept.append(view[at:end])
    stripped = sum(map(len, kept)) < len(data)
    return CleanFile(b"".join(kept) if stripped else data, orientation, depth, color_type)


def _equal_chunks(data: bytes, start: int, end: int) -> int:
    """Count the consecutive chunks of the same name and length, from this one on.

    Encoders split the pixels into some hundred such chunks; checking them one by one takes 1 % of the decoding time.
    """
    step = end - start
    fit = min((len(data) - start) // step, MAX_CHUNKS + 1)
    heads: np.ndarray = np.ndarray((fit,), "<u8", data, start, (step,))
    others = np.flatnonzero(heads != heads[0])
    return int(others[0]) if others.size else fit


def check_idat(png: bytes) -> None:
    """Raise ImageError if the checksum of an IDAT chunk is wrong. png: from `clean`."""
    view, at = memoryview(png), 8
    while at < len(png):
        length, name = struct.unpack_from(">I4s", png, at)
        if name == b"IDAT":
            _check_crc(view, at, at + 12 + length)
        at += 12 + length


def _check_crc(view: memoryview, start: int, end: int) -> None:
    if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from(">I", view, end - 4)[0]:
        name = bytes(view[start + 4 : start + 8]).decode()
        raise ImageError(f"the png is corrupt: the checksum of its {name} chunk is wrong")


def _jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) up to the end marker; a scan's segment includes its entropy-coded data."""
    out, at = [], 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise ImageError("the jpeg is corrupt: a marker is missing")
        start = at
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker == 0xD9:
            out.append((marker, start, at + 1))
            return out
        end = at + 1
        if marker not in _JPEG_BARE:
            end += struct.unpack_from(">H", data, end)[0]
        if marker == 0xDA:
            following = _JPEG_MARKER.search(data, end)
            if following is None:
                raise _truncated("jpeg")
            end = following.start()
        if end > len(data) or end <= at:
            raise _truncated("jpeg")
        out.append((marker, start, end))
        at = end
    raise ImageError(f"the jpeg has over {MAX_SEGMENTS} segments")


def _jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """(width, height, channels) of the first frame header."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            break
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker in _JPEG_SOF:
            height, width, channels = struct.unpack_from(">HHB", data, at + 4)
            return width, height, channels
        if marker in (0xD9, 0xDA):
            break
        at += 1 if marker in _JPEG_BARE else 1 + max(struct.unpack_from(">H", data, at + 1)[0], 2)
    raise ImageError("the jpeg has no frame header before its pixels")


def _clean_jpeg(data: bytes) -> CleanFile:
    orientation, adobe, scans, kept = 1, False, 0, [data[:2]]
    for marker, start, end in _jpeg_segments(data):
        scans += marker == 0xDA
        if marker == 0xE1 and orientation == 1:
            body = data[start:end].lstrip(b"\xff")[3:]
            orientation = _exif_orientation(body[6:]) if body.startswith(b"Exif\0\0") else 1
        adobe = adobe or (marker == 0xEE and b"Adobe" in data[start : start + 16])
        if marker in _JPEG_KEPT_APP or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start:end])
    if not 1 <= scans <= MAX_SCANS:
        raise ImageError(f"the jpeg has {scans} scans", expected=f"1 to {MAX_SCANS}")
    return CleanFile(b"".join(kept), orientation, adobe=adobe)


def _open_other(data: bytes, format_: str) -> Image.Image:
    return open_with_pillow(_upright_tiff(data)[0] if format_ == "tiff" else data, format_)


def _clean_webp(data: bytes) -> CleanFile:
    exif = open_with_pillow(data, "webp").info.get("exif", b"")
    return CleanFile(data, _exif_orientation(exif.removeprefix(b"Exif\0\0")))


def _clean_bmp(data: bytes) -> CleanFile:
    if open_with_pillow(data, "bmp").info.get("compression", 0) not in (0, 3):  # 3: uncompressed, with bit masks
        # Pillow fills up truncated run lengths with zeros instead of raising.
        raise ImageError("the bmp is compressed", expected="an uncompressed bmp", todo="save it as PNG")
    return CleanFile(data)


def _clean_tiff(data: bytes) -> CleanFile:
    data, orientation = _upright_tiff(data)
    image = open_with_pillow(data, "tiff")
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    with pillow_errors("tiff"), quiet_pillow():
        tile_px = image.tag_v2.get(_TIFF_TILE_WIDTH, 0) * image.tag_v2.get(_TIFF_TILE_HEIGHT, 0)
        if tile_px > max(16 * image.width * image.height, 1 << 20):
            raise ImageError("the tiff has tiles that are much larger than the image")
        depth, white_is_zero = image.tag_v2.get(_TIFF_BITS, (8,))[0], image.tag_v2.get(_TIFF_PHOTOMETRIC, 0) == 0
    return CleanFile(data, orientation, depth, white_is_zero=white_is_zero)


def _upright_tiff(data: bytes) -> tuple[bytes, int]:
    """(the file with its orientation tag set to 1, orientation 1..8): Pillow would apply the tag, to label maps too."""
    order, value, at = _tiff_orientation(data)
    if not at or value == 1:
        return data, 1
    return data[:at] + struct.pack(order + "H", 1) + data[at + 2 :], value if 1 <= value <= 8 else 1


def _tiff_orientation(data: bytes) -> tuple[str, int, int]:
    """(byte order, orientation, its offset) from the first directory of a TIFF or EXIF block; offset 0 if absent.

    Raises struct.error where the data ends too early.
    """
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    for i in range(struct.unpack_from(order + "H", data, start)[0]):
        at = start + 2 + 12 * i
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        if tag == _TIFF_ORIENTATION and kind in (3, 4) and count == 1:
            return order, struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)[0], at + 8
    return order, 1, 0


def _exif_orientation(exif: bytes) -> int:
    """1..8; 1 (upright) where the tag is missing, out of range, or the block is malformed."""
    try:
        value = _tiff_orientation(exif)[1]
    except struct.error:
        return 1
    return value if 1 <= value <= 8 else 1
