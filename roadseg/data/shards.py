"""Shards: frames as raw bytes, so that a crop is read without decoding its frame.

A shard file holds, frame by frame, the image as uint8 RGB rows at a 64-byte boundary and the train
ids as zstd-compressed uint8 rows. shards.json says where everything lies, with the SHA-256 of every
shard file. Raw images cost 3 bytes a pixel and read a 768x768 crop about a hundred times faster
than a PNG; compressed labels are smaller than their PNGs and decode at memory speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from roadseg.errors import DataError
from roadseg.files import read_json, sha256_file, write_json
from roadseg.labels import LabelSet

SCHEMA_VERSION = 1
ALIGN_BYTES = 64
INDEX = "shards.json"


@dataclass(frozen=True)
class Frame:
    """Where one frame lies. Offsets and sizes in bytes, from the start of the shard file.

    part: of a mixed data set, "" otherwise. centroids: (train id, y, x) in pixels of the frame, where
    a class has pixels: what class-uniform sampling puts its crops on.
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


@dataclass(frozen=True)
class Shard:
    file: str
    sha256: str
    frames: tuple[Frame, ...]


def write_frame(f: BinaryIO, name: str, sequence: str, image: np.ndarray, label: np.ndarray) -> Frame:
    """Append one frame: image uint8 [H, W, 3] RGB, label uint8 [H, W] of train ids."""
    assert image.dtype == label.dtype == np.uint8 and image.shape[:2] == label.shape
    f.write(b"\0" * (-f.tell() % ALIGN_BYTES))
    image_offset = f.tell()
    f.write(np.ascontiguousarray(image).data)
    packed = zstandard.compress(np.ascontiguousarray(label).tobytes(), 3)
    label_offset = f.tell()
    f.write(packed)
    height, width = label.shape
    return Frame(name, sequence, height, width, image_offset, label_offset, len(packed))


@dataclass(frozen=True)
class Shards:
    """The content of shards.json and the folder it describes.

    mean, std: per RGB channel over train, in 0..255. class_pixels: {split: pixels by train id,
    void last}. fingerprints: {split: data fingerprint}.
    """

    folder: Path
    source: str
    label_set: LabelSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_pixels: dict[str, list[int]]
    fingerprints: dict[str, str]
    shards: dict[str, tuple[Shard, ...]]

    def save(self) -> None:
        index: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "label_set": self.label_set.to_json(),
            "mean": self.mean,
            "std": self.std,
            "class_pixels": self.class_pixels,
            "fingerprints": self.fingerprints,
            "shards": {split: [asdict(s) for s in shards] for split, shards in self.shards.items()},
        }
        write_json(self.folder / INDEX, index)

    @staticmethod
    def load(folder: Path) -> Shards:
        """Raises DataError when the index is missing, broken or of a newer schema."""
        where = str(folder / INDEX)
        try:
            index = read_json(folder / INDEX)
            if index["schema_version"] > SCHEMA_VERSION:
                raise DataError(f"schema version {index['schema_version']}", where=where, todo="update roadseg")
            shards = {
                split: tuple(
                    Shard(s["file"], s["sha256"], tuple(Frame(**frame) for frame in s["frames"])) for s in rows
                )
                for split, rows in index["shards"].items()
            }
            return Shards(
                folder,
                index["source"],
                LabelSet.from_json(index["label_set"]),
                tuple(index["mean"]),
                tuple(index["std"]),
                index["class_pixels"],
                index["fingerprints"],
                shards,
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"not a readable shard index ({type(e).__name__}: {e})",
                where=where,
                todo="remove this folder and run again",
            ) from e

    def damaged(self) -> list[tuple[str, int]]:
        """(split, number) of every shard that is missing or has another SHA-256 than when it was made."""
        return [
            (split, i)
            for split, shards in self.shards.items()
            for i, shard in enumerate(shards)
            if not (self.folder / shard.file).is_file() or sha256_file(self.folder / shard.file) != shard.sha256
        ]

    def split(self, name: str) -> Split:
        return Split(self.folder, self.shards[name])


class Split:
    """Random access to the frames of one split. Files are mapped on first use, so it may be forked."""

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self._where = [(folder / shard.file, frame) for shard in shards for frame in shard.frames]
        self._maps: dict[Path, np.memmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map would be pickled as the bytes of its whole file

    def __len__(self) -> int:
        return len(self._where)

    @cached_property
    def frames(self) -> list[Frame]:
        return [frame for _, frame in self._where]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3] RGB, a read-only view of the file; label uint8 [H, W] of train ids)."""
        path, frame = self._where[index]
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, "r")
        data = self._maps[path]
        shape, pixels = (frame.height, frame.width), frame.height * frame.width
        image = data[frame.image_offset : frame.image_offset + 3 * pixels].reshape(*shape, 3)
        packed = data[frame.label_offset : frame.label_offset + frame.label_bytes]
        label = np.frombuffer(zstandard.decompress(packed.data, pixels), np.uint8).reshape(shape)
        return image.view(np.ndarray), label

    def read_box(self, index: int, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [height, width, 3] RGB, label uint8 [height, width]) of a box that lies in the frame."""
        image, label = self.read(index)
        box = slice(top, top + height), slice(left, left + width)
        return image[box], label[box]
