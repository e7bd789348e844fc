"""Faults of images, each planted in separate frames: exact copies, near-copies and unusual images."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image
from plants import Tree, through_jpeg


def copied_across(t: Tree) -> None:
    p, of = t.take("val"), t.take("train")
    t.write(p.image, t.read(of.image))
    t.write(p.label, t.read(of.label))
    t.expect("copy in another split", "duplicate-across-splits", p.image)


def repacked_across(t: Tree) -> None:
    """The same pixels in another format."""
    p, of = t.take("val"), t.take("train")
    out = io.BytesIO()
    Image.fromarray(t.image(of)[..., ::-1]).save(out, "WEBP", lossless=True)
    t.write(p.image, out.getvalue())
    t.write(p.label, t.read(of.label))
    t.expect("lossless copy in another split", "duplicate-across-splits", p.image)


def copied_inside(t: Tree) -> None:
    p, of = t.take("train"), t.take("train")
    t.write(p.image, t.read(of.image))
    t.write(p.label, t.read(of.label))
    t.expect("copy in the same split", "duplicate-in-split", p.image)


def contradicting(t: Tree) -> None:
    p, of = t.take("train"), t.take("train")
    t.write(p.image, t.read(of.image))
    t.expect("one picture, two labels", "contradicting-labels", p.image)


def reencoded_across(t: Tree) -> None:
    p, of = t.take("val"), t.take("train")
    t.set_image(p, through_jpeg(t.image(of), 60))
    t.write(p.label, t.read(of.label))
    t.expect("re-encoded copy in another split", "near-duplicate", p.image)


def resized_across(t: Tree) -> None:
    p, of = t.take("val"), t.take("train")
    image = t.image(of)
    small = cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    t.set_image(p, cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC))
    t.write(p.label, t.read(of.label))
    t.expect("resized copy in another split", "near-duplicate", p.image)


def reencoded_inside(t: Tree) -> None:
    p = t.take("train")
    of = next(o for o in reversed(t.free["train"]) if o.sequence != p.sequence)
    t.free["train"].remove(of)
    t.set_image(p, through_jpeg(t.image(of), 60))
    t.write(p.label, t.read(of.label))
    t.expect("re-encoded copy in the same split", "near-duplicate-in-split", p.image)


def exif_rotated(t: Tree) -> None:
    p = t.take("train")
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    stored = np.ascontiguousarray(np.rot90(t.image(p)[..., ::-1]))
    Image.fromarray(stored).save(out, "JPEG", quality=95, exif=exif)
    t.write(p.image, out.getvalue())
    t.expect("photograph stored on its side", "exif-rotated", p.image)


def too_dark(t: Tree) -> None:
    p = t.take("train")
    t.set_image(p, (t.image(p) * 0.06).astype(np.uint8))
    t.expect("exposed far too little", "too-dark", p.image)


def too_bright(t: Tree) -> None:
    p = t.take("train")
    t.set_image(p, np.clip(t.image(p) * 2.5 + 120.0, 0, 255).astype(np.uint8))
    t.expect("exposed far too much", "too-bright", p.image)


def blurred(t: Tree) -> None:
    p = t.take("train")
    t.set_image(p, cv2.GaussianBlur(t.image(p), (0, 0), 8))
    t.expect("out of focus", "blurred", p.image)


def odd_size(t: Tree) -> None:
    p = t.take("train")
    image, label = t.image(p), t.label(p)
    half = (image.shape[1] // 2, image.shape[0] // 2)
    t.set_image(p, cv2.resize(image, half, interpolation=cv2.INTER_AREA))
    t.set_label(p, cv2.resize(label, half, interpolation=cv2.INTER_NEAREST))
    if p.instances:
        (t.root / p.instances).unlink()
    t.expect("half the size", "odd-size", p.image)


def odd_color(t: Tree) -> None:
    p = t.take("train")
    t.set_image(p, np.clip(t.image(p) * np.array([0.05, 0.05, 1.6]) + np.array([0, 0, 60]), 0, 255).astype(np.uint8))
    t.expect("a red cast", "odd-color", p.image)


PICTURES: tuple[Callable[[Tree], None], ...] = (
    copied_across, repacked_across, copied_inside, contradicting, reencoded_across, resized_across, reencoded_inside,
    exif_rotated, too_dark, too_bright, blurred, odd_size, odd_color,
)  # fmt: skip
