"""Poles, lamps, traffic lights, signs and clutter beside the road."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np

from roadseg.town import mesh as m
from roadseg.town.canvas import Canvas, Lamp, fixed
from roadseg.town.colours import RGB, dark, mineral, painted
from roadseg.town.mesh import Mesh, Modeller, paint_mesh

STATIC, DYNAMIC, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN = 4, 5, 17, 19, 20


def paint_rods(canvas: Canvas, ends: list[tuple[np.ndarray, np.ndarray, float]], colour: RGB, label: int) -> int:
    """Straight rods (from, to, radius in metres) as one object. Returns its number, 0 if not in view."""
    points = np.array([e[0] for e in ends] + [e[1] for e in ends])
    uv, depth = canvas.camera.project(points)
    if depth.min() < 0.8:
        return 0
    n = len(ends)
    px = np.maximum(np.array([e[2] for e in ends] * 2) * canvas.camera.focal_px / depth, 0.35)
    number = canvas.begin(label, np.concatenate([uv - px[:, None], uv + px[:, None]]), float(depth[0]))
    canvas.rods(uv, px, np.tile(np.array(colour) * canvas.light.level, (n, 1)), range(n), number)
    return number


def paint_pole(canvas: Canvas, place: np.ndarray, side: int, rng: Random) -> None:
    """A street lamp, a mast with cross-arms, or a plain one."""
    up = np.array([0.0, 1.0, 0.0])
    height, radius = rng.uniform(5.0, 8.5), rng.uniform(0.09, 0.17)
    colour = mineral(rng) if rng.random() < 0.6 else painted(rng)
    top = place + height * up
    rods = [(place, top, radius), (place, place + 0.8 * up, 1.5 * radius)]
    kind = rng.random()
    if kind < 0.55:
        tip = top + np.array([-side * rng.uniform(1.2, 2.5), 0.3, 0.0])
        rods += [(top, tip, 0.6 * radius), (tip, tip - (0.5 * side, 0, 0), 0.16)]
        number = paint_rods(canvas, rods, colour, POLE)
        if canvas.light.night and number:
            uv, depth = canvas.camera.project(tip[None])
            reach = 1.3 * canvas.camera.focal_px / float(depth[0])
            canvas.lamps.append(Lamp(float(uv[0, 0]), float(uv[0, 1]), reach, (255.0, 205.0, 130.0), number))
        return
    if kind < 0.75:
        for drop in (0.3, 1.0):
            rods.append((top - (1.0, drop, 0), top - (-1.0, drop, 0), 0.6 * radius))
    paint_rods(canvas, rods, colour, POLE)


def paint_bollards(canvas: Canvas, place: np.ndarray, rng: Random) -> None:
    colour, radius = painted(rng), rng.uniform(0.08, 0.14)
    for k in range(rng.randrange(3, 6), -1, -1):
        foot = place + np.array([0.0, 0.0, 1.4 * k])
        paint_rods(canvas, [(foot, foot + (0, rng.uniform(0.8, 1.0), 0), radius)], colour, POLE)


@cache
def _light_meshes() -> tuple[Mesh, ...]:
    """Housings with three lamps, origin at their middle, facing -z; one for each lamp that is lit."""
    made = []
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for lit in range(3):
        b = Modeller()
        b.box((-0.3, 0.3), (-0.75, 0.75), (0.02, 0.06), m.SECOND)
        b.group = 1
        b.box((-0.2, 0.2), (-0.65, 0.65), (-0.25, 0.0), m.BODY)
        for k, paint in enumerate((m.TAIL, m.AMBER, m.GREEN)):
            y = 0.42 - 0.42 * k
            for r, p in ((0.19, m.DARK), (0.155, paint if k == lit else m.GLASS)):
                b.face([(r * np.cos(t), y + r * np.sin(t), -0.26) for t in turn], (0, 0, -1), p)
        made.append(b.mesh())
    return tuple(made)


def paint_traffic_light(canvas: Canvas, place: np.ndarray, side: int, rng: Random) -> None:
    """A pole with one or two housings; some on an arm above the road. The pole is an object of its own."""
    colour = mineral(rng)
    lit = rng.randrange(3)
    housing = dark(rng) if rng.random() < 0.6 else painted(rng)
    board = (20.0, 20.0, 22.0) if rng.random() < 0.6 else (230.0, 230.0, 225.0)
    palette = np.array(
        [
            housing,
            board,
            (35, 32, 34),
            *[(0, 0, 0)] * 4,
            (255, 50, 35),
            (0, 0, 0),
            (255, 175, 45),
            (50, 235, 150),
            (12, 12, 12),
        ]
    )
    hung = rng.random() < 0.45
    height = 5.4 if hung else 3.5
    top = place + np.array([0.0, height, 0.0])
    rods = [(place, top, 0.1)]
    heads = [place + np.array([0.0, 3.0, -0.15])]
    if hung:
        reach = rng.uniform(2.5, 4.5)
        rods.append((top, top - (side * reach, 0, 0), 0.08))
        heads.append(top + np.array([-side * reach, -0.35, -0.15]))
    paint_rods(canvas, rods, colour, POLE)
    yaw, size = rng.gauss(0, 0.15), rng.uniform(1.05, 1.3)
    for at in heads:
        number = paint_mesh(canvas, _light_meshes()[lit], at, yaw, np.full(3, size), palette, TRAFFIC_LIGHT)
        if number and canvas.light.night:
            uv, depth = canvas.camera.project((at + (0, 0.42 * (1 - lit), -0.3))[None])
            rgb = tuple(palette[(m.TAIL, m.AMBER, m.GREEN)[lit]].tolist())
            reach_px = 0.55 * canvas.camera.focal_px / float(depth[0])
            canvas.lamps.append(Lamp(float(uv[0, 0]), float(uv[0, 1]), reach_px, rgb, number))


def _ring(corners: int, start: float, radius: float, stretch: float = 1.0) -> np.ndarray:
    t = start + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.column_stack([radius * stretch * np.cos(t), radius * np.sin(t)])


def _sign_shapes(rng: Random) -> list[tuple[np.ndarray, RGB]]:
    """Flat shapes [N, 2] in metres around the plate's middle, outermost first."""
    red, blue, white, black = (200.0, 25.0, 30.0), (25.0, 75.0, 175.0), (238.0, 238.0, 235.0), (25.0, 25.0, 28.0)
    kind, r = rng.randrange(7), rng.uniform(0.42, 0.55)
    if kind == 0:
        return [(_ring(18, 0, r), red), (_ring(18, 0, 0.74 * r), white), *_glyph(rng, 0.42 * r, black)]
    if kind == 1:
        return [
            (_ring(3, np.pi / 2, 1.2 * r), red),
            (_ring(3, np.pi / 2, 0.78 * r), white),
            *_glyph(rng, 0.3 * r, black),
        ]
    if kind == 2:
        return [(_ring(8, np.pi / 8, r), white), (_ring(8, np.pi / 8, 0.92 * r), red), *_glyph(rng, 0.5 * r, white)]
    if kind == 3:
        return [(_ring(18, 0, r), white), (_ring(18, 0, 0.93 * r), blue), *_glyph(rng, 0.5 * r, white)]
    if kind == 4:
        amber = (240.0, 190.0, 20.0)
        return [(_ring(4, 0, 1.1 * r), white), (_ring(4, 0, 0.85 * r), amber), *_glyph(rng, 0.35 * r, black)]
    ground = rng.choice((blue, white, (30.0, 110.0, 60.0), (240.0, 190.0, 20.0)))
    ink = black if ground in (white, (240.0, 190.0, 20.0)) else white
    wide, tall = (
        (rng.uniform(0.45, 0.6), rng.uniform(0.45, 0.75))
        if kind == 5
        else (rng.uniform(0.8, 1.3), rng.uniform(0.5, 0.8))
    )
    plate = np.array([(-wide, -tall), (wide, -tall), (wide, tall), (-wide, tall)])
    return [(plate, ink), (plate * 0.93, ground), *_glyph(rng, 0.6 * tall, ink)]


def _glyph(rng: Random, size: float, ink: RGB) -> list[tuple[np.ndarray, RGB]]:
    bar = np.array([(-0.22, -1), (0.22, -1), (0.22, 1), (-0.22, 1)]) * size
    kind = rng.randrange(4)
    if kind == 0:
        return [(bar, ink)]
    if kind == 1:
        return [(bar[:, ::-1] * 1.3, ink)]
    if kind == 2:
        arrow = np.array([(-0.2, -1), (0.2, -1), (0.2, 0.2), (0.7, 0.2), (0, 1.1), (-0.7, 0.2), (-0.2, 0.2)]) * size
        return [(arrow, ink)]
    rows = [
        np.array([(-1.2, y), (1.2 - 0.5 * (y > 0), y), (1.2 - 0.5 * (y > 0), y + 0.3), (-1.2, y + 0.3)])
        for y in (-0.8, -0.15, 0.5)
    ]
    return [(row * size, ink) for row in rows]


def paint_sign(canvas: Canvas, place: np.ndarray, side: int, rng: Random) -> None:
    """One or two plates on a pole; the pole is an object of its own, and so is each plate."""
    shapes = [_sign_shapes(rng) for _ in range(rng.choice((1, 1, 2)))]
    height = rng.uniform(2.2, 2.9)
    total = height + sum(float(np.ptp(s[0][0][:, 1])) for s in shapes)
    paint_rods(canvas, [(place, place + (0, total, 0), rng.uniform(0.06, 0.1))], mineral(rng), POLE)
    yaw, dirt = rng.gauss(0, 0.25), rng.uniform(0.75, 1.0)
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    light = canvas.light.shade(np.array([[-np.sin(yaw), 0.0, -np.cos(yaw)]]))[0] * dirt
    if canvas.light.night:
        light = np.full(3, 0.75) * dirt  # retroreflective sheeting in the headlights
    y = place[1] + height
    for layers in shapes:
        half = float(np.ptp(layers[0][0][:, 1])) / 2
        middle = np.array([place[0], y + half - float(layers[0][0][:, 1].max() - half), place[2] - 0.12])
        y += 2 * half + 0.05
        number = 0
        for k, (flat, colour) in enumerate(layers):
            uv, depth = canvas.camera.project(middle + flat[:, :1] * right + flat[:, 1:] * np.array([0.0, 1.0, 0.0]))
            if depth.min() < 0.8:
                break
            if k == 0:
                number = canvas.begin(TRAFFIC_SIGN, uv, float(depth[0]))
            rgb = np.minimum(np.array(colour) * light, 255).tolist()
            canvas.fill(fixed(uv), rgb, number if k == 0 else 0)


@cache
def _box_mesh() -> Mesh:
    b = Modeller()
    b.box((-0.5, 0.5), (0, 1), (-0.5, 0.5), m.BODY)
    b.face([(-0.4, 0.6, -0.51), (0.4, 0.6, -0.51), (0.4, 0.85, -0.51), (-0.4, 0.85, -0.51)], (0, 0, -1), m.SECOND)
    return b.mesh()


def paint_clutter(canvas: Canvas, place: np.ndarray, yaw: float, rng: Random) -> None:
    """Bins, boxes and cabinets (static), bags left on the pavement (dynamic)."""
    palette = np.array([painted(rng), painted(rng), *[(40, 40, 42)] * 10], float)
    moving = rng.random() < 0.4
    size = np.array(
        [rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.5) if moving else rng.uniform(0.7, 1.4), rng.uniform(0.3, 0.6)]
    )
    paint_mesh(canvas, _box_mesh(), place, yaw, size, palette, DYNAMIC if moving else STATIC)


def paint_bonnet(canvas: Canvas, rng: Random) -> None:
    """The front of the vehicle that carries the camera, at the foot of the frame, with the sky in it."""
    w, h = canvas.camera.width_px, canvas.camera.height_px
    rise, tilt = h * rng.uniform(0.05, 0.14), rng.uniform(-0.3, 0.3)
    t = np.linspace(-1.1, 1.1, 24)
    colour = np.array(painted(rng)) * canvas.light.level
    for k, f in enumerate((1.0, 0.72, 0.45)):
        v = h - f * rise * (1 - 0.55 * t**2 + 0.25 * tilt * t)
        uv = np.column_stack(
            [np.concatenate([(t + 1) * w / 2, [w * 1.1, -w * 0.1]]), np.concatenate([v, [h + 5, h + 5]])]
        )
        number = canvas.begin(1, uv, 1.0) if k == 0 else 0
        canvas.fill(fixed(uv), np.minimum(colour * (1.15 - 0.25 * k), 255).tolist(), number)
