"""Augment one training sample; everything random is a function of (seed, epoch, sample).

The crop's box in the frame is computed first, and only that box is read and resized, once; color is one 3x4 matrix.
Both are many times faster than resizing whole frames and jittering in HSV. `sample_params` draws all parameters;
`apply` makes the crop with OpenCV, and gpu.py makes whole batches on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, radians

import cv2
import numpy as np

from roadseg.labels import IGNORE

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the grey axis of saturation


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the augmentation, as in the config's training.augment."""

    crop_px: tuple[int, int]  # height, width
    scale: tuple[float, float] = (0.5, 2.0)
    rotate_deg: float = 0.0
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    blur: float = 0.0
    tint: float = 0.0


def generator(seed: int, *index: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone."""
    return np.random.default_rng(np.random.SeedSequence((seed % (1 << 63), *index)))


def color_matrix(rng: np.random.Generator, a: Augmentation) -> np.ndarray:
    """float32 [3, 4]: brightness, contrast (around mid-grey), saturation and then tint as one affine map of RGB."""
    ranges = (a.brightness, a.contrast, a.saturation)
    brightness, contrast, saturation = (
        _between(1 - by, 1 + by, u) for by, u in zip(ranges, rng.random(3).tolist(), strict=True)
    )
    grey = [(1 - saturation) * luma for luma in LUMA]
    rows = [[brightness * contrast * (saturation * (i == j) + grey[j]) for j in range(3)] for i in range(3)]
    matrix = np.array([[*row, 127.5 * (1 - contrast)] for row in rows], np.float32)
    if a.tint:  # only if set, so that all other draws stay the same
        matrix *= np.array([[_between(1 - a.tint, 1 + a.tint, u)] for u in rng.random(3).tolist()], np.float32)
    return matrix


def _between(low: float, high: float, u: float) -> float:
    """Equal to numpy's Generator.uniform for `u` in 0..1; one random() call for all values is ten times faster."""
    return low + (high - low) * u


@dataclass(frozen=True)
class CropParams:
    """Parameters of one crop.

    box: (top, left, height, width) of the frame to read. affine: float64 [2, 3], maps a pixel (x, y) of the crop to
    (x, y) in the box, both relative to the center of the first pixel; includes the flip. inner: (top, left, height,
    width) of the crop that the box fills; the rest is void. rotated: the affine, not `inner`, says where the
    frame ends. taps: samples per side that a crop pixel averages; 1 if it covers at most two frame pixels per side.
    color: float32 [3, 4] on RGB in 0..255. blur_px: sigma, 0 for none.
    """

    crop_px: tuple[int, int]
    box: tuple[int, int, int, int]
    affine: np.ndarray
    inner: tuple[int, int, int, int]
    rotated: bool
    flip: bool
    taps: int
    color: np.ndarray
    blur_px: float


def sample_params(
    a: Augmentation, rng: np.random.Generator, height: int, width: int, center: tuple[int, int] | None = None
) -> CropParams:
    """Parameters for a frame of this size. The crop covers the pixel `center` (y, x), if given, somewhere."""
    by_scale, at_y, at_x, flip_draw, blur_draw, by_sigma, by_angle = rng.random(7).tolist()
    scale, sigma = _between(*a.scale, by_scale), _between(0.1, 1.5, by_sigma)
    angle, flip = _between(-a.rotate_deg, a.rotate_deg, by_angle), flip_draw < a.flip
    color = color_matrix(rng, a)
    geometry = _rotated_geometry if a.rotate_deg else _upright_geometry
    box, affine, inner = geometry(a.crop_px, (height, width), scale, radians(angle), flip, (at_y, at_x), center)
    taps = max(1, ceil(0.5 / scale - 1e-9))
    blur_px = sigma if blur_draw < a.blur else 0.0
    return CropParams(a.crop_px, box, affine, inner, a.rotate_deg > 0, flip, taps, color, blur_px)


Geometry = tuple[tuple[int, int, int, int], np.ndarray, tuple[int, int, int, int]]  # box, affine, inner of a CropParams


def _upright_geometry(
    crop_px: tuple[int, int],
    frame_px: tuple[int, int],
    scale: float,
    _angle: float,
    flip: bool,
    at: tuple[float, float],
    center: tuple[int, int] | None,
) -> Geometry:
    """Scale, flip and crop. at: relative position (y, x) of the crop in the frame, each 0..1."""
    starts, sides, inner_starts, inner_sides = [], [], [], []
    for axis, (crop, frame) in enumerate(zip(crop_px, frame_px, strict=True)):
        side = max(1, min(frame, round(crop / scale)))
        low, high = 0, frame - side
        if center:
            low, high = max(low, center[axis] - side + 1), min(high, center[axis])
        inner = min(crop, max(1, round(side * scale)))
        starts.append(low + int(at[axis] * (high - low + 1)))
        sides.append(side)
        inner_starts.append(int(at[axis] * (crop - inner + 1)))
        inner_sides.append(inner)
    step_y, step_x = sides[0] / inner_sides[0], sides[1] / inner_sides[1]
    from_x, from_y = (0.5 - inner_starts[1]) * step_x - 0.5, (0.5 - inner_starts[0]) * step_y - 0.5
    if flip:
        step_x, from_x = -step_x, sides[1] - 1 - from_x
    affine = np.array([[step_x, 0.0, from_x], [0.0, step_y, from_y]])
    return (*starts, *sides), affine, (*inner_starts, *inner_sides)  # type: ignore[return-value]


def _rotated_geometry(
    crop_px: tuple[int, int],
    frame_px: tuple[int, int],
    scale: float,
    angle: float,
    flip: bool,
    at: tuple[float, float],
    center: tuple[int, int] | None,
) -> Geometry:
    """Scale, rotation (radians), flip and crop as one affine map; void outside the frame. Arrays here are (x, y)."""
    size, frame, relative_xy = np.array(crop_px[::-1], float), np.array(frame_px[::-1]), np.array(at[::-1])
    reach = size / (2 * scale)  # from the crop's center to its edges, in frame pixels
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    rotation[:, 0] *= -1 if flip else 1
    if center is None:
        crop_center = reach + relative_xy * (frame - 2 * reach)
    else:
        point = np.array(center[::-1]) + 0.5
        covering = point - rotation @ ((relative_xy - 0.5) * (size - 1))
        crop_center = np.clip(covering, np.minimum(reach, frame - reach), np.maximum(reach, frame - reach))
        if (np.abs(np.linalg.solve(rotation, point - crop_center)) > (size - 1) / 2 + 1e-6).any():
            crop_center = covering  # accept void pixels in order to cover the center
    # The center of pixel i is at i + 0.5, in crop and frame.
    affine = np.column_stack([rotation, crop_center - 0.5 - rotation @ (size / 2 - 0.5)])
    corners = affine @ [[-0.5, size[0] - 0.5] * 2, [-0.5, -0.5, size[1] - 0.5, size[1] - 0.5], [1, 1, 1, 1]]
    (left, top), (right, bottom) = (f(corners, axis=1) for f in (np.min, np.max))
    top, left = min(max(0, floor(top) - 1), frame_px[0] - 1), min(max(0, floor(left) - 1), frame_px[1] - 1)
    bottom, right = min(frame_px[0], ceil(bottom) + 2), min(frame_px[1], ceil(right) + 2)
    affine[:, 2] -= left, top
    return (top, left, max(1, bottom - top), max(1, right - left)), affine, (0, 0, *crop_px)


def apply(
    d: CropParams,
    image: np.ndarray,
    label: np.ndarray,
    fill: tuple[int, int, int],
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The crop (image uint8 [H, W, 3], label uint8 [H, W]). image, label: the frame's pixels in `d.box`.

    Outside the frame the image is `fill` and the label void. out: arrays to write the crop to.
    """
    to_image, to_label = out or (np.empty((*d.crop_px, 3), np.uint8), np.empty(d.crop_px, np.uint8))
    top, left, height, width = d.inner
    inside = to_image[top : top + height, left : left + width], to_label[top : top + height, left : left + width]
    if d.rotated:
        crop, inverse = d.crop_px[::-1], cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
        pixels = cv2.warpAffine(image, d.affine, crop, flags=inverse, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
        nearest = cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
        inside[1][:] = cv2.warpAffine(
            label, d.affine, crop, flags=nearest, borderMode=cv2.BORDER_CONSTANT, borderValue=IGNORE
        )
    else:
        # Down to half the size, bilinear sampling uses every pixel, in a sixth of the time of INTER_AREA.
        how = cv2.INTER_LINEAR if d.taps == 1 else cv2.INTER_AREA
        pixels = cv2.resize(image, (width, height), interpolation=how)
        if d.flip:
            pixels = cv2.flip(pixels, 1, dst=pixels)  # in place: a third of the time
        inside[1][:] = _resized_label(label, d)
    made = cv2.transform(pixels, d.color, dst=inside[0])
    if made is not inside[0]:  # OpenCV allocates a new array if it can't write to dst
        inside[0][:] = made
    if d.rotated:
        to_image[_outside_frame(d, label.shape)] = fill
    if (height, width) != d.crop_px:
        _fill_border(to_image, d.inner, fill)
        _fill_border(to_label, d.inner, (IGNORE,))
    if d.blur_px:
        to_image[:] = cv2.GaussianBlur(to_image, (0, 0), d.blur_px, borderType=cv2.BORDER_REPLICATE)
    return to_image, to_label


def _resized_label(label: np.ndarray, d: CropParams) -> np.ndarray:
    """The label resized to `d.inner`, flipped if `d.flip`."""
    size, rows = d.inner[:1:-1], len(label)
    enlarged = 4 * rows < 3 * size[1]
    # Copying whole rows is faster than looking up each of their pixels again.
    ids = cv2.resize(label, (size[0], rows) if enlarged else size, interpolation=cv2.INTER_NEAREST_EXACT)
    if d.flip:
        ids = cv2.flip(ids, 1, dst=ids)
    if enlarged:
        row_numbers = np.arange(rows, dtype=np.uint16)[:, None]
        ids = ids[cv2.resize(row_numbers, (1, size[1]), interpolation=cv2.INTER_NEAREST_EXACT)[:, 0]]
    return ids


def _fill_border(crop: np.ndarray, inner: tuple[int, int, int, int], fill: tuple[int, ...]) -> None:
    """Fill the part of a crop [H, W] or [H, W, 3] outside of `inner`: (top, left, height, width)."""
    top, left, height, width = inner
    row = np.empty(crop.shape[1:], np.uint8)  # copying whole rows is fifty times faster than single pixels
    row[:] = fill
    crop[:top] = crop[top + height :] = row
    crop[top : top + height, :left] = row[:left]
    crop[top : top + height, left + width :] = row[left + width :]


def _outside_frame(d: CropParams, box_px: tuple[int, ...]) -> np.ndarray:
    """bool [H, W]: pixels of a rotated crop that are outside the frame."""
    flags = cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
    covered: np.ndarray = cv2.warpAffine(np.ones(box_px, np.uint8), d.affine, d.crop_px[::-1], flags=flags)
    return covered == 0


def augment(
    image: np.ndarray, label: np.ndarray, a: Augmentation, rng: np.random.Generator, fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of a whole frame in memory: image uint8 [H, W, 3], label uint8 [H, W]."""
    d = sample_params(a, rng, *label.shape)
    top, left, height, width = d.box
    box = slice(top, top + height), slice(left, left + width)
    return apply(d, image[box], label[box], fill)
