"""Shards: frames laid out so that a box is read without the rest of its frame, and no wrong byte is used.

A shard file holds frames one after another. A frame's record is

    table    uint32 byte counts of the label's bands, then of the image's; uint64 XXH3 of each; JPEG header
    label    train ids in bands of 128 rows, each zstd at level 9
    image    at a multiple of 64 bytes, in bands of 64 rows; shard_images.py tells raw, jpeg and lossless

and shards.json says where the records lie, with the XXH3 of every table, the SHA-256 of every shard file
and of itself. Labels of Cityscapes (2048x1024, one core of a Xeon): whole at level 3 15.2 kB and 0.23 ms a
random 768x768 box, bands of 128 rows at level 9 10.5 kB and 0.17 ms; smaller tiles cost more.

**Integrity.** A table, a label band and a band of jpeg or lossless are verified whenever they are read
(some 20 us a box). For raw that would double the time (0.5 ms at 10 GB/s), so a process verifies a band
when it first touches it, and not again when the page was dropped and comes from the disk once more.
Besides, `Shards.damaged` compares whole files with their SHA-256 where size, times or inode are not those
of the last time that it did. From S3 every band that comes is verified.

Version 1 (raw rows and a label in one piece, with no checksums of their own) stays readable.
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

from roadseg.data.shards.files import Files, RangedFiles, S3Prefix, not_as_made, open_files, place
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
    """Where one frame lies. Offsets and sizes in bytes, from the start of the shard file.

    part: of a mixed data set, "" otherwise. centroids: (train id, y, x) in pixels of the frame, where
    a class has pixels: what class-uniform sampling puts its crops on. The table ends where the label
    starts; table_check: its XXH3 in hex, "" in version 1, which has no tables.
    """

    name: str
    sequence: str
    height: int
    width: int
    image_offset: int
    label_offset: int
    label_bytes: int
    part: str = ""
    centroids: tuple[tuple[int, int, int], ...] = ()
    table_bytes: int = 0
    table_check: str = ""


@dataclass(frozen=True)
class Shard:
    file: str
    sha256: str
    frames: tuple[Frame, ...]
    size_bytes: int = 0  # 0 where not known


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


@dataclass(frozen=True)
class Shards:
    """The content of shards.json and where it lies, a folder or an S3 prefix.

    mean, std: per RGB channel over train, in 0..255. class_pixels: {split: pixels by train id,
    void last}. fingerprints: {split: data fingerprint}. form: of the images. part_weights: of a mixed
    data set, how often a sample is drawn from each part.
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
        """The content digest of a folder that holds this index and its shards, as the workspace takes it."""
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
        """From a folder or s3://bucket/prefix.

        Raises DataError when the index is missing, broken, changed since it was written, or of a newer schema.
        """
        where = place(address, region, endpoint_url)
        name = f"{where}/{INDEX}"
        try:
            data = (where / INDEX).read_bytes() if isinstance(where, Path) else RangedFiles(where).get(INDEX)
            index = json.loads(data)
            version = index["schema_version"]
            if version not in range(1, SCHEMA_VERSION + 1):
                raise DataError(f"schema version {version!r}", where=name, todo="update roadseg")
            if version > 1:
                _unbroken(data)
            return _shards(where, index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
            raise DataError(
                f"not a readable shard index ({type(e).__name__}: {e})",
                where=name,
                todo="copy the shards there again; those of a workspace are made anew once their folder is removed",
            ) from e

    def damaged(self) -> list[tuple[str, int]]:
        """(split, number) of every shard that is missing or is not what was made.

        Locally a file is hashed unless log/verified.json says that it was when it had this size, inode and
        change time: 19 GB of raw Cityscapes are looked at in milliseconds. On S3 sizes are compared;
        there whatever is read is verified on the way.
        """
        all_shards = [(split, i, s) for split, shards in self.shards.items() for i, s in enumerate(shards)]
        if isinstance(self.folder, S3Prefix):
            sizes = RangedFiles(self.folder).sizes()
            found = [(split, i, s.size_bytes, sizes.get(s.file)) for split, i, s in all_shards]
            return [(split, i) for split, i, made, there in found if there is None or made not in (0, there)]
        wrong = not_as_made(self.folder, {s.file: (s.sha256, s.size_bytes) for _, _, s in all_shards})
        return [(split, i) for split, i, s in all_shards if s.file in wrong]

    def split(self, name: str) -> Split:
        return Split(open_files(self.folder), self.shards[name], self.form)


def _unbroken(data: bytes) -> None:
    head, _, tail = data.rpartition(_SEAL)
    if tail != sha256_bytes(head + b"}").encode() + b'"}\n':
        raise ValueError("it is not as it was written")


def _shards(where: Path | S3Prefix, index: dict[str, Any]) -> Shards:
    form = index.get("form", "raw")
    if form not in get_args(Format):
        raise ValueError(f"images of form {form!r}")
    return Shards(
        where,
        index["source"],
        LabelSet.from_json(index["label_set"]),
        tuple(index["mean"]),
        tuple(index["std"]),
        index["class_pixels"],
        index["fingerprints"],
        {split: tuple(shard_from_json(s) for s in rows) for split, rows in index["shards"].items()},
        form,
        index.get("part_weights", {}),
    )


def shard_from_json(row: dict[str, Any]) -> Shard:
    """What `dataclasses.asdict` and JSON made of a Shard. Raises KeyError, TypeError for anything else."""
    frames = tuple(Frame(**{**f, "centroids": tuple(map(tuple, f.get("centroids", ())))}) for f in row["frames"])
    return Shard(row["file"], row["sha256"], frames, row.get("size_bytes", 0))


class Split:
    """Random access to the frames of one split, from any process that it is forked or pickled into."""

    def __init__(self, files: Files, shards: Iterable[Shard], form: Format = "raw") -> None:
        self._where = [(shard.file, frame) for shard in shards for frame in shard.frames]
        self._files, self._form = files, form
        self._seen: dict[int, int] = {}  # by frame, a bit for every band of raw that was verified

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}

    def __len__(self) -> int:
        return len(self._where)

    @cached_property
    def frames(self) -> list[Frame]:
        return [frame for _, frame in self._where]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3] RGB, label uint8 [H, W] of train ids)."""
        frame = self._where[index][1]
        return self.read_box(index, 0, 0, frame.height, frame.width)

    def read_box(self, index: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [height, width, 3] RGB, label uint8 [height, width]) of a box that lies in the frame.

        A raw image is a read-only view of the mapped file. From S3 a box is one GET, from the frame's
        label to the last row of the image that it needs, and one more for a frame's first box in this process.
        Raises DataError, naming frame and file, for bytes that are not those that were written.
        """
        file, frame = self._where[index]
        assert 0 <= top <= frame.height - height and 0 <= left <= frame.width - width and min(height, width) > 0
        label_rows, image_rows = (LABEL_ROWS, BAND_ROWS) if frame.table_check else (frame.height, frame.height)
        a, b = top // label_rows, (top + height - 1) // label_rows + 1
        first, last = rows_needed(self._form, top, height, frame.height)
        c, d = first // image_rows, (last - 1) // image_rows + 1
        labels, images, checks, header = self._table(file, frame)

        start = min(labels[a], images[c])  # of version 1 the image comes first
        unseen = self._unseen(index, c, d)
        data = self._files.read(file, start, max(labels[b], images[d]), ahead=self._form == "raw")
        label_bands = [data[labels[i] - start : labels[i + 1] - start] for i in range(a, b)]
        image_bands = [data[images[i] - start : images[i + 1] - start] for i in range(c, d)]
        if checks:
            count = len(labels) - 1
            for i, band in enumerate(label_bands, a):
                self._check(band, checks[i], file, frame)
            for i in unseen:
                self._check(image_bands[i - c], checks[count + i], file, frame)
            if self._form == "raw" and self._files.keeps and unseen:
                self._seen[index] = self._seen.get(index, 0) | ((1 << d) - (1 << c))

        box, size = (top, left, height, width), (frame.height, frame.width)
        if self._form == "raw":
            image_bands = [data[images[c] - start : images[d] - start]]
        image = decode_box(self._form, header, image_bands, c * image_rows, size, box)
        return image, self._label(label_bands, a * label_rows, label_rows, size, box, file, frame)

    def _table(self, file: str, frame: Frame) -> tuple[list[int], list[int], tuple[int, ...], bytes]:
        """Offsets in the file of the label's bands and of the image's, with their ends; checksums; header."""
        if not frame.table_check:
            end = frame.image_offset + 3 * frame.height * frame.width
            return [frame.label_offset, frame.label_offset + frame.label_bytes], [frame.image_offset, end], (), b""
        table = self._files.table(file, frame.label_offset - frame.table_bytes, frame.label_offset)
        if xxhash.xxh3_64_hexdigest(table) != frame.table_check:
            raise self._damage(file, frame)
        count, bands = -(-frame.height // LABEL_ROWS), -(-frame.height // LABEL_ROWS) - (-frame.height // BAND_ROWS)
        values = struct.unpack_from(f"<{bands}I{bands}Q", table)
        labels = _offsets(frame.label_offset, values[:count])
        images = _offsets(frame.image_offset, values[count:bands])
        return labels, images, values[bands:], table[12 * bands :]

    def _unseen(self, index: int, first: int, last: int) -> list[int]:
        """Those of these bands of the image that this process has not verified, or must again."""
        seen = self._seen.get(index, 0)
        return [i for i in range(first, last) if not seen >> i & 1]

    def _check(self, band: np.ndarray, check: int, file: str, frame: Frame) -> None:
        if xxhash.xxh3_64_intdigest(band.data) != check:
            raise self._damage(file, frame)

    def _damage(self, file: str, frame: Frame) -> DataError:
        self._files.distrust(file)
        return DataError(
            f"the bytes of frame {frame.name} are damaged",
            expected="those that transform wrote",
            where=self._files.where(file),
            todo="run again: the shard is made again from the originals",
        )

    def _label(
        self,
        bands: list[np.ndarray],
        row: int,
        rows: int,
        size: tuple[int, int],
        box: Box,
        file: str,
        frame: Frame,
    ) -> np.ndarray:
        """uint8 [height, width] of a box; `row` is the top of the first band."""
        top, left, height, width = box
        out = np.empty((height, width), np.uint8)
        for y, band in enumerate(bands):
            y0 = row + y * rows
            inside = min(rows, size[0] - y0)
            try:
                ids = np.frombuffer(decompress(band, inside * size[1]), np.uint8).reshape(inside, size[1])
            except zstandard.ZstdError:  # of version 1, which has no checksums
                raise self._damage(file, frame) from None
            a, b = max(y0, top), min(y0 + inside, top + height)
            out[a - top : b - top] = ids[a - y0 : b - y0, left : left + width]
        return out


def _offsets(start: int, sizes: Iterable[int]) -> list[int]:
    offsets = [start]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
