"""What the bytes of a picture file say before a pixel of it is decoded.

Sizes come from headers alone, so that a bomb costs nothing. `clean` then proves that the file is
whole (structure, end marker, a PNG's checksums) and strips what pixels don't need: text and profiles
that may unpack to gigabytes, thumbnails, orientation tags that decoders apply unasked. Only its result
meets a decoder. The checksums of a PNG's pixels are left to decoders that verify them themselves, and
to `check_idat` before others.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, replace

import numpy as np

from roadseg.errors import ImageError

MAX_CHUNKS = 200_000  # of a PNG or WebP; 8 kB chunks of a 256 MB file are 31,000
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each costs a pass over all pixels

_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_MODES = {0: "grey", 2: "rgb", 3: "palette", 4: "greya", 6: "rgba"}
_JPEG_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_MODES = {1: "grey", 3: "rgb", 4: "cmyk"}
_JPEG_KEPT_APP = (0xE0, 0xEE)  # JFIF and Adobe tell the colour space
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_PHOTOMETRIC, _TIFF_ORIENTATION = 256, 257, 262, 274
_TIFF_BITS, _TIFF_SAMPLES, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 258, 277, 322, 323


@dataclass(frozen=True)
class Clean:
    """A whole file, stripped to its pixels.

    orientation: EXIF 1..8. depth: bits a sample. color_type: PNG's, -1 otherwise. adobe: the JPEG
    says it is Adobe's, so its CMYK is stored inverted. white_is_zero: the TIFF's grey is inverted.
    format, width, height: what `size` said of it.
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
    reader = {"png": _png_size, "jpeg": _jpeg_size, "webp": _webp_size, "bmp": _bmp_size, "tiff": _tiff_size}[format_]
    try:
        width, height = reader(data)
    except (struct.error, IndexError):
        raise ImageError(f"the {format_} is cut off within its header", todo="fetch it again") from None
    if width < 1 or height < 1:
        raise ImageError(f"the {format_} header says {width} x {height} pixels", expected="at least 1 x 1")
    return format_, width, height


def mode(data: bytes) -> str:
    """How the file stores its values, from the header only; "" where that isn't known.

    "grey", "greya", "palette", "rgb", "rgba" or "cmyk" of up to 8 bits, with "16" behind for more; "rgb" of
    any colour JPEG or WebP; "json" for text that begins like JSON.
    """
    try:
        format_ = sniff(data)
        if format_ == "png":
            depth, color_type = struct.unpack_from(">BB", data, 24)
            return _PNG_MODES.get(color_type, "") + ("16" if depth == 16 else "")
        if format_ == "jpeg":
            return _JPEG_MODES.get(_jpeg_frame(data)[2], "")
        return {"webp": _webp_mode, "bmp": _bmp_mode, "tiff": _tiff_mode}[format_](data)
    except ImageError:
        return "json" if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else ""
    except (struct.error, IndexError):
        return ""


def clean(data: bytes, format_: str, width: int, height: int) -> Clean:
    """The file proven whole, but for `check_idat`, and stripped. Raises ImageError that says what is wrong."""
    cleaner = {"png": _clean_png, "jpeg": _clean_jpeg, "webp": _clean_webp, "bmp": _clean_bmp, "tiff": _clean_tiff}
    try:
        return replace(cleaner[format_](data), format=format_, width=width, height=height)
    except (struct.error, IndexError):
        raise _truncated(format_) from None


def _truncated(format_: str) -> ImageError:
    return ImageError(f"the {format_} is truncated", expected="a whole file", todo="fetch it again")


def _png_size(data: bytes) -> tuple[int, int]:
    name, width, height = struct.unpack_from(">4sII", data, 12)
    if name != b"IHDR":
        raise ImageError("the png does not begin with its IHDR chunk")
    return width, height


def _clean_png(data: bytes) -> Clean:
    """Keeps IHDR, PLTE, IDAT and IEND; in an APNG that is the default image."""
    length, depth, color_type, compression, filtering, interlace = struct.unpack_from(">8xI12xBBBBB", data)
    if length != 13 or (compression, filtering) != (0, 0) or interlace > 1:
        raise ImageError("the png header is malformed")
    if depth not in _PNG_DEPTHS.get(color_type, ()):
        raise ImageError(f"the png header says colour type {color_type} with {depth} bits, which does not exist")
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
        alike = _alike(data, at, end) if name == b"IDAT" else 1
        end += (alike - 1) * (end - at)
        chunks += alike
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
    return Clean(b"".join(kept) if stripped else data, orientation, depth, color_type)


def _alike(data: bytes, start: int, end: int) -> int:
    """How many chunks of one name and length there are in a row, from this one on.

    Encoders cut the pixels into some hundred such chunks; one by one they take a hundredth of decoding.
    """
    step = end - start
    fit = min((len(data) - start) // step, MAX_CHUNKS + 1)
    heads: np.ndarray = np.ndarray((fit,), "<u8", data, start, (step,))
    others = np.flatnonzero(heads != heads[0])
    return int(others[0]) if others.size else fit


def check_idat(png: bytes) -> None:
    """Raises ImageError if a checksum of the pixels' chunks is wrong, in a PNG as `clean` leaves it."""
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
    """(marker, start, end) up to the end marker; a scan's entropy-coded data belongs to its segment."""
    out, at = [], 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise ImageError("the jpeg is corrupt: no marker where one has to be")
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


def _jpeg_size(data: bytes) -> tuple[int, int]:
    return _jpeg_frame(data)[:2]


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


def _clean_jpeg(data: bytes) -> Clean:
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
    return Clean(b"".join(kept), orientation, adobe=adobe)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(_exactly(data, 24, 3), "little") + 1, int.from_bytes(_exactly(data, 27, 3), "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError("the webp begins with no known chunk", expected="VP8, VP8L or VP8X")


def _webp_mode(data: bytes) -> str:
    kind = data[12:16]
    alpha = (kind == b"VP8X" and data[20] & 0x10) or (kind == b"VP8L" and data[24] & 0x10)
    return "rgba" if alpha else "rgb"


def _exactly(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise IndexError
    return data[at : at + length]


def _clean_webp(data: bytes) -> Clean:
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise _truncated("webp")
    at, orientation, chunks = 12, 1, 0
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > end:
            raise _truncated("webp")
        if name == b"EXIF":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise ImageError(f"the webp has over {MAX_CHUNKS} chunks")
    return Clean(data[:end], orientation)


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def _bmp_mode(data: bytes) -> str:
    bits = struct.unpack_from("<H", data, 24 if struct.unpack_from("<I", data, 14)[0] == 12 else 28)[0]
    return "palette" if bits <= 8 else "rgba" if bits == 32 else "rgb"


def _clean_bmp(data: bytes) -> Clean:
    core = struct.unpack_from("<I", data, 14)[0] == 12
    bits, compression = (struct.unpack_from("<H", data, 24)[0], 0) if core else struct.unpack_from("<HI", data, 28)
    if compression not in (0, 3, 6):
        raise ImageError("the bmp is compressed", expected="an uncompressed bmp", todo="save it as PNG")
    width, height = _bmp_size(data)
    if len(data) < struct.unpack_from("<I", data, 10)[0] + (width * bits + 31) // 32 * 4 * height:
        raise _truncated("bmp")
    return Clean(data)


def _tiff_entries(data: bytes, offset: int = 0) -> tuple[str, dict[int, tuple[int, int]]]:
    """Byte order, and of the first directory each tag's (value, where it stands), if one short or long."""
    order = "<" if data[offset : offset + 2] == b"II" else ">"
    start = offset + struct.unpack_from(order + "I", data, offset + 4)[0]
    entries = {}
    for i in range(struct.unpack_from(order + "H", data, start)[0]):
        at = start + 2 + 12 * i
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        if kind in (3, 4) and count == 1:
            entries[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)[0], at + 8
    return order, entries


def _tiff_size(data: bytes) -> tuple[int, int]:
    entries = _tiff_entries(data)[1]
    if _TIFF_WIDTH not in entries or _TIFF_HEIGHT not in entries:
        raise ImageError("the tiff does not say its width and height")
    return entries[_TIFF_WIDTH][0], entries[_TIFF_HEIGHT][0]


def _tiff_mode(data: bytes) -> str:
    entries = _tiff_entries(data)[1]
    names = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "rgb"}
    name = names.get(entries.get(_TIFF_PHOTOMETRIC, (1, 0))[0], "")
    # The depths of several channels are a list, which _tiff_entries leaves out.
    return name + ("16" if name and entries.get(_TIFF_BITS, (8, 0))[0] > 8 else "")


def _clean_tiff(data: bytes) -> Clean:
    """With its orientation tag set to 1, because Pillow would turn the picture by itself."""
    order, entries = _tiff_entries(data)
    width, height = _tiff_size(data)
    tile = entries.get(_TIFF_TILE_WIDTH, (0, 0))[0] * entries.get(_TIFF_TILE_HEIGHT, (0, 0))[0]
    if tile > max(16 * width * height, 1 << 20):
        raise ImageError("the tiff has tiles that are much larger than the picture")
    if entries.get(_TIFF_SAMPLES, (1, 0))[0] > 6:
        raise ImageError(f"the tiff has {entries[_TIFF_SAMPLES][0]} channels", expected="at most 6")
    depth, white_is_zero = entries.get(_TIFF_BITS, (8, 0))[0], entries.get(_TIFF_PHOTOMETRIC, (1, 0))[0] == 0
    result = Clean(data, depth=depth, white_is_zero=white_is_zero)
    value, at = entries.get(_TIFF_ORIENTATION, (1, 0))
    if at and value != 1:
        turned = data[:at] + struct.pack(order + "H", 1) + data[at + 2 :]
        result = replace(result, data=turned, orientation=value if 1 <= value <= 8 else 1)
    return result


def _exif_orientation(exif: bytes) -> int:
    """1..8; 1 (upright) where the tag is missing, out of range, or the block is malformed."""
    try:
        value = _tiff_entries(exif)[1].get(_TIFF_ORIENTATION, (1, 0))[0]
    except struct.error:
        return 1
    return value if 1 <= value <= 8 else 1
