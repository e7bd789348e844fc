"""Shard files: a box is read without the rest of its frame, and damage is detected.

A shard file holds the records of several frames. A record consists of

    table    uint32 byte counts of the label's bands, then of the image's; uint64 XXH3 of each band; JPEG header
    label    train ids in bands of 128 rows, each compressed by zstd
    image    at a multiple of 64 bytes, in bands of 64 rows; see images.py for raw, jpeg and lossless

shards.json has the offsets of the records, the XXH3 of every table, the SHA-256 of every shard file and its own
SHA-256. Labels of Cityscapes (2048x1024, one core of a Xeon): in one piece at level 3, 15.2 kB and 0.23 ms per
random 768x768 box; in bands of 128 rows at level 9, 10.5 kB and 0.17 ms; smaller tiles cost more.

**Integrity.** Tables, label bands, and jpeg and lossless bands are verified on every read (about 20 us per box).
For raw that would double the time (0.5 ms at 10 GB/s), so a process verifies a raw band on first use, and not again
when the kernel drops the page and reads it from disk again. In addition, `Shards.damaged` compares whole files with
their SHA-256 if size, times or inode changed since the last check. Everything read from S3 is verified.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import xxhash
import zstandard

from roadseg.data.shards.files import Files, RangedFiles, S3Prefix, changed_files, open_files, parse_address
from roadseg.data.shards.images import BAND_ROWS, Box, Format, decode_box, decompress, encode_image, rows_needed
from roadseg.errors import DataError
from roadseg.files import json_bytes, sha256_bytes, write_atomic
from roadseg.labels import LabelSet

SCHEMA_VERSION = 2
ALIGN_BYTES = 64
LABEL_ROWS = 128
LABEL_LEVEL = 12
INDEX = "shards.json"
_SEAL = b',"sha256":"'


@dataclass(frozen=True)
class Frame:
    """Location of one frame. Offsets from the start of the shard file and sizes, in bytes.

    part: of a mixed data set, else "". centroids: (train id, y, x) of pixels of each class, for class-uniform
    sampling. The table ends where the label starts; table_check: its XXH3 in hex.
    """

    name: str
    sequence: str
    height: int
    width: int
    image_offset: int
    label_offset: int
    label_bytes: int
    part: str
    centroids: tuple[tuple[int, int, int], ...]
    table_bytes: int
    table_check: str


@dataclass(frozen=True)
class Shard:
    file: str
    sha256: str
    frames: tuple[Frame, ...]
    size_bytes: int = 0  # 0 if unknown


def write_frame(
    f: BinaryIO,
    name: str,
    sequence: str,
    image: np.ndarray,
    label: np.ndarray,
    *,
    form: Format = "raw",
    quality: int = 95,
    part: str = "",
    centroids: tuple[tuple[int, int, int], ...] = (),
) -> Frame:
    """Append one frame: image uint8 [H, W, 3] RGB, label uint8 [H, W] of train ids."""
    assert image.dtype == label.dtype == np.uint8 and image.shape[:2] == label.shape
    height, width = label.shape
    header, image_bands = encode_image(image, form, quality)
    label_bands = [
        zstandard.compress(np.ascontiguousarray(label[y : y + LABEL_ROWS]).tobytes(), LABEL_LEVEL)
        for y in range(0, height, LABEL_ROWS)
    ]
    bands = label_bands + image_bands
    table = struct.pack(
        f"<{len(bands)}I{len(bands)}Q", *map(len, bands), *(xxhash.xxh3_64_intdigest(band) for band in bands)
    )
    table += header
    label_offset = f.tell() + len(table)
    f.write(table + b"".join(label_bands))
    label_bytes = f.tell() - label_offset
    f.write(b"\0" * (-f.tell() % ALIGN_BYTES))
    image_offset = f.tell()
    f.writelines(image_bands)
    check = xxhash.xxh3_64_hexdigest(table)
    return Frame(
        name, sequence, height, width, image_offset, label_offset, label_bytes, part, centroids, len(table), check
    )


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The content of shards.json, and its location: a folder or an S3 prefix.

    mean, std: per RGB channel over train, in 0..255. class_pixels: {split: pixels by train id,
    void last}. fingerprints: {split: data fingerprint}. form: storage format of the images. part_weights: for a
    mixed data set, {part: sampling weight}.
    """

    folder: Path | S3Prefix
    source: str
    label_set: LabelSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_pixels: dict[str, list[int]]
    fingerprints: dict[str, str]
    shards: dict[str, tuple[Shard, ...]]
    form: Format = "raw"
    part_weights: dict[str, float] = field(default_factory=dict)

    @cached_property
    def content(self) -> str:
        """The content digest of a folder with this index and its shards, as the workspace computes it."""
        rows = [(s.file, s.sha256) for shards in self.shards.values() for s in shards]
        return sha256_bytes(json_bytes(sorted([*rows, (INDEX, sha256_bytes(self._index()))])))

    def save(self) -> None:
        assert isinstance(self.folder, Path)
        write_atomic(self.folder / INDEX, self._index())

    def _index(self) -> bytes:
        index: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "label_set": self.label_set.to_json(),
            "mean": self.mean,
            "std": self.std,
            "class_pixels": self.class_pixels,
            "fingerprints": self.fingerprints,
            "form": self.form,
            "part_weights": self.part_weights,
            "shards": {split: [asdict(s) for s in shards] for split, shards in self.shards.items()},
        }
        body = json_bytes(index)
        return body[:-1] + _SEAL + sha256_bytes(body).encode() + b'"}\n'

    @staticmethod
    def load(address: Path | str, *, region: str = "", endpoint_url: str = "") -> Shards:
        """address: a folder or s3://bucket/prefix.

        Raises DataError if the index is missing, invalid, changed since it was written, or of another schema version.
        """
        where = parse_address(address, region, endpoint_url)
        name = f"{where}/{INDEX}"
        try:
            data = (where / INDEX).read_bytes() if isinstance(where, Path) else RangedFiles(where).get(INDEX)
            index = json.loads(data)
            version = index["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"schema version {version!r}",
                    expected=str(SCHEMA_VERSION),
                    where=name,
                    todo="make the shards again, or use the roadseg version that made them",
                )
            _check_seal(data)
            return _shards(where, index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
            raise DataError(
                f"not a readable shard index ({type(e).__name__}: {e})",
                where=name,
                todo="copy the shards again; in a workspace, remove their folder and run again",
            ) from e

    def damaged(self) -> list[tuple[str, int]]:
        """(split, number) of every shard that is missing or differs from what transform wrote.

        A local file is hashed unless log/verified.json has it with its current size, inode and change time: 19 GB of
        raw Cityscapes are checked in milliseconds. On S3 only sizes are compared, as everything read is verified.
        """
        all_shards = [(split, i, s) for split, shards in self.shards.items() for i, s in enumerate(shards)]
        if isinstance(self.folder, S3Prefix):
            sizes = RangedFiles(self.folder).sizes()
            found = [(split, i, s.size_bytes, sizes.get(s.file)) for split, i, s in all_shards]
            return [(split, i) for split, i, made, size in found if size is None or made not in (0, size)]
        wrong = changed_files(self.folder, {s.file: (s.sha256, s.size_bytes) for _, _, s in all_shards})
        return [(split, i) for split, i, s in all_shards if s.file in wrong]

    def split(self, name: str) -> Split:
        return Split(open_files(self.folder), self.shards[name], self.form)


def _check_seal(data: bytes) -> None:
    head, _, tail = data.rpartition(_SEAL)
    if tail != sha256_bytes(head + b"}").encode() + b'"}\n':
        raise ValueError("its SHA-256 is wrong")


def _shards(where: Path | S3Prefix, index: dict[str, Any]) -> Shards:
    form = index["form"]
    if form not in get_args(Format):
        raise ValueError(f"unknown image format {form!r}")
    return Shards(
        folder=where,
        source=index["source"],
        label_set=LabelSet.from_json(index["label_set"]),
        mean=tuple(index["mean"]),
        std=tuple(index["std"]),
        class_pixels=index["class_pixels"],
        fingerprints=index["fingerprints"],
        shards={split: tuple(shard_from_json(s) for s in rows) for split, rows in index["shards"].items()},
        form=form,
        part_weights=index["part_weights"],
    )


def shard_from_json(row: dict[str, Any]) -> Shard:
    """Inverse of `dataclasses.asdict`, after JSON. Raises KeyError or TypeError for anything else."""
    frames = tuple(Frame(**{**f, "centroids": tuple(map(tuple, f["centroids"]))}) for f in row["frames"])
    return Shard(row["file"], row["sha256"], frames, row["size_bytes"])


class Split:
    """Random access to the frames of one split. May be forked and pickled."""

    def __init__(self, files: Files, shards: Iterable[Shard], form: Format = "raw") -> None:
        self._located = [(shard.file, frame) for shard in shards for frame in shard.frames]
        self._files, self._form = files, form
        self._verified: dict[int, int] = {}  # {frame index: bit mask of its verified raw bands}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_verified": {}}

    def __len__(self) -> int:
        return len(self._located)

    @cached_property
    def frames(self) -> list[Frame]:
        return [frame for _, frame in self._located]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3] RGB, label uint8 [H, W] of train ids)."""
        frame = self._located[index][1]
        return self.read_box(index, 0, 0, frame.height, frame.width)

    def read_box(self, index: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [height, width, 3] RGB, label uint8 [height, width]) of a box inside the frame.

        A raw image is a read-only view of the mapped file. From S3 a box is one GET, from the frame's label to the
        last image row needed, plus one for the table at a frame's first box in this process.
        Raises DataError with frame and file for damaged bytes.
        """
        file, frame = self._located[index]
        assert 0 <= top <= frame.height - height and 0 <= left <= frame.width - width and min(height, width) > 0
        first, last = rows_needed(self._form, top, height, frame.height)
        label_range = range(top // LABEL_ROWS, (top + height - 1) // LABEL_ROWS + 1)
        image_range = range(first // BAND_ROWS, (last - 1) // BAND_ROWS + 1)
        label_at, image_at, checks, header = self._table(file, frame)

        start = label_at[label_range.start]
        data = self._files.read(file, start, image_at[image_range.stop], ahead=self._form == "raw")
        label_bands = [data[label_at[i] - start : label_at[i + 1] - start] for i in label_range]
        image_bands = [data[image_at[i] - start : image_at[i + 1] - start] for i in image_range]
        for i, band in zip(label_range, label_bands, strict=True):
            self._check(band, checks[i], file, frame)
        verified = self._verified.get(index, 0)
        for i, band in zip(image_range, image_bands, strict=True):
            if not verified >> i & 1:
                self._check(band, checks[len(label_at) - 1 + i], file, frame)
        if self._form == "raw" and self._files.keeps:
            self._verified[index] = verified | ((1 << image_range.stop) - (1 << image_range.start))

        box, size = (top, left, height, width), (frame.height, frame.width)
        if self._form == "raw":
            image_bands = [data[image_at[image_range.start] - start : image_at[image_range.stop] - start]]
        image = decode_box(self._form, header, image_bands, image_range.start * BAND_ROWS, size, box)
        return image, _decode_label(label_bands, label_range.start * LABEL_ROWS, size, box)

    def _table(self, file: str, frame: Frame) -> tuple[list[int], list[int], tuple[int, ...], bytes]:
        """(offsets of the label's bands, of the image's bands, both with the end; checksums; JPEG header)."""
        table = self._files.table(file, frame.label_offset - frame.table_bytes, frame.label_offset)
        if xxhash.xxh3_64_hexdigest(table) != frame.table_check:
            raise self._damage(file, frame)
        count, bands = -(-frame.height // LABEL_ROWS), -(-frame.height // LABEL_ROWS) - (-frame.height // BAND_ROWS)
        values = struct.unpack_from(f"<{bands}I{bands}Q", table)
        labels = _offsets(frame.label_offset, values[:count])
        images = _offsets(frame.image_offset, values[count:bands])
        return labels, images, values[bands:], table[12 * bands :]

    def _check(self, band: np.ndarray, check: int, file: str, frame: Frame) -> None:
        if xxhash.xxh3_64_intdigest(band.data) != check:
            raise self._damage(file, frame)

    def _damage(self, file: str, frame: Frame) -> DataError:
        self._files.distrust(file)
        return DataError(
            f"frame {frame.name} is damaged",
            expected="the bytes that transform wrote",
            where=self._files.where(file),
            todo="run again: transform then rebuilds the shard from the originals",
        )


def _decode_label(bands: list[np.ndarray], first_row: int, frame_px: tuple[int, int], box: Box) -> np.ndarray:
    """uint8 [height, width] of a box; first_row: top of the first band."""
    top, left, height, width = box
    out = np.empty((height, width), np.uint8)
    for number, band in enumerate(bands):
        y = first_row + number * LABEL_ROWS
        rows = min(LABEL_ROWS, frame_px[0] - y)
        ids = np.frombuffer(decompress(band, rows * frame_px[1]), np.uint8).reshape(rows, frame_px[1])
        a, b = max(y, top), min(y + rows, top + height)
        out[a - top : b - top] = ids[a - y : b - y, left : left + width]
    return out


def _offsets(start: int, sizes: Iterable[int]) -> list[int]:
    offsets = [start]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
