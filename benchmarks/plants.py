"""Faults of files, names and labels, each planted in separate frames; plants_pictures.py has faults of images."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from roadseg.config.sections import Data
from roadseg.images.decode import encode_label_png, read_label
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CAMVID, CITYSCAPES, IGNORE

_CAMVID_AS_CITYSCAPES = np.array([23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 25, 0], np.uint8)


@dataclass(frozen=True)
class Plant:
    """A planted fault. Expected: a finding `code` with `named` and `says` in one entry or in its message."""

    kind: str
    code: str
    named: str
    says: str = ""


@dataclass
class Tree:
    """A copy of a data set in which faults are planted, each in separate frames.

    free: pairs in which nothing was planted yet, by split. touched: parts of paths that an error may name.
    """

    root: Path
    data: Data
    free: dict[str, list[Pair]]
    plants: list[Plant] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    def take(self, split: str = "train") -> Pair:
        """An unused frame, taken from the end, so that splits and sequences keep their first frames."""
        pair = self.free[split].pop()
        self.touched |= {pair.image, pair.label, pair.instances} - {""}
        return pair

    def write(self, path: str, data: bytes) -> None:
        """Replace the hard link by a new file, so that other copies are unchanged."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).unlink(missing_ok=True)
        (self.root / path).write_bytes(data)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def image(self, pair: Pair) -> np.ndarray:
        """uint8 [H, W, 3] BGR."""
        return decoded(self.read(pair.image), cv2.IMREAD_COLOR)

    def colors(self, pair: Pair) -> np.ndarray:
        """uint8 [H, W, 3] BGR of a label."""
        return decoded(self.read(pair.label), cv2.IMREAD_COLOR)

    def label(self, pair: Pair) -> np.ndarray:
        return read_label(self.read(pair.label))

    def set_image(self, pair: Pair, image: np.ndarray) -> None:
        self.write(pair.image, png(image))

    def set_label(self, pair: Pair, label: np.ndarray) -> None:
        self.write(pair.label, png(label))

    def move(self, pair: Pair, image: str, label: str) -> None:
        self.touched |= {image, label}
        for old, new in ((pair.image, image), (pair.label, label)):
            (self.root / new).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.root / old, self.root / new)
        if pair.instances:
            (self.root / pair.instances).unlink(missing_ok=True)

    def expect(self, kind: str, code: str, named: str, says: str = "") -> None:
        self.plants.append(Plant(kind, code, named, says))


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return decoded(data, cv2.IMREAD_UNCHANGED)


def decoded(data: bytes, flags: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert pixels is not None
    return pixels


# --- faults of single files, for any source -----------------------------------------------------------


def truncated_image(t: Tree) -> None:
    p = t.take()
    t.write(p.image, t.read(p.image)[: len(t.read(p.image)) // 2])
    t.expect("truncated image", "unreadable-image", p.image)


def empty_image(t: Tree) -> None:
    p = t.take("val")
    t.write(p.image, b"")
    t.expect("empty image", "unreadable-image", p.image)


def hostile_image(t: Tree) -> None:
    p = t.take()
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"IDAT" + zlib.compress(bytes(1_000_000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, bomb, b"IEND")]
    t.write(p.image, b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    t.expect("decompression bomb", "unreadable-image", p.image, "50000 x 50000")


def truncated_label(t: Tree) -> None:
    p = t.take()
    t.write(p.label, t.read(p.label)[:-30])
    t.expect("truncated label", "unreadable-label", p.label)


def no_picture(t: Tree) -> None:
    p = t.take("val")
    t.write(p.label, b"<html>404 Not Found</html>")
    t.expect("label that is no picture", "unreadable-label", p.label)


def missing_label(t: Tree) -> None:
    p = t.take()
    (t.root / p.label).unlink()
    t.expect("missing label", "missing-label", p.image)


def missing_image(t: Tree) -> None:
    p = t.take("val")
    (t.root / p.image).unlink()
    t.expect("missing image", "missing-image", p.label)


def doubled(t: Tree) -> None:
    p = t.take()
    copy = p.image.rpartition(".")[0] + ".jpg"
    t.write(copy, cv2.imencode(".jpg", t.image(p))[1].tobytes())
    t.touched.add(copy)
    t.expect("doubled image", "doubled-file", p.image)


def swapped(t: Tree) -> None:
    p = t.take()
    image, label = t.read(p.image), t.read(p.label)
    t.write(p.image, label)
    t.write(p.label, image)
    t.expect("image and label swapped", "swapped", p.image)


def one_file(t: Tree) -> None:
    p = t.take("val")
    t.write(p.image, t.read(p.label))
    t.expect("label in the image's place", "same-file", p.image)


def other_size(t: Tree) -> None:
    p = t.take()
    t.set_label(p, t.label(p)[:-8])
    t.expect("label of another size", "size-differs", p.image)


def turned(t: Tree) -> None:
    """An image that is upright only by its EXIF data, with a label drawn on the stored image."""
    p = t.take()
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(t.image(p)[..., ::-1]).save(out, "JPEG", quality=92, exif=exif)
    t.write(p.image, out.getvalue())
    t.expect("label of the picture as stored", "size-differs", p.image, "stored on its side")


def unknown_id(t: Tree) -> None:
    p = t.take("val")
    label = t.label(p)
    label[5:9, 7:20] = 77
    t.set_label(p, label)
    t.expect("unknown id", "unknown-id", p.label, "id 77 on 52 pixels")


def instance_ids(t: Tree) -> None:
    p = t.take()
    t.set_label(p, t.label(p).astype(np.uint16) * 1000 + 1)
    t.expect("instance ids", "instance-ids", p.label)


def rgb_mask(t: Tree) -> None:
    p = t.take()
    colors = np.zeros((256, 3), np.uint8)
    for c in (CITYSCAPES if t.data.source == "cityscapes" else CAMVID).classes:
        colors[c.id] = c.color[::-1]
    t.set_label(p, colors[t.label(p)])
    t.expect("RGB mask", "color-mask", p.label)


def palette_mask(t: Tree) -> None:
    """A palette renumbered by class frequency, as some drawing programs do."""
    p = t.take()
    label = t.label(p)
    ids, counts = np.unique(label, return_counts=True)
    renumbered = np.zeros(256, np.uint8)
    renumbered[ids[np.argsort(-counts)]] = np.arange(len(ids))
    t.write(p.label, encode_label_png(renumbered[label], np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)))
    t.expect("palette numbered anew", "mixed-masks", p.label)


def binary_mask(t: Tree) -> None:
    p = t.take()
    label = t.label(p)
    t.set_label(p, np.where(label == np.bincount(label.ravel()).argmax(), 255, 0).astype(np.uint8))
    t.expect("0/255 mask", "binary-mask", p.label)


def undeclared_void(t: Tree) -> None:
    p = t.take()
    label = t.label(p)
    label[:, :6] = IGNORE
    t.set_label(p, label)
    t.expect("255 for void, not declared", "undeclared-void", p.label)


def resized_mask(t: Tree) -> None:
    p = t.take()
    label = t.label(p)
    small = cv2.resize(label, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_LINEAR)
    t.set_label(p, cv2.resize(small, label.shape[::-1], interpolation=cv2.INTER_NEAREST))
    t.expect("mask resized with interpolation", "interpolated-mask", p.label)


def smoothed_mask(t: Tree) -> None:
    p = t.take()
    t.set_label(p, cv2.GaussianBlur(t.label(p), (3, 3), 0))
    t.expect("anti-aliased mask", "interpolated-mask", p.label)


def jpeg_mask(t: Tree) -> None:
    p = t.take("val")
    t.write(p.label, cv2.imencode(".jpg", t.label(p))[1].tobytes())
    t.expect("mask saved as JPEG", "interpolated-mask", p.label)


def once_jpeg_mask(t: Tree) -> None:
    p = t.take()
    t.set_label(p, through_jpeg(t.label(p), 90))
    t.expect("mask that was a JPEG once", "interpolated-mask", p.label)


def all_void(t: Tree) -> None:
    p = t.take()
    t.set_label(p, np.full_like(t.label(p), 0 if t.data.source == "cityscapes" else 11))
    t.expect("all-void mask", "all-void", p.label)


def one_class(t: Tree) -> None:
    p = t.take()
    t.set_label(p, np.full_like(t.label(p), 7 if t.data.source == "cityscapes" else 3))
    t.expect("one-class mask", "one-class", p.label)


def other_case(t: Tree) -> None:
    """A frame whose name differs from another one only in case."""
    p, other = t.take(), t.take()
    name = other.name.rpartition("/")[2]
    image, label = (path.replace(name, name.swapcase()) for path in (other.image, other.label))
    t.move(p, image, label)
    t.expect("names that differ in case", "case-clash", image)


def bad_name(t: Tree) -> None:
    p = t.take()
    name = p.name.rpartition("/")[2]
    (t.root / p.image).rename(t.root / p.image.replace(name, name[:-1] + "\n" + name[-1]))
    (t.root / p.label).unlink()
    t.touched.add(name[:-1])
    t.expect("line feed in a name", "bad-name", name[:-1])


# --- faults of the Cityscapes tree --------------------------------------------------------------------


def train_ids(t: Tree) -> None:
    p = t.take("val")
    t.set_label(p, CITYSCAPES.id_to_train[t.label(p)])
    t.expect("train ids for label ids", "train-ids", p.label)


def broken_instances(t: Tree) -> None:
    p = t.take()
    t.write(p.instances, t.read(p.instances)[:-20])
    t.expect("truncated instance map", "unreadable-instances", p.instances)


def missing_instances(t: Tree) -> None:
    p = t.take()
    (t.root / p.instances).unlink()
    t.expect("missing instance map", "missing-instances", p.label)


def same_sequence(t: Tree) -> None:
    """One frame of a train sequence in val."""
    p = t.take()
    t.move(p, p.image.replace("/train/", "/val/"), p.label.replace("/train/", "/val/"))
    t.expect("a sequence in two splits", "same-sequence", p.sequence)


def same_city(t: Tree, a: str, b: str, unused: set[str]) -> None:
    """Move the rest of a city's last sequence to another split; its other sequences stay."""
    city = next(c for c in sorted({p.sequence.partition("_")[0] for p in t.free[a]}) if c not in unused)
    unused.add(city)
    last = max(p.sequence for p in t.free[a] if p.sequence.startswith(city))
    for p in [p for p in t.free[a] if p.sequence == last]:
        t.free[a].remove(p)
        t.move(p, p.image.replace(f"/{a}/", f"/{b}/"), p.label.replace(f"/{a}/", f"/{b}/"))
    t.expect("a city in two splits", "same-city", city)


# --- faults of CamVid and of folders -------------------------------------------------------------------


def label_ids(t: Tree) -> None:
    p = t.take()
    t.set_label(p, _CAMVID_AS_CITYSCAPES[t.label(p)])
    t.expect("label ids for train ids", "label-ids", p.label)


def unknown_color(t: Tree) -> None:
    p = t.take("val")
    colors = t.colors(p)
    colors[3:7, 5:30] = (3, 2, 1)
    t.set_label(p, colors)
    t.expect("unknown colour", "unknown-color", p.label, "#010203 on 100 pixels")


def ids_for_colors(t: Tree) -> None:
    p = t.take()
    colors = t.colors(p)
    t.set_label(p, colors[..., 0])
    t.expect("ids for colours", "id-mask", p.label)


def resized_colors(t: Tree) -> None:
    p = t.take()
    colors = t.colors(p)
    small = cv2.resize(colors, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_LINEAR)
    t.set_label(p, cv2.resize(small, colors.shape[1::-1], interpolation=cv2.INTER_NEAREST))
    t.expect("colours resized with interpolation", "interpolated-mask", p.label)


def jpeg_colors(t: Tree) -> None:
    p = t.take()
    t.set_label(p, through_jpeg(t.colors(p), 90))
    t.expect("colours that were a JPEG once", "interpolated-mask", p.label)


ANY_FILE: tuple[Callable[[Tree], None], ...] = (
    truncated_image, empty_image, hostile_image, truncated_label, no_picture, missing_label, missing_image, doubled,
    swapped, one_file, other_size, turned, unknown_id, instance_ids, rgb_mask, palette_mask, binary_mask,
    undeclared_void, resized_mask, smoothed_mask, jpeg_mask, once_jpeg_mask, all_void, one_class, other_case, bad_name,
)  # fmt: skip
CITYSCAPES_FILE: tuple[Callable[[Tree], None], ...] = (train_ids, broken_instances, missing_instances)
COLORS: tuple[Callable[[Tree], None], ...] = (unknown_color, ids_for_colors, resized_colors, jpeg_colors)
