"""One augmented training sample: drawn from (seed, epoch, sample), read as a box, resized once.

The crop's box in the frame is computed first and only that box is read and resized; colour is one
3x4 matrix. Both are many times faster than resizing whole frames and jittering in HSV.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from roadseg.labels import IGNORE

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the axis that saturation turns around


@dataclass(frozen=True)
class Augmentation:
    """What is drawn. Ranges as in the config's training.augment."""

    crop_px: tuple[int, int]  # height, width
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    blur: float = 0.0


def generator(seed: int, *index: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone."""
    return np.random.default_rng(np.random.SeedSequence((seed % (1 << 63), *index)))


def colour_matrix(rng: np.random.Generator, a: Augmentation) -> np.ndarray:
    """float32 [3, 4]: brightness, contrast (around mid-grey) and saturation as one affine map of RGB."""
    brightness = rng.uniform(1 - a.brightness, 1 + a.brightness)
    contrast = rng.uniform(1 - a.contrast, 1 + a.contrast)
    saturation = rng.uniform(1 - a.saturation, 1 + a.saturation)
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA
    offset = 127.5 * (1 - contrast)
    return np.hstack([brightness * contrast * mix, np.full((3, 1), offset)]).astype(np.float32)


def augment(
    image: np.ndarray, label: np.ndarray, a: Augmentation, rng: np.random.Generator, fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of `a.crop_px` out of a frame.

    image uint8 [H, W, 3], label uint8 [H, W]; returns the same kinds at the crop's size. Where the
    scaled frame is smaller than the crop, the image is `fill` and the label void.
    """
    height, width = label.shape
    crop_h, crop_w = a.crop_px
    scale = float(np.exp(rng.uniform(np.log(a.scale[0]), np.log(a.scale[1]))))
    spots = rng.random(2)
    flip, blur_draw, sigma = rng.random() < a.flip, rng.random(), rng.uniform(0.1, 1.5)
    matrix = colour_matrix(rng, a)

    box_h, box_w = min(height, round(crop_h / scale)), min(width, round(crop_w / scale))
    box_h, box_w = max(1, box_h), max(1, box_w)
    top, left = int(spots[0] * (height - box_h + 1)), int(spots[1] * (width - box_w + 1))
    box = slice(top, top + box_h), slice(left, left + box_w)
    size = min(crop_w, max(1, round(box_w * scale))), min(crop_h, max(1, round(box_h * scale)))
    shrinks = size[0] < box_w
    pixels = cv2.resize(image[box], size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    ids = cv2.resize(label[box], size, interpolation=cv2.INTER_NEAREST_EXACT)
    if flip:
        pixels, ids = cv2.flip(pixels, 1), cv2.flip(ids, 1)
    if blur_draw < a.blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), sigma)
    pixels = cv2.transform(pixels, matrix)
    return _pad(pixels, ids, a.crop_px, spots, fill)


def _pad(
    pixels: np.ndarray, ids: np.ndarray, crop_px: tuple[int, int], spots: np.ndarray, fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = crop_px[0] - ids.shape[0], crop_px[1] - ids.shape[1]
    if rows == 0 and columns == 0:
        return pixels, ids
    top, left = int(spots[0] * (rows + 1)), int(spots[1] * (columns + 1))
    edges = (top, rows - top, left, columns - left)
    pixels = cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=fill)
    return pixels, cv2.copyMakeBorder(ids, *edges, cv2.BORDER_CONSTANT, value=IGNORE)
