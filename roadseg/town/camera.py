"""The pinhole camera of a scene: meters to pixels and, on the ground plane, back.

World: x right, y up, z forward, in metres; the ground is y = 0. Pixels: u right, v down, the
center of the first pixel at (0, 0), as in OpenCV. `depth` is the distance along the optical axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np

NEAR_M = 0.5
FAR_PX = 1e5  # far outside any frame, but within OpenCV's number range


@dataclass(frozen=True)
class Camera:
    """`matrix` [3, 3] maps (world point - position) to homogeneous pixels; the last component is depth."""

    width_px: int
    height_px: int
    focal_px: float
    position: np.ndarray
    matrix: np.ndarray

    def project(self, points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [N, 2] and depths [N]. Points nearer than NEAR_M give meaningless pixels."""
        q = points_N3 @ self._matrix_T - self._origin
        depth = q[:, 2]
        return q[:, :2] / np.maximum(q[:, 2:], 1e-3), depth

    def outline(self, polygon_N3: np.ndarray) -> np.ndarray:
        """A planar polygon's pixels [M, 2], cut at the near plane; M is 0 when all of it is behind."""
        q = polygon_N3 @ self._matrix_T - self._origin
        ahead = q[:, 2] >= NEAR_M
        if not ahead.all():
            q = _cut(q, ahead)
        return np.clip(q[:, :2] / q[:, 2:], -FAR_PX, FAR_PX)

    @cached_property
    def _matrix_T(self) -> np.ndarray:
        return np.ascontiguousarray(self.matrix.T)

    @cached_property
    def _origin(self) -> np.ndarray:
        return self.matrix @ self.position

    @cached_property
    def ground_to_pixel(self) -> np.ndarray:
        """[3, 3]: (x, z, 1) on the ground to homogeneous pixels."""
        return np.column_stack([self.matrix[:, 0], self.matrix[:, 2], -self.matrix @ self.position])

    @cached_property
    def pixel_to_ground(self) -> np.ndarray:
        """[3, 3]: (u, v, 1) to (x, z, 1) / depth; so its last row gives 1 / depth, affine in the pixel."""
        return np.linalg.inv(self.ground_to_pixel)

    @cached_property
    def horizon_px(self) -> tuple[float, float]:
        """v of the horizon at the left and at the right edge of the frame."""
        a, b, c = self.pixel_to_ground[2]
        return -c / b, -(c + a * (self.width_px - 1)) / b


def _cut(q: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """A polygon's homogeneous points [N, 3], with those behind the near plane cut off."""
    before = np.roll(q, 1, axis=0)
    crossed = np.flatnonzero(ahead != np.roll(ahead, 1))
    p, r = before[crossed], q[crossed]
    t = (NEAR_M - p[:, 2]) / (r[:, 2] - p[:, 2])
    kept = np.flatnonzero(ahead)
    points = np.concatenate([p + t[:, None] * (r - p), q[kept]])
    return points[np.argsort(np.concatenate([2 * crossed, 2 * kept + 1]))]


def draw_camera(rng: Random, width_px: int, height_px: int, right_m: float) -> Camera:
    """A camera on a vehicle at x = right_m, z = 0; height, direction, roll and focal length vary."""
    height = rng.uniform(1.2, 2.1) if rng.random() < 0.8 else rng.uniform(2.1, 3.0)
    # The focal length depends on the area, so that aspect ratios other than 2:1 still show a street.
    focal = rng.uniform(0.78, 1.15) * math.sqrt(2 * width_px * height_px)
    yaw, pitch, roll = rng.gauss(0, 0.05), rng.gauss(0.03, 0.045), rng.gauss(0, 0.012)
    pitch = min(max(pitch, -0.06), 0.13)
    sy, cy, sp, cp, sr, cr = (f(a) for a in (yaw, pitch, roll) for f in (math.sin, math.cos))
    turn = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    lean = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    lens = np.array([[focal, 0, (width_px - 1) / 2], [0, -focal, (height_px - 1) / 2], [0, 0, 1]])
    return Camera(width_px, height_px, focal, np.array([right_m, height, 0.0]), lens @ lean @ nod @ turn)
