"""Paint the ground plane: road, sidewalks, terrain, markings, texture and shadows."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np

from roadseg.town import textures
from roadseg.town.canvas import SKY_NUMBER, Canvas, fixed
from roadseg.town.colours import RGB, hsv, mineral, scaled, soil
from roadseg.town.scene import Scene
from roadseg.town.street import Street

ROAD, SIDEWALK, TERRAIN = 7, 8, 22
_ALONG = np.concatenate([np.arange(1.0, 12.0, 1.5), np.geomspace(12.0, 260.0, 18)])
_WIDE_M = 500.0


def paint_ground(canvas: Canvas, scene: Scene, rng: Random) -> None:
    street = scene.street
    up = canvas.light.shade(np.array([[0.0, 1.0, 0.0]]))[0]
    road, walk, land = ((c[0] * up[0], c[1] * up[1], c[2] * up[2]) for c in (mineral(rng), mineral(rng), soil(rng)))
    pavers = rng.random() < 0.5
    for side in street.sides:
        base = (TERRAIN, land) if side.green else (SIDEWALK, walk)
        _strip(canvas, street, side.edge_m, side.sign * _WIDE_M, base[1], base[0])
        if side.verge_m:
            _strip(canvas, street, side.edge_m, side.walk_start_m, land, TERRAIN)
        if side.green or side.verge_m:
            _strip(canvas, street, side.walk_start_m, side.walk_end_m, walk, SIDEWALK)
        kerb = scaled(walk, rng.uniform(1.05, 1.35))
        _strip(canvas, street, side.edge_m, side.edge_m + side.sign * 0.2, kerb, SIDEWALK)
    _paint_road(canvas, scene, rng, road, walk)
    _texture(canvas, pavers, rng)


def _strip(canvas: Canvas, street: Street, a_m: float, b_m: float, colour: RGB, label: int = 0) -> int:
    """A band between two lateral places, all along the street; an object of its own if labelled."""
    points = np.concatenate([street.line(a_m, _ALONG), street.line(b_m, _ALONG)[::-1]])
    return _area(canvas, points, colour, label)


def _area(canvas: Canvas, points: np.ndarray, colour: RGB, label: int = 0) -> int:
    uv = canvas.camera.outline(points)
    if len(uv) < 3:
        return 0
    a, b, c = canvas.camera.pixel_to_ground[2].tolist()
    number = canvas.begin(label, uv, 1.0, (c, a, b)) if label else 0
    canvas.fill(fixed(uv), colour, number)
    return number


def _paint_road(canvas: Canvas, scene: Scene, rng: Random, road: RGB, walk: RGB) -> None:
    street = scene.street
    if street.crossing:
        near, far = street.crossing
        x = street.at(0, (near + far) / 2)[0]
        corners = [(x - _WIDE_M, near), (x + _WIDE_M, near), (x + _WIDE_M, far), (x - _WIDE_M, far)]
        for grow, colour, label in ((1.8, walk, SIDEWALK), (0.0, road, ROAD)):
            shifted = [(a, 0.0, b + (grow if b == far else -grow)) for a, b in corners]
            _area(canvas, np.array(shifted), colour, label)
    _strip(canvas, street, street.left.edge_m, street.right.edge_m, road, ROAD)
    _wear(canvas, street, rng, road)
    paint = np.array(hsv(rng.choice((0.0, 0.13)), rng.choice((0.0, 0.0, 0.5)), rng.uniform(0.7, 0.95)))
    light = canvas.light.shade(np.array([[0.0, 1.0, 0.0]]))[0]
    _markings(canvas, street, rng, tuple((paint * light).tolist()))
    for centre in scene.rails:
        _strip(canvas, street, centre - 1.1, centre + 1.1, scaled(road, rng.uniform(0.85, 1.2)))
        for x in (centre - 0.75, centre + 0.75):
            _strip(canvas, street, x - 0.13, x + 0.13, scaled(road, 0.35))
            _strip(canvas, street, x - 0.05, x + 0.05, scaled(road, 1.7))


def _wear(canvas: Canvas, street: Street, rng: Random, road: RGB) -> None:
    """Patches, tyre tracks, manholes and cracks: the road's own, so only in the picture."""
    left, right = street.left.edge_m, street.right.edge_m
    for lane in street.lanes:
        for x in (-0.75, 0.75):
            _strip(canvas, street, lane.centre_m + x - 0.25, lane.centre_m + x + 0.25, scaled(road, 0.93))
    for _ in range(rng.randrange(5)):
        x, z, w, d = rng.uniform(left + 0.5, right - 2.5), rng.uniform(4, 30), rng.uniform(0.6, 2), rng.uniform(1, 6)
        patch = np.array([street.at(x + i * w, z + j * d) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))])
        _area(canvas, patch, scaled(road, rng.uniform(0.72, 1.2)))
    turn = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    for _ in range(rng.randrange(4)):
        centre = street.at(rng.uniform(left + 1, right - 1), rng.uniform(4, 25))
        for radius, tone in ((0.42, 0.45), (0.34, 0.75)):
            ring = centre + radius * np.column_stack([np.cos(turn), np.zeros(14), np.sin(turn)])
            _area(canvas, ring, scaled(road, tone))
    for _ in range(rng.randrange(5)):
        x, z = rng.uniform(left, right), rng.uniform(3, 20)
        places = []
        for _ in range(8):
            x, z = x + rng.gauss(0, 0.35), z + rng.uniform(0.2, 0.7)
            places.append((x, z))
        there = [street.at(a, b) for a, b in places]
        back = [street.at(a + rng.uniform(0.02, 0.07), b) for a, b in places][::-1]
        _area(canvas, np.array(there + back), scaled(road, 0.5))


def _markings(canvas: Canvas, street: Street, rng: Random, paint: RGB) -> None:
    half = rng.uniform(0.06, 0.1)
    edges = sorted({round(lane.centre_m + s * street.lane_m / 2, 3) for lane in street.lanes for s in (-1, 1)})
    dash, gap = rng.choice(((3.0, 4.0), (4.0, 2.5), (6.0, 9.0)))
    outer = rng.random() < 0.6
    solid_middle = rng.random() < 0.3
    start = rng.uniform(0, 7) - 3
    for k, x in enumerate(edges):
        if k in (0, len(edges) - 1):
            if outer:
                _strip(canvas, street, x - half, x + half, paint)
        elif solid_middle:
            _strip(canvas, street, x - half, x + half, paint)
        else:
            for z in np.arange(start, 110, dash + gap):
                if not street.crossing or z + dash < street.crossing[0] - 4 or z > street.crossing[1]:
                    _bar(canvas, street, x - half, x + half, float(z), float(z) + dash, paint)
    if street.crossing and rng.random() < 0.8:
        z = street.crossing[0] - 1.0
        for x in np.arange(street.left.edge_m + 0.4, street.right.edge_m - 0.4, 1.0):
            _bar(canvas, street, float(x), float(x) + 0.5, z - 3.2, z - 0.4, paint)
        _bar(canvas, street, -street.lane_m / 2, street.lane_m / 2, z - 4.6, z - 4.2, paint)
    elif rng.random() < 0.35:
        z = rng.uniform(6, 14)
        tip = ((-0.08, 0), (0.08, 0), (0.08, 2.2), (0.35, 2.2), (0, 3.6), (-0.35, 2.2), (-0.08, 2.2))
        _area(canvas, np.array([street.at(a, z + b) for a, b in tip]), paint)


def _bar(canvas: Canvas, street: Street, x0: float, x1: float, z0: float, z1: float, colour: RGB) -> None:
    if z1 > 0.6:
        z0 = max(z0, 0.6)
        _area(canvas, np.array([street.at(x0, z0), street.at(x1, z0), street.at(x1, z1), street.at(x0, z1)]), colour)


def _texture(canvas: Canvas, pavers: bool, rng: Random) -> None:
    """Modulate what is painted of the ground by tiles in world coordinates, fading where they would alias."""
    camera = canvas.camera
    h, w = canvas.objects.shape
    top = int(min(max(min(camera.horizon_px), 0), h - 1))
    g = camera.pixel_to_ground.astype(np.float32)
    u = np.arange(w, dtype=np.float32)[None, :]
    v = np.arange(top, h, dtype=np.float32)[:, None]
    scale = np.float32(textures.GROUND_PX_PER_M)
    depth = scale / np.maximum(g[2, 0] * u + (g[2, 1] * v + g[2, 2]), np.float32(1 / 150))
    x = (g[0, 0] * u + (g[0, 1] * v + g[0, 2])) * depth + np.float32(rng.uniform(100, 120) * scale)
    z = (g[1, 0] * u + (g[1, 1] * v + g[1, 2])) * depth + np.float32(rng.uniform(100, 120) * scale)
    # The tiles of road, sidewalk and terrain lie one below the other; the label picks which.
    part = canvas.objects[top:]
    starts = {SIDEWALK: 1.0, TERRAIN: 2.0}
    start = np.take(np.array([starts.get(n, 0.0) for n in canvas.labels], np.float32), part)
    tile, size = textures.ground(pavers), np.float32(textures.GROUND_PX)
    # Wrapped here: OpenCV is slow where most pixels lie outside.
    places = (x - np.floor(x / size) * size, z - np.floor(z / size) * size + start * size)
    grain = cv2.remap(tile, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    small = (x[::4, ::4] / 12, z[::4, ::4] / 12)
    stains = cv2.remap(textures.patches(), *small, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    stains = cv2.resize(stains, (w, h - top))
    if camera.focal_px > 700:
        # Large frames see the near ground larger than the tile's texels: its grain once more, finer.
        fine = cv2.remap(tile[: textures.GROUND_PX], x * 6, z * 6, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        grain = cv2.addWeighted(grain, 1.0, fine, 0.6, -0.6 * 128)
    # A pixel covers depth^2 / (focal * height) metres of ground along the view; roll is left out.
    row = depth[:, w // 2 : w // 2 + 1] / scale
    strength = 1 / (1 + row * row / np.float32(camera.focal_px * float(camera.position[1]) * 0.12))
    factor = (grain.astype(np.float32) - 128) * strength + stains * np.float32(0.3) + np.float32(128 * 0.7)
    factor = np.clip(factor, 0, 255).astype(np.uint8)
    factor[part <= SKY_NUMBER] = 128
    part_rgb = canvas.image[top:]
    part_rgb[:] = cv2.multiply(part_rgb, cv2.cvtColor(factor, cv2.COLOR_GRAY2RGB), scale=1 / 128)


def shadow_outline(canvas: Canvas, base_N3: np.ndarray, height_m: float) -> np.ndarray | None:
    """Pixels [M, 2] of the shadow of an upright body on this base; None if it reaches behind the camera."""
    light = canvas.light
    throw = min(height_m / max(float(light.sun[1]), 0.2), 14.0)
    moved = base_N3 - throw * light.sun * np.array([1.0, 0.0, 1.0])
    uv, depth = canvas.camera.project(np.concatenate([base_N3, moved]))
    if depth.min() < 0.8:
        return None
    return cv2.convexHull(uv.astype(np.float32))[:, 0]


def paint_shadows(canvas: Canvas, bodies: list[tuple[np.ndarray, float]]) -> None:
    """Darken the ground under and beside bodies, each a base polygon [N, 3] in metres and a height."""
    lit = np.full(canvas.image.shape[:2], 255, np.uint8)
    light = canvas.light
    if light.shadow < 0.85:
        for base, height in bodies:
            uv = shadow_outline(canvas, base, height)
            if uv is not None:
                cv2.fillConvexPoly(lit, fixed(uv), 255 * light.shadow, cv2.LINE_AA, 4)
    for base, height in bodies:
        if height < 4.5:
            uv, depth = canvas.camera.project(base)
            if depth.min() > 0.8:
                cv2.fillPoly(lit, [fixed(uv)], 255 * light.shadow * 0.5, cv2.LINE_AA, 4)
    size = max(3, canvas.camera.width_px // 128) | 1
    soft = cv2.cvtColor(cv2.blur(lit, (size, size)), cv2.COLOR_GRAY2RGB)
    cv2.multiply(canvas.image, soft, dst=canvas.image, scale=1 / 255)


def night_ground(canvas: Canvas, lamps_N3: np.ndarray) -> None:
    """Pools of light under street lamps and before the camera's own headlights, on bare ground."""
    camera = canvas.camera
    pool = np.zeros(canvas.image.shape[:2], np.float32)
    for lamp in lamps_N3:
        uv, depth = camera.project(lamp[None] * np.array([1.0, 0.0, 1.0]))
        if depth[0] > 2:
            r = camera.focal_px * 5 / depth[0]
            axes = (int(min(r, 4000)), max(1, int(min(r * camera.position[1] / depth[0], 4000))))
            centre = (int(np.clip(uv[0, 0], -9999, 9999)), int(np.clip(uv[0, 1], -9999, 9999)))
            cv2.ellipse(pool, centre, axes, 0, 0, 360, 1.2, cv2.FILLED)
    beam = np.array([[-1.2, 0, 2.5], [1.2, 0, 2.5], [4.5, 0, 28], [-4.5, 0, 28]])
    uv = camera.outline(beam)
    if len(uv) >= 3:
        cv2.fillPoly(pool, [fixed(uv)], 1.8, cv2.LINE_8, 4)
    sigma = camera.width_px / 45
    small = cv2.resize(pool, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    pool[:] = cv2.resize(cv2.GaussianBlur(small, (0, 0), sigma / 4), (camera.width_px, camera.height_px))
    pool[canvas.objects <= SKY_NUMBER] = 0
    canvas.image[:] = cv2.multiply(canvas.image, cv2.merge([1 + pool] * 3), dtype=cv2.CV_8U)


def footprint(street: Street, lateral: float, along: float, yaw: float, half_w: float, half_l: float) -> np.ndarray:
    """float64 [4, 3]: the base rectangle of a thing at this place."""
    s, c = np.sin(yaw), np.cos(yaw)
    centre = street.at(lateral, along)
    ends = ((-half_w, -half_l), (half_w, -half_l), (half_w, half_l), (-half_w, half_l))
    return np.array([centre + (a * c + b * s, 0.0, b * c - a * s) for a, b in ends])
