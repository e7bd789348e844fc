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
    rotate_deg: float = 0.0
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
    scale = rng.uniform(*a.scale)
    spot = rng.random(2)
    flip, blur_draw, sigma = rng.random() < a.flip, rng.random(), rng.uniform(0.1, 1.5)
    angle = rng.uniform(-a.rotate_deg, a.rotate_deg)
    matrix = colour_matrix(rng, a)
    if a.rotate_deg:
        pixels, ids = _warped(image, label, a.crop_px, scale, np.deg2rad(angle), flip, spot, fill)
    else:
        pixels, ids = _resized(image, label, a.crop_px, scale, flip, spot)
    if blur_draw < a.blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), sigma)
    return _pad(cv2.transform(pixels, matrix), ids, a.crop_px, spot, fill)


def _resized(
    image: np.ndarray, label: np.ndarray, crop_px: tuple[int, int], scale: float, flip: bool, spot: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The part of the scaled frame that a crop at `spot` (0..1, 0..1) covers; at most the crop's size."""
    (height, width), (crop_h, crop_w) = label.shape, crop_px
    box_h = max(1, min(height, round(crop_h / scale)))
    box_w = max(1, min(width, round(crop_w / scale)))
    top, left = int(spot[0] * (height - box_h + 1)), int(spot[1] * (width - box_w + 1))
    box = slice(top, top + box_h), slice(left, left + box_w)
    size = min(crop_w, max(1, round(box_w * scale))), min(crop_h, max(1, round(box_h * scale)))
    shrinks = size[0] < box_w
    pixels = cv2.resize(image[box], size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    ids = cv2.resize(label[box], size, interpolation=cv2.INTER_NEAREST_EXACT)
    return (cv2.flip(pixels, 1), cv2.flip(ids, 1)) if flip else (pixels, ids)


def _warped(
    image: np.ndarray,
    label: np.ndarray,
    crop_px: tuple[int, int],
    scale: float,
    angle: float,
    flip: bool,
    spot: np.ndarray,
    fill: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Scale, rotation (radians), flip and crop as one affine sample; void where the frame ends."""
    size = np.array(crop_px[::-1], float)
    reach = size / (2 * scale)  # from the crop's centre to its edges, in pixels of the frame
    centre = reach + spot[::-1] * (np.array(label.shape[::-1]) - 2 * reach)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    turn[:, 0] *= -1 if flip else 1
    # Pixel i has its centre at i + 0.5 in both frames.
    shift = centre - 0.5 - turn @ (size / 2 - 0.5)
    affine = np.column_stack([turn, shift])
    crop = crop_px[::-1]
    inverse = cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(
        image, affine, crop, flags=cv2.INTER_LINEAR | inverse, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
    ids = cv2.warpAffine(
        label, affine, crop, flags=cv2.INTER_NEAREST | inverse, borderMode=cv2.BORDER_CONSTANT, borderValue=IGNORE
    )
    return pixels, ids


def _pad(
    pixels: np.ndarray, ids: np.ndarray, crop_px: tuple[int, int], spot: np.ndarray, fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = crop_px[0] - ids.shape[0], crop_px[1] - ids.shape[1]
    if rows == 0 and columns == 0:
        return pixels, ids
    top, left = int(spot[0] * (rows + 1)), int(spot[1] * (columns + 1))
    edges = (top, rows - top, left, columns - left)
    pixels = cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=fill)
    return pixels, cv2.copyMakeBorder(ids, *edges, cv2.BORDER_CONSTANT, value=IGNORE)
