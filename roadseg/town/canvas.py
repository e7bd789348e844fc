"""Paint shapes far to near, each into the image and into the object map.

The picture gets anti-aliased edges, the map crisp ones, from the same polygon in 1/16 pixels; so
image and labels agree to a pixel. Labels, instances and outlines are read off the map at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from roadseg.town.camera import NEAR_M, Camera
from roadseg.town.light import Light

SHIFT = 4  # OpenCV's fixed point: 1/16 pixel
SKY_NUMBER = 1  # the sky is the first object painted
_TURN = np.concatenate([np.linspace(0.5, 1.5, 5), np.linspace(-0.5, 0.5, 5)]) * np.pi
_CAP = np.column_stack([np.cos(_TURN), np.sin(_TURN)])  # the outline of a rod's two round ends


@dataclass(frozen=True)
class Lamp:
    """Something that shines at night: its pixel, glow radius in px, RGB, and the object it belongs to."""

    u: float
    v: float
    radius_px: float
    colour: tuple[float, float, float]
    number: int


@dataclass
class Canvas:
    camera: Camera
    light: Light
    image: np.ndarray  # uint8 [H, W, 3] RGB
    objects: np.ndarray  # uint16 [H, W], object numbers; 0 is nothing
    labels: list[int] = field(default_factory=lambda: [0])  # by object number
    planes: list[tuple[float, float, float]] = field(default_factory=lambda: [(0.0, 0.0, 0.0)])
    boxes: list[tuple[int, int, int, int]] = field(default_factory=lambda: [(0, 0, 0, 0)])
    lamps: list[Lamp] = field(default_factory=list)

    def begin(self, label: int, uv: np.ndarray, depth: float, plane: tuple[float, float, float] | None = None) -> int:
        """A new object's number. `uv` bounds it; 1 / depth is constant, or affine: plane · (1, u, v)."""
        self.labels.append(label)
        self.planes.append(plane or (1.0 / max(depth, NEAR_M), 0.0, 0.0))
        self.boxes.append(self._box(uv))
        return len(self.labels) - 1

    def grow(self, number: int, uv: np.ndarray) -> None:
        """Widen an object's bounds by more pixels."""
        a, b = self.boxes[number], self._box(uv)
        self.boxes[number] = (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))

    def _box(self, uv: np.ndarray) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 inside the frame, two pixels wide of the shape; empty if x1 <= x0 or y1 <= y0."""
        x, y, across, down = cv2.boundingRect(uv.astype(np.float32))
        w, h = self.camera.width_px, self.camera.height_px
        return (
            min(max(x - 2, 0), w),
            min(max(y - 2, 0), h),
            min(max(x + across + 3, 0), w),
            min(max(y + down + 3, 0), h),
        )

    def fill(self, points: np.ndarray, colour: Sequence[float], number: int = 0) -> None:
        """Paint one polygon of `fixed` points; into the map too if `number` is given."""
        cv2.fillPoly(self.image, [points], colour, cv2.LINE_AA, SHIFT)
        if number:
            cv2.fillPoly(self.objects, [points], number, cv2.LINE_8, SHIFT)

    def polygon(self, points_N3: np.ndarray, colour: Sequence[float], number: int = 0) -> None:
        """Paint one polygon given in metres, cut at the near plane."""
        uv = self.camera.outline(points_N3)
        if len(uv) >= 3:
            self.fill(fixed(uv), colour, number)

    def rods(
        self,
        uv: np.ndarray,
        radius_px: np.ndarray,
        colours_N3: np.ndarray,
        order: Sequence[int],
        number: int,
    ) -> None:
        """Paint rounded rods in this order. uv [2N, 2] and radii [2N]: all first ends, then all second.

        A narrower, brighter rod towards the sun rounds the thick ones.
        """
        n = len(uv) // 2
        along = uv[n:] - uv[:n]
        along /= np.sqrt((along * along).sum(axis=1))[:, None] + 1e-9
        across = along[:, ::-1] * (-1.0, 1.0)
        ring = along[:, None] * _CAP[:, :1] + across[:, None] * _CAP[:, 1:]
        radius = np.repeat(radius_px.reshape(2, n).T, 5, axis=1)[..., None]
        middle = np.repeat(uv.reshape(2, n, 2).transpose(1, 0, 2), 5, axis=1)
        shapes = fixed(middle + radius * ring)
        rounded = float(radius_px.max()) > 1.5
        if rounded:
            shift = (0.35 * (1.0 if self.light.sun[0] > 0 else -1.0), -0.2)
            gloss = fixed(middle + radius * (0.5 * ring + shift))
        body, bright = (0.85 * colours_N3).tolist(), np.minimum(1.12 * colours_N3, 255).tolist()
        for i in order:
            cv2.fillPoly(self.image, [shapes[i]], body[i], cv2.LINE_AA, SHIFT)
            cv2.fillPoly(self.objects, [shapes[i]], number, cv2.LINE_8, SHIFT)
            if rounded and radius_px[i] > 1.5:
                cv2.fillPoly(self.image, [gloss[i]], bright[i], cv2.LINE_AA, SHIFT)

    def pasted(self, corners_43: np.ndarray, mips: Sequence[np.ndarray], palette: np.ndarray, label: int) -> int:
        """Paint a tile onto a rectangle in the world: bottom left, bottom right, top right, top left.

        mips: the tile's material weights as in textures.py.
        palette: RGB columns. [3, 4] for a tile of four materials; [3, 3] for one with opacity (the
        object map takes the whole rectangle, holes and all, as hand-made labels of fences do).
        Returns the object's number, 0 if out of view.
        """
        left, right = _ahead(self.camera, corners_43)
        if right <= left:
            return 0
        corners = corners_43
        if (left, right) != (0.0, 1.0):
            ends = ((left, 0), (right, 0), (right, 1), (left, 1))
            corners = np.stack([_between(corners_43, t, side) for t, side in ends])
        uv, depth = self.camera.project(corners)
        box = self._box(uv)
        if box[2] <= box[0] or box[3] <= box[1]:
            return 0
        number = self.begin(label, uv, float(depth[0]), _inverse_depth_plane(uv, depth))
        self._paste(uv, box, mips[_level(uv, mips[0].shape)], palette, (left, right), number)
        return number

    def _paste(
        self,
        uv: np.ndarray,
        box: tuple[int, int, int, int],
        tile: np.ndarray,
        palette: np.ndarray,
        part: tuple[float, float],
        number: int,
    ) -> None:
        x0, y0, x1, y1 = box
        h, w = tile.shape[:2]
        a, b = part[0] * (w - 1), part[1] * (w - 1)
        source = np.array([[a, h - 1], [b, h - 1], [b, 0], [a, 0]], np.float32)
        warp = cv2.getPerspectiveTransform(source, (uv - (x0, y0)).astype(np.float32))
        points = fixed(uv)
        size = (x1 - x0, y1 - y0)
        roi = self.image[y0:y1, x0:x1]
        if palette.shape[1] == 4:
            # The fourth material has what the stored three leave over of 255.
            rest = palette[:, 3:]
            coloured = cv2.transform(tile, np.hstack([palette[:, :3] - rest, 255 * rest]))
            # The tile covers the pixels whose centres lie inside; this smooths its edge.
            cv2.polylines(self.image, [points], True, cv2.mean(coloured)[:3], 1, cv2.LINE_AA, SHIFT)
            cv2.warpPerspective(coloured, warp, size, dst=roi, borderMode=cv2.BORDER_TRANSPARENT)
        else:
            warped = cv2.warpPerspective(tile, warp, size)
            clear = cv2.cvtColor(255 - cv2.extractChannel(warped, 3), cv2.COLOR_GRAY2RGB)
            front = cv2.transform(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB), palette)
            roi[:] = cv2.add(cv2.multiply(roi, clear, scale=1 / 255), front)
        cv2.fillPoly(self.objects, [points], number, cv2.LINE_8, SHIFT)

    def sprite(
        self, x: float, y: float, w: float, h: float, mips: Sequence[np.ndarray], ramp: np.ndarray, number: int
    ) -> None:
        """Paint a cut-out (uint8 [s, s, 2]: brightness, opacity) at left x, top y, w x h px.

        ramp: uint8 [256, 1, 3], the RGB of each brightness. Opacity is cut at one half, in both maps.
        """
        x0, y0 = round(x), round(y)
        w_px, h_px = max(2, round(w)), max(2, round(h))
        cut = (max(x0, 0), max(y0, 0), min(x0 + w_px, self.camera.width_px), min(y0 + h_px, self.camera.height_px))
        if cut[2] <= cut[0] or cut[3] <= cut[1]:
            return
        level = 0
        while level + 1 < len(mips) and mips[level].shape[0] > 1.6 * max(w_px, h_px):
            level += 1
        tile = mips[level]
        scale = np.array([[w_px / tile.shape[1], 0, x0 - cut[0]], [0, h_px / tile.shape[0], y0 - cut[1]]])
        part = cv2.warpAffine(tile, scale, (cut[2] - cut[0], cut[3] - cut[1]), flags=cv2.INTER_LINEAR)
        mask = cv2.threshold(cv2.extractChannel(part, 1), 127, 255, cv2.THRESH_BINARY)[1]
        here = np.s_[cut[1] : cut[3], cut[0] : cut[2]]
        cv2.copyTo(cv2.applyColorMap(cv2.extractChannel(part, 0), ramp), mask, self.image[here])
        cv2.copyTo(np.full(mask.shape, number, np.uint16), mask, self.objects[here])


def fixed(uv: np.ndarray) -> np.ndarray:
    """Pixels to OpenCV's fixed point, int32. They may lie outside the frame, by up to 10^7."""
    return (uv * (1 << SHIFT)).astype(np.int32)


def _ahead(camera: Camera, corners_43: np.ndarray) -> tuple[float, float]:
    """The part of a rectangle's width, 0..1, that lies in front of the near plane."""
    depth = ((corners_43 - camera.position) @ camera.matrix[2]).tolist()
    a, b = min(depth[0], depth[3]) - NEAR_M, min(depth[1], depth[2]) - NEAR_M
    if a >= 0 and b >= 0:
        return 0.0, 1.0
    if a < 0 and b < 0:
        return 1.0, 0.0
    t = a / (a - b)
    return (t, 1.0) if a < 0 else (0.0, t)


def _between(corners_43: np.ndarray, t: float, top: int) -> np.ndarray:
    a, b = (corners_43[3], corners_43[2]) if top else (corners_43[0], corners_43[1])
    return a + t * (b - a)


def _inverse_depth_plane(uv: np.ndarray, depth: np.ndarray) -> tuple[float, float, float] | None:
    """1 / depth over a plane is affine in the pixel; None where the plane is seen edge on."""
    (u0, v0), (u1, v1), (u2, v2) = uv[:3].tolist()
    d0, d1, d2 = (1 / depth[:3]).tolist()
    det = (u1 - u0) * (v2 - v0) - (u2 - u0) * (v1 - v0)
    if abs(det) < 1.0:
        return None
    b = ((d1 - d0) * (v2 - v0) - (d2 - d0) * (v1 - v0)) / det
    c = ((u1 - u0) * (d2 - d0) - (u2 - u0) * (d1 - d0)) / det
    return d0 - b * u0 - c * v0, b, c


def _level(uv: np.ndarray, shape: tuple[int, ...]) -> int:
    """The mip whose texels are about as large as pixels; a foreshortened side counts half."""
    (u0, v0), (u1, v1), (u2, v2), (u3, v3) = uv.tolist()
    height = max(abs(v3 - v0), abs(v2 - v1), 1.0)
    width = max(abs(u1 - u0), abs(u2 - u3), 1.0)
    ratio = max(shape[0] / height, 0.5 * shape[1] / width, 1.0)
    return min(int(math.log2(ratio) + 0.4), 4)
