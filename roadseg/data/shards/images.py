"""Encode the pixels of a frame so that a box is decoded without the rest.

An image is stored as bands of 64 rows; a box needs the bands it overlaps. Sizes per frame and random 768x768 boxes
with labels per second: real Cityscapes frames of 2048x1024, one core of a Xeon, files in memory, by
benchmarks/shard_speed.py (PNG: 2.2 MB, 16 boxes per second):

    raw       6.3 MB   1,880/s  the plain rows; a box is a view of the mapped file. For speed.
    jpeg      0.44 MB    290/s  quality 95, mean error 1.0 of 255. For small disks and for S3.
    lossless  2.3 MB     200/s  for exact pixels where raw is too large.

jpeg: one baseline JPEG per frame, 4:2:0, with a restart marker every 64 pixels of every 16 rows. The data between two
markers decodes independently, so the segments that a box overlaps are joined under the frame's header, with the
size changed, into a small JPEG that any decoder reads in one call. Separate JPEG tiles would each need a header, and
with tiles of 256 pixels a box decodes half as many pixels again. 4:4:4 has a mean error of 0.83 for 1.31 times the
bytes and 1.4 times the time.

lossless: tiles of 64x256; each pixel minus its left and upper neighbors plus its upper left neighbor, then zstd.
An integral image undoes the filter. WebP takes 1.6 MB but 6 times as long to decode; differences between the colors
save 6 % on real frames and cost 7 % on rendered ones.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
import zstandard

Format = Literal["raw", "jpeg", "lossless"]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels of the frame
BAND_ROWS = 64
MCU_PX = 16  # 4:2:0 codes units of 16x16 pixels
SEGMENT_PX = 64  # width between two restart markers
TILE_PX = 256
_EDGE_PX = 2  # extra pixels around a box, from which chroma is interpolated: a box then equals the whole frame

_local = threading.local()  # zstd contexts are not thread-safe, and creating one costs more than a tile


def decompress(data: np.ndarray, size: int) -> bytes:
    """Decompress zstd, uint8 [n], to exactly `size` bytes. Raises zstandard.ZstdError."""
    if not hasattr(_local, "zstd"):
        _local.zstd = zstandard.ZstdDecompressor()
    out: bytes = _local.zstd.decompress(data, max_output_size=size)
    if len(out) != size:
        raise zstandard.ZstdError(f"{len(out)} bytes; expected {size}")
    return out


def encode_image(image: np.ndarray, form: Format, quality: int) -> tuple[bytes, list[bytes]]:
    """(header, bands from top to bottom) of an image uint8 [H, W, 3] RGB. Only jpeg has a header."""
    if form == "jpeg":
        return _encode_jpeg(image, quality)
    bands = [np.ascontiguousarray(image[y : y + BAND_ROWS]) for y in range(0, len(image), BAND_ROWS)]
    return b"", [band.tobytes() if form == "raw" else _encode_lossless(band) for band in bands]


def rows_needed(form: Format, top: int, height: int, frame_height: int) -> tuple[int, int]:
    """First and last (exclusive) row whose bands a box needs."""
    edge = _EDGE_PX if form == "jpeg" else 0
    return max(0, top - edge), min(frame_height, top + height + edge)


def decode_box(
    form: Format,
    header: bytes,
    bands: Sequence[np.ndarray],
    first_row: int,
    frame_px: tuple[int, int],
    box: Box,
) -> np.ndarray:
    """uint8 [height, width, 3] RGB of a box of a frame of `frame_px` (height, width).

    bands: uint8 [n] each, for raw one array with all of them; first_row: top of the first band. A raw box is a view
    of the band; a jpeg box is a view of the decoded pixels.
    """
    top, left, height, width = box
    if form == "jpeg":
        return _decode_jpeg(header, bands, first_row, frame_px, box)
    if form == "lossless":
        return _decode_lossless(bands, first_row, frame_px, box)
    stride = 3 * frame_px[1]
    return np.lib.stride_tricks.as_strided(
        bands[0][(top - first_row) * stride + 3 * left :], (height, width, 3), (stride, 3, 1), writeable=False
    )


# ── jpeg ────────────────────────────────────────────────────────────────────────────────────────


def _encode_jpeg(image: np.ndarray, quality: int) -> tuple[bytes, list[bytes]]:
    """A band is uint16 byte counts of its segments, then the segments, each followed by its marker."""
    height, width = image.shape[:2]
    # A segment must not continue in the next rows.
    padded = cv2.copyMakeBorder(image, 0, -height % MCU_PX, 0, -width % SEGMENT_PX, cv2.BORDER_REPLICATE)
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        cv2.IMWRITE_JPEG_OPTIMIZE: 1,
        cv2.IMWRITE_JPEG_RST_INTERVAL: SEGMENT_PX // MCU_PX,
    }
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(padded, cv2.COLOR_RGB2BGR), [x for pair in options.items() for x in pair]
    )
    assert done
    scan = _scan_start(data)
    # In a scan, 0xFF is followed by 0 unless it starts a marker.
    after = np.flatnonzero((data[scan:-1] == 0xFF) & (data[scan + 1 :] != 0)) + scan + 2
    columns = padded.shape[1] // SEGMENT_PX
    assert len(after) == columns * (len(padded) // MCU_PX), "all restart markers and the end marker"
    starts = np.concatenate([[scan], after])
    counts = np.diff(starts).astype("<u2")
    step = columns * (BAND_ROWS // MCU_PX)
    bands = []
    for i in range(0, len(after), step):
        last = min(i + step, len(after))
        bands.append(counts[i:last].tobytes() + data[starts[i] : starts[last]].tobytes())
    return data[:scan].tobytes(), bands


def _scan_start(data: np.ndarray) -> int:
    return _marker(data.tobytes(), 0xDA)[1]


def _marker(data: bytes, kind: int) -> tuple[int, int]:
    """(start, end) of the first marker segment of this kind in a header."""
    at = 2
    while True:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if data[at + 1] == kind:
            return at, end
        at = end


def _decode_jpeg(
    header: bytes, bands: Sequence[np.ndarray], first_row: int, frame_px: tuple[int, int], box: Box
) -> np.ndarray:
    top, left, height, width = box
    first, last = rows_needed("jpeg", top, height, frame_px[0])
    rows = range((first - first_row) // MCU_PX, -((first_row - last) // MCU_PX))
    columns = -(-frame_px[1] // SEGMENT_PX)
    start = max(0, left - _EDGE_PX) // SEGMENT_PX
    stop = -(-min(frame_px[1], left + width + _EDGE_PX) // SEGMENT_PX)
    pieces: list[Any] = [_resized_header(header, len(rows) * MCU_PX, (stop - start) * SEGMENT_PX)]
    counts = []
    per_band = BAND_ROWS // MCU_PX
    for number, band in enumerate(bands):
        inside = min(per_band, -(-(frame_px[0] - first_row) // MCU_PX) - number * per_band)
        sizes = np.frombuffer(band, "<u2", inside * columns)
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) + sizes.nbytes
        for row in range(inside):
            if number * per_band + row in rows:
                a, b = row * columns + start, row * columns + stop
                pieces.append(band[ends[a] : ends[b]])
                counts.append(sizes[a:b])
    data = np.frombuffer(bytearray().join(pieces), np.uint8)
    marks = len(pieces[0]) - 1 + np.cumsum(np.concatenate(counts), dtype=np.int64)
    data[marks] = 0xD0 + np.arange(len(marks)) % 8  # restart markers count modulo 8
    data[-1] = 0xD9  # end of image
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")  # OpenCV's pixels, 12 % faster
    y, x = top - first_row - rows.start * MCU_PX, left - start * SEGMENT_PX
    return pixels[y : y + height, x : x + width]


def _resized_header(header: bytes, height: int, width: int) -> bytes:
    frame, _ = _marker(header, 0xC0)
    return header[: frame + 5] + struct.pack(">HH", height, width) + header[frame + 9 :]


# ── lossless ────────────────────────────────────────────────────────────────────────────────────


def _encode_lossless(band: np.ndarray) -> bytes:
    """A band is uint32 byte counts of its tiles, then the tiles; differences are modulo 256."""
    packed = []
    for x in range(0, band.shape[1], TILE_PX):
        tile = band[:, x : x + TILE_PX].copy()
        tile[:, 1:] -= band[:, x : x + TILE_PX - 1][:, : tile.shape[1] - 1]
        tile[1:] -= tile[:-1].copy()
        packed.append(zstandard.compress(tile.tobytes(), 1))
    return np.array([len(p) for p in packed], "<u4").tobytes() + b"".join(packed)


def _decode_lossless(bands: Sequence[np.ndarray], first_row: int, frame_px: tuple[int, int], box: Box) -> np.ndarray:
    top, left, height, width = box
    out = np.empty((height, width, 3), np.uint8)
    tiles = -(-frame_px[1] // TILE_PX)
    for number, band in enumerate(bands):
        y = first_row + number * BAND_ROWS
        rows = min(BAND_ROWS, frame_px[0] - y)
        sizes = np.frombuffer(band, "<u4", tiles)
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) + sizes.nbytes
        a, b = max(y, top), min(y + rows, top + height)
        for tile in range(left // TILE_PX, (left + width - 1) // TILE_PX + 1):
            x = tile * TILE_PX
            columns = min(TILE_PX, frame_px[1] - x)
            packed = decompress(band[ends[tile] : ends[tile + 1]], rows * columns * 3)
            total = cv2.integral(np.frombuffer(packed, np.uint8).reshape(rows, columns, 3))
            c, d = max(x, left), min(x + columns, left + width)
            np.copyto(  # int32 to uint8: modulo 256
                out[a - top : b - top, c - left : d - left],
                total[1 + a - y : 1 + b - y, 1 + c - x : 1 + d - x],
                casting="unsafe",
            )
    return out
