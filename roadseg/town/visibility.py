"""Cull invisible items: half of a street is hidden behind its nearest vehicles and houses.

Only items that are certainly outside the frame or certainly covered are dropped, so the frame is unchanged.
"""

from __future__ import annotations

from itertools import product
from random import Random

import cv2
import numpy as np

from roadseg.town import frontage, vehicles
from roadseg.town.camera import Camera
from roadseg.town.mesh import Box
from roadseg.town.scene import Item, Scene
from roadseg.town.street import Street

# Upper bounds in meters: height, and how far the drawing may extend beyond the base.
_REACH = {
    "wall": (3.8, 0.5), "fence": (2.8, 0.5), "hedge": (2.8, 1.2), "car": (2.4, 0.5), "truck": (4.1, 0.8),
    "bus": (5.0, 0.5), "train": (5.2, 1.2), "pole": (9.2, 3.4), "light": (7.5, 5.6), "sign": (6.0, 1.8),
    "bollard": (1.3, 8.0),
}  # fmt: skip
_CELL_PX = 4


def visible(camera: Camera, scene: Scene) -> list[Item]:
    """The scene's items that may be visible, far to near."""
    covered = np.zeros((-(-camera.height_px // _CELL_PX), -(-camera.width_px // _CELL_PX)), np.uint8)
    bounds = _bounds(camera, scene)
    shown = []
    for item, (x0, y0, x1, y1) in zip(scene.items[::-1], bounds[::-1], strict=True):
        if x1 <= x0 or y1 <= y0 or covered[y0:y1, x0:x1].min():
            continue
        shown.append(item)
        box = _core(item)
        if box is not None:
            _cover(camera, scene.street, item, box, covered)
    return shown[::-1]


def _bounds(camera: Camera, scene: Scene) -> list[tuple[int, int, int, int]]:
    """Cells x0, y0, x1, y1 that each item may touch; all cells if it begins next to the camera."""
    extents = np.array([i.extent for i in scene.items])
    reach = np.array([_reach(i) for i in scene.items])
    x0, x1, z0, z1 = extents.T + reach[:, 1] * np.array([[-1], [1], [-1], [1]])
    corners = np.array([(x, y, z) for x, z in product((x0, x1), (z0, z1)) for y in (0 * x0 - 0.2, reach[:, 0])])
    corners = corners.transpose(2, 0, 1).reshape(-1, 3)  # item by item, eight each
    corners[:, 0] += 0.5 * scene.street.curve_per_m * corners[:, 2] ** 2
    uv, depth = camera.project(corners)
    uv, depth = uv.reshape(-1, 8, 2), depth.reshape(-1, 8)
    low, high = uv.min(axis=1) - 3, uv.max(axis=1) + 4
    beside = depth.min(axis=1) < 0.6
    low[beside], high[beside] = 0, 1e6
    low[depth.max(axis=1) < 0.6] = 2e6
    size = np.array([camera.width_px, camera.height_px])
    low, high = np.clip(low, 0, size), np.clip(high, 0, size)
    cells = np.concatenate([low // _CELL_PX, -(-high // _CELL_PX)], axis=1).astype(int)
    return [tuple(c) for c in cells.tolist()]


def _reach(item: Item) -> tuple[float, float]:
    if item.kind == "building":
        return frontage.draw_facade(Random(item.seed))[1] + 4.3, 0.6
    if item.kind in ("tree", "bush"):
        _, size, stem = frontage.draw_tree(item.kind == "bush", Random(item.seed))
        return stem + 1.1 * size, 0.75 * size
    return _REACH.get(item.kind, (2.6, 1.3))


def _core(item: Item) -> Box | None:
    """A box, relative to the item's position, that is certainly inside the painted shape."""
    far = item.far_m - item.along_m
    if item.kind in ("truck", "bus", "train"):
        core = vehicles.draw_mesh(item.kind, Random(item.seed)).core
        if core is None:
            return None
        (xa, xb), (ya, yb), (za, zb) = core
        shrink = vehicles.SMALLEST
        return (xa * shrink, xb * shrink), (1.1 * ya, yb * shrink), (za * shrink, zb * shrink)
    if item.kind == "building":
        return (0.0, item.side * 7.5), (0.0, frontage.draw_facade(Random(item.seed))[1]), (0.0, far)
    if item.kind in ("wall", "hedge"):
        return (0.0, item.side * 0.3), (0.0, 1.6 if item.kind == "wall" else 0.95), (0.0, far)
    return None


def _cover(camera: Camera, street: Street, item: Item, box: Box, covered: np.ndarray) -> None:
    """Mark the cells that are completely inside the box's silhouette."""
    corners = np.array(list(product(*box)), float)
    if item.kind in vehicles.LABELS:
        yaw = item.yaw + street.heading(item.along_m)
        s, c = np.sin(yaw), np.cos(yaw)
        corners = corners @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) + street.at(item.lateral_m, item.along_m)
    else:
        corners += (item.lateral_m, 0.0, item.along_m)
        corners[:, 2] = np.maximum(corners[:, 2], 1.5)
        corners[:, 0] += 0.5 * street.curve_per_m * corners[:, 2] ** 2
    uv, depth = camera.project(corners)
    if depth.min() < 0.6:
        return
    hull = cv2.convexHull((uv / _CELL_PX).astype(np.float32))
    cells = np.zeros_like(covered)
    cv2.fillConvexPoly(cells, np.clip(hull * 16, -1e6, 1e6).astype(np.int32), 1, cv2.LINE_8, 4)
    # Outside the frame counts as covered, so that erosion affects only the silhouette.
    covered |= cv2.erode(cells, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1)
