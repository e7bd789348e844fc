"""Paint what lines the street: buildings, walls, fences, hedges, trees, and the skyline."""

from __future__ import annotations

from random import Random

import numpy as np

from roadseg.town import textures
from roadseg.town.canvas import Canvas, fixed
from roadseg.town.colours import RGB, dark, hsv, masonry, painted, plant, scaled
from roadseg.town.roadside import paint_rods
from roadseg.town.scene import Item
from roadseg.town.street import Street

_FIRS = (10, 11, 12)
BUILDING, WALL, FENCE, VEGETATION = 11, 12, 13, 21


def _rectangle(a: np.ndarray, b: np.ndarray, height_m: float) -> np.ndarray:
    """float64 [4, 3]: bottom left, bottom right, top right, top left of an upright plane from a to b."""
    up = np.array([0.0, height_m, 0.0])
    return np.stack([a, b, b + up, a + up])


def _shaded(canvas: Canvas, colours: list[RGB], normal: tuple[float, float, float]) -> np.ndarray:
    """float32 [3, len(colours)], a palette in the light that falls on this side."""
    light = canvas.light.shade(np.array([normal], float))[0]
    return (np.array(colours) * light).T.astype(np.float32) / 255


def draw_facade(rng: Random) -> tuple[tuple[np.ndarray, ...], float]:
    """The tile of a building's front, and its height in metres."""
    floors, _, mips = textures.facades()[rng.randrange(24)]
    return mips, floors * rng.uniform(2.9, 3.7)


def paint_building(canvas: Canvas, street: Street, item: Item, rng: Random) -> None:
    """Front along the street, the gable towards the camera, and a roof."""
    mips, height = draw_facade(rng)
    depth = rng.uniform(8, 14)
    wall, trim, glass = masonry(rng), painted(rng), hsv(0.58, rng.uniform(0.05, 0.35), rng.uniform(0.1, 0.5))
    curtain = painted(rng) if rng.random() < 0.5 else scaled(glass, rng.uniform(0.8, 1.8))
    gable_tile = (
        textures.facades()[rng.randrange(24)][2] if rng.random() < 0.5 else textures.walls()[1 + rng.randrange(2)]
    )
    roof, rise, style = painted(rng) if rng.random() < 0.4 else masonry(rng), rng.uniform(1.5, 4.0), rng.random()
    glow = rng.uniform(0.3, 0.9)
    out = item.lateral_m + item.side * depth
    near, far = street.at(item.lateral_m, item.along_m), street.at(item.lateral_m, item.far_m)
    back = street.at(out, item.along_m)
    materials = [wall, glass, curtain, trim]
    if style < 0.6:
        _roof(canvas, (near, far, back, street.at(out, item.far_m)), height, rise, roof, item.side)
    front = _shaded(canvas, materials, (-item.side, 0, 0))
    end = _shaded(canvas, materials, (0, 0, -1))
    if canvas.light.night:
        front[:, 2] = np.array([1.0, 0.8, 0.5]) * glow
        end[:, 2] = 0.8 * front[:, 2]
    canvas.pasted(_rectangle(near, back, height), gable_tile, end, BUILDING)
    canvas.pasted(_rectangle(near, far, height), mips, front, BUILDING)
    if style < 0.6:
        gable = np.stack([near, back, (near + back) / 2]) + np.array(
            [[0, height, 0], [0, height, 0], [0, height + rise, 0]]
        )
        _face(canvas, gable, scaled(_lit(canvas, wall, (0, 0, -1)), 0.9))
    elif style < 0.8:
        top = height + rng.uniform(0.5, 1.2)
        _face(
            canvas,
            _rectangle(near + (0, height, 0), far + (0, height, 0), top - height),
            _lit(canvas, trim, (-item.side, 0, 0)),
        )


def _lit(canvas: Canvas, colour: RGB, normal: tuple[float, float, float]) -> RGB:
    r, g, b = np.minimum(np.array(colour) * canvas.light.shade(np.array([normal], float))[0], 255).tolist()
    return r, g, b


def _face(canvas: Canvas, points: np.ndarray, colour: RGB, label: int = BUILDING) -> None:
    uv = canvas.camera.outline(points)
    if len(uv) >= 3:
        depth = float((points @ np.array([0.0, 0.0, 1.0])).mean())
        canvas.fill(fixed(uv), colour, canvas.begin(label, uv, depth))


def _roof(canvas: Canvas, corners: tuple[np.ndarray, ...], height: float, rise: float, colour: RGB, side: int) -> None:
    near, far, back, far_back = corners
    up, ridge = np.array([0.0, height, 0.0]), np.array([0.0, height + rise, 0.0])
    slope = np.stack([near + up, far + up, (far + far_back) / 2 + ridge, (near + back) / 2 + ridge])
    rgb = _lit(canvas, colour, (-0.6 * side, 0.8, 0))
    _face(canvas, slope, rgb)
    for k in range(1, 5 if near[2] < 30 else 1):
        a, b = (1 - k / 5) * slope[0] + k / 5 * slope[3], (1 - k / 5) * slope[1] + k / 5 * slope[2]
        canvas.polygon(np.stack([a, b, b + (0, 0.12, 0), a + (0, 0.12, 0)]), scaled(rgb, 0.8))


def paint_wall(canvas: Canvas, street: Street, item: Item, rng: Random) -> None:
    tile = textures.walls()[rng.randrange(8)]
    height = rng.uniform(1.7, 3.6)
    materials = [masonry(rng), dark(rng), painted(rng), masonry(rng)]
    a, b = street.at(item.lateral_m, item.along_m), street.at(item.lateral_m, item.far_m)
    thick = street.at(item.lateral_m + item.side * 0.35, item.along_m)
    canvas.pasted(_rectangle(a, thick, height), tile, _shaded(canvas, materials, (0, 0, -1)), WALL)
    canvas.pasted(_rectangle(a, b, height), tile, _shaded(canvas, materials, (-item.side, 0, 0)), WALL)


def paint_fence(canvas: Canvas, street: Street, item: Item, rng: Random) -> None:
    fences = textures.fences()
    tile = fences[rng.randrange(len(fences))]
    height = rng.uniform(1.5, 2.7)
    slats = painted(rng)
    materials = [slats, scaled(slats, rng.uniform(0.6, 1.2)), slats]
    a, b = street.at(item.lateral_m, item.along_m), street.at(item.lateral_m, item.far_m)
    canvas.pasted(_rectangle(a, b, height), tile, _shaded(canvas, materials, (-item.side, 0, 0)), FENCE)


def paint_hedge(canvas: Canvas, street: Street, item: Item, rng: Random) -> None:
    height, leaf = rng.uniform(1.0, 2.6), plant(rng)
    materials = [leaf, scaled(leaf, 0.15), leaf, leaf]
    a, b = street.at(item.lateral_m, item.along_m), street.at(item.lateral_m, item.far_m)
    thick = street.at(item.lateral_m + item.side * 1.0, item.along_m)
    canvas.pasted(_rectangle(a, thick, height), textures.foliage(), _shaded(canvas, materials, (0, 0, -1)), VEGETATION)
    canvas.pasted(
        _rectangle(a, b, height), textures.foliage(), _shaded(canvas, materials, (-item.side, 0, 0)), VEGETATION
    )


def draw_tree(bush: bool, rng: Random) -> tuple[int, float, float]:
    """Which crown, its size in metres, and the height it begins at."""
    if bush:
        return rng.choice((13, 14, 15)), rng.uniform(1.2, 2.4), 0.0
    kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 0, 3, 7, 8, 9, *_FIRS))
    return kind, rng.uniform(3.5, 6.5), rng.uniform(0.8, 1.4) if kind in _FIRS else rng.uniform(2.2, 3.6)


def paint_tree(canvas: Canvas, place: np.ndarray, bush: bool, rng: Random) -> None:
    """A trunk with one crown or two, or a bush; all of it vegetation."""
    kind, size, stem = draw_tree(bush, rng)
    fir = kind in _FIRS
    bark, leaf = dark(rng) if rng.random() < 0.4 else hsv(0.08, 0.3, rng.uniform(0.2, 0.5)), plant(rng)
    thick = rng.uniform(0.12, 0.28)
    middle = place + np.array([0.0, stem + 0.42 * size, 0.0])
    uv, depth = canvas.camera.project(middle[None])
    if depth[0] < 1.5:
        return
    px = size * canvas.camera.focal_px / float(depth[0])
    if bush:
        number = canvas.begin(VEGETATION, uv, float(depth[0]))
    else:
        trunk = [(place, place + (0, stem + 0.4 * size, 0), thick)]
        number = paint_rods(canvas, trunk, bark, VEGETATION) or canvas.begin(VEGETATION, uv, float(depth[0]))
    tone = np.linspace(0.25, 1.45, 256)[:, None] * np.array(leaf) * canvas.light.level
    ramp = np.clip(tone, 0, 255).astype(np.uint8)[:, None]
    u, v = uv[0].tolist()
    for k in range(1 if bush or fir else 1 + (rng.random() < 0.4)):
        wide, shift = px * (1.0 - 0.2 * k), 0.3 * px * k * rng.choice((-1, 1))
        corner = np.array([[u - wide / 2 + shift, v - wide / 2 + 0.1 * px * k]])
        canvas.grow(number, np.concatenate([corner, corner + wide]))
        canvas.sprite(corner[0, 0], corner[0, 1], wide, wide, textures.crowns()[kind], ramp, number)


def paint_skyline(canvas: Canvas, rng: Random) -> None:
    """Distant blocks and trees along the horizon; they also close the view."""
    camera = canvas.camera
    left, right = camera.horizon_px
    u, unit = -10.0, camera.focal_px / 100
    ground = np.array([camera.focal_px * camera.position[1] / 170] * 4)
    woods = rng.uniform(0.2, 0.8)
    while u < camera.width_px + 10:
        wide, tall = unit * rng.uniform(4, 14), unit * rng.uniform(1.5, 9)
        tree, colour, leaf = rng.random() < woods, masonry(rng), plant(rng)
        at = left + (right - left) * u / max(camera.width_px - 1, 1)
        if tree:
            t = np.linspace(0, np.pi, 9)
            bumps = np.array([rng.uniform(0.8, 1.15) for _ in t])
            top = np.column_stack([u + wide / 2 - 0.75 * wide * np.cos(t), at - 0.7 * tall * np.sin(t) ** 0.6 * bumps])
            uv = np.concatenate([[(u - 0.3 * wide, at + ground[0])], top, [(u + 1.3 * wide, at + ground[0])]])
        else:
            uv = np.array([(u, at), (u, at - tall), (u + wide, at - tall), (u + wide, at)])
            uv[[0, 3], 1] += ground[0]
        rgb = tuple((np.array(leaf if tree else colour) * canvas.light.level).tolist())
        number = canvas.begin(VEGETATION if tree else BUILDING, uv, 170.0)
        canvas.fill(fixed(uv), rgb, number)
        if not tree and tall > 4 * unit:
            for row in range(1, int(tall / unit)):
                y = at - tall + row * unit
                bar = np.array(
                    [
                        (u + 0.1 * wide, y),
                        (u + 0.9 * wide, y),
                        (u + 0.9 * wide, y + 0.4 * unit),
                        (u + 0.1 * wide, y + 0.4 * unit),
                    ]
                )
                canvas.fill(fixed(bar), scaled(rgb, 0.8))
        u += wide * rng.uniform(0.6, 1.0)
