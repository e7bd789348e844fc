"""People, bicycles and motorcycles made of rounded rods; riders are separate objects.

Axes of a figure: x right, y up, z where it faces; origin on the ground below it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

import cv2
import numpy as np

from roadseg.town.canvas import SHIFT, Canvas, Lamp, fixed
from roadseg.town.colours import RGB, dark, hsv, painted, scaled, skin

PERSON, RIDER, MOTORCYCLE, BICYCLE = 24, 25, 32, 33
P3 = tuple[float, float, float]
_TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_RIM = np.column_stack([np.zeros(20), np.sin(_TURN), np.cos(_TURN)])


@dataclass
class Figure:
    """Rods (from, to, radius at each, colour) and wheels (centre z, radius, tyre width, colour, disc colour)."""

    rods: list[tuple[P3, P3, float, float, RGB]] = field(default_factory=list)
    wheels: list[tuple[float, float, float, RGB, RGB | None]] = field(default_factory=list)

    def rod(self, a: P3, b: P3, r0: float, r1: float, colour: RGB) -> None:
        self.rods.append((a, b, r0, r1, colour))


def paint_figure(canvas: Canvas, figure: Figure, label: int, place: np.ndarray, yaw: float, scale: float) -> int:
    """Paint wheels, then rods far to near. Returns the object number, 0 if not in view."""
    s, c = math.sin(yaw), math.cos(yaw)
    turn = scale * np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    ends = np.array([r[0] for r in figure.rods] + [r[1] for r in figure.rods], float)
    uv, depth = canvas.camera.project(ends @ turn + place)
    low, high = uv.min(axis=0), uv.max(axis=0)
    w, h = canvas.camera.width_px, canvas.camera.height_px
    if depth.min() < 0.8 or high[0] < 0 or low[0] > w or high[1] < 0 or low[1] > h:
        return 0
    n = len(figure.rods)
    px = scale * canvas.camera.focal_px / depth
    radius = np.array([r[2] for r in figure.rods] + [r[3] for r in figure.rods]) * px
    number = canvas.begin(label, np.concatenate([uv - radius[:, None], uv + radius[:, None]]), float(depth[0]))
    for wheel in figure.wheels:
        _wheel(canvas, wheel, turn, place, number)
    colours = np.array([r[4] for r in figure.rods]) * canvas.light.level
    order = np.argsort(-(depth[:n] + depth[n:]), kind="stable").tolist()
    canvas.rods(uv, np.maximum(radius, 0.4), colours, order, number)
    return number


def _wheel(
    canvas: Canvas,
    wheel: tuple[float, float, float, RGB, RGB | None],
    turn: np.ndarray,
    place: np.ndarray,
    number: int,
) -> None:
    """A tyre around a disc, or around spokes that the background shows through; the map takes all of it."""
    z, radius, width, tyre, disc = wheel
    uv, depth = canvas.camera.project((_RIM * radius + (0.0, radius, z)) @ turn + place)
    canvas.grow(number, uv)
    points = fixed(uv)
    level = canvas.light.level
    focal = canvas.camera.focal_px / float(depth[0])
    px = max(1, round(width * focal))
    tyre_rgb = (np.array(tyre) * level).tolist()
    cv2.fillPoly(canvas.objects, [points], number, cv2.LINE_8, SHIFT)
    cv2.polylines(canvas.objects, [points], True, number, px, cv2.LINE_8, SHIFT)
    if disc is not None:
        canvas.fill(points, (np.array(disc) * level).tolist())
    elif radius * focal > 5:
        spoke = np.minimum(1.6 * np.array(tyre_rgb), 255).tolist()
        ends = points.tolist()
        for k in range(0, 10, 2):
            cv2.line(canvas.image, ends[k], ends[k + 10], spoke, 1, cv2.LINE_AA, SHIFT)
    cv2.polylines(canvas.image, [points], True, tyre_rgb, px, cv2.LINE_AA, SHIFT)


def _person(rng: Random) -> Figure:
    f = Figure()
    coat, trousers, face, shoe = painted(rng), painted(rng), skin(rng), dark(rng)
    hair = hsv(rng.uniform(0.03, 0.12), rng.uniform(0.1, 0.6), rng.uniform(0.08, 0.7))
    swing = rng.choice((0.0, 0.12, 0.25, 0.33)) * rng.choice((-1, 1))
    bulk = rng.uniform(0.9, 1.25)
    skirt, sleeve = rng.random() < 0.2, rng.random() < 0.75
    for side, step in ((-1, swing), (1, -swing)):
        knee = (0.11 * side, 0.5, 0.6 * step + 0.04)
        foot = (0.11 * side, 0.08, 1.15 * step - 0.04)
        f.rod((0.1 * side, 0.9, 0.0), knee, 0.1 * bulk, 0.075, trousers)
        f.rod(knee, foot, 0.075, 0.055, face if skirt else trousers)
        f.rod(foot, (foot[0], 0.05, foot[2] + 0.17), 0.05, 0.045, shoe)
        elbow = (0.29 * side * bulk, 1.16, -0.5 * step - 0.03)
        f.rod((0.23 * side * bulk, 1.42, 0.0), elbow, 0.07, 0.06, coat)
        f.rod(elbow, (0.27 * side * bulk, 0.93, -0.9 * step + 0.1), 0.055, 0.045, coat if sleeve else face)
        f.rod((0.08 * side, 0.93, 0.0), (0.13 * side * bulk, 1.4, 0.0), 0.125 * bulk, 0.1 * bulk, coat)
    if skirt:
        f.rod((0.0, 0.95, 0.0), (0.0, 0.6, 0.0), 0.15, 0.24, trousers)
    elif rng.random() < 0.25:
        f.rod((0.0, 1.0, 0.0), (0.0, 0.72, 0.0), 0.2 * bulk, 0.22 * bulk, coat)
    if rng.random() < 0.3:
        f.rod((0.0, 1.36, -0.2), (0.0, 1.05, -0.22), 0.15, 0.17, painted(rng))
    elif rng.random() < 0.3:
        f.rod((0.33, 0.85, 0.05), (0.33, 0.62, 0.05), 0.04, 0.16, painted(rng))
    f.rod((0.0, 1.48, 0.0), (0.0, 1.55, 0.01), 0.06, 0.06, face)
    f.rod((0.0, 1.6, 0.03), (0.0, 1.68, 0.03), 0.095, 0.1, face)
    f.rod((0.0, 1.66, -0.04), (0.0, 1.72, -0.01), 0.11, 0.1, hair)
    return f


def paint_person(canvas: Canvas, place: np.ndarray, yaw: float, rng: Random) -> int:
    scale = rng.uniform(0.92, 1.08) if rng.random() < 0.85 else rng.uniform(0.62, 0.8)
    return paint_figure(canvas, _person(rng), PERSON, place, yaw, scale)


def _bicycle(rng: Random) -> Figure:
    f = Figure()
    frame, tyre, seat = painted(rng), dark(rng), dark(rng)
    for z in (-0.52, 0.55):
        f.wheels.append((z, 0.35, 0.065, tyre, None))
    crank, saddle, head = (0.0, 0.3, -0.02), (0.0, 0.88, -0.22), (0.0, 0.84, 0.36)
    low_step = rng.random() < 0.5
    for a, b in (
        (crank, saddle),
        (crank, head),
        (crank, (0.0, 0.35, -0.52)),
        ((0.0, 0.35, -0.52), (0.0, 0.72, -0.16)),
        ((0.0, 0.55 if low_step else 0.78, -0.12), head),
        ((0.0, 0.35, 0.55), (0.0, 1.02, 0.32)),
    ):
        f.rod(a, b, 0.035, 0.035, frame)
    f.rod((0.0, 0.92, -0.34), (0.0, 0.92, -0.12), 0.08, 0.05, seat)
    f.rod((-0.28, 1.05, 0.28), (0.28, 1.05, 0.28), 0.03, 0.03, seat)
    f.rod((-0.1, 0.3, 0.1), (0.1, 0.3, -0.14), 0.04, 0.04, seat)
    if rng.random() < 0.35:
        f.rod((0.0, 0.8, 0.55), (0.0, 0.98, 0.55), 0.14, 0.18, painted(rng))
    if rng.random() < 0.4:
        f.rod((0.0, 0.77, -0.75), (0.0, 0.77, -0.35), 0.06, 0.06, seat)
    return f


def _motorcycle(rng: Random) -> Figure:
    f = Figure()
    body, tyre, metal, seat = painted(rng), dark(rng), hsv(0.6, 0.05, rng.uniform(0.3, 0.75)), dark(rng)
    scooter = rng.random() < 0.35
    radius = 0.25 if scooter else 0.32
    disc = scaled(metal, 0.7)
    for z in (-0.66, 0.7):
        f.wheels.append((z, radius, 0.15, tyre, disc))
    f.rod((0.0, radius + 0.12, 0.72), (0.0, 0.98, 0.46), 0.07, 0.07, metal)
    if scooter:
        f.rod((0.0, 0.45, 0.42), (0.0, 0.98, 0.4), 0.22, 0.16, body)
        f.rod((0.0, 0.28, 0.3), (0.0, 0.28, -0.25), 0.12, 0.15, seat)
        f.rod((0.0, 0.5, -0.3), (0.0, 0.55, -0.8), 0.22, 0.18, body)
    else:
        f.rod((0.0, 0.45, 0.25), (0.0, 0.42, -0.25), 0.22, 0.2, metal)
        f.rod((0.0, 0.86, 0.26), (0.0, 0.8, -0.12), 0.19, 0.15, body)
        f.rod((0.0, 0.72, -0.3), (0.0, 0.86, -0.82), 0.14, 0.09, body)
        f.rod((0.0, 0.72, 0.5), (0.0, 1.0, 0.5), 0.16, 0.17, body)
    f.rod((0.19, 0.36, 0.0), (0.19, 0.44, -0.85), 0.06, 0.085, metal)
    f.rod((0.0, 0.84, -0.12), (0.0, 0.9, -0.72), 0.13, 0.11, seat)
    f.rod((0.0, radius * 2 + 0.03, 0.85), (0.0, radius * 2 + 0.05, 0.55), 0.06, 0.08, body)
    f.rod((-0.38, 1.06, 0.36), (0.38, 1.06, 0.36), 0.04, 0.04, seat)
    for x in (-0.34, 0.34):
        f.rod((x, 1.06, 0.4), (x * 1.2, 1.24, 0.4), 0.025, 0.07, seat)
    f.rod((0.0, 0.92, 0.63), (0.0, 0.92, 0.66), 0.1, 0.1, (240, 240, 225))
    f.rod((0.0, 0.82, -0.9), (0.0, 0.82, -0.92), 0.07, 0.07, (200, 30, 25))
    return f


def _rider(rng: Random, motor: bool) -> Figure:
    f = Figure()
    coat, trousers, face, helmet = painted(rng), painted(rng), skin(rng), painted(rng)
    hip = (0.0, 1.0, -0.28)
    lean = rng.uniform(0.05, 0.35)
    neck = (0.0, 1.5, hip[2] + lean)
    turn = rng.uniform(0, 2 * math.pi)
    for side in (-1, 1):
        up = 0.15 * math.sin(turn) * side
        knee = (0.25 * side, 0.8, 0.2) if motor else (0.13 * side, 0.72 + up, 0.14)
        foot = (0.24 * side, 0.38, -0.08) if motor else (0.12 * side, 0.3 + up, -0.02 + 0.15 * math.cos(turn) * side)
        hand = (0.35 * side, 1.08, 0.33) if motor else (0.27 * side, 1.07, 0.28)
        f.rod((0.1 * side, hip[1], hip[2]), knee, 0.115, 0.085, trousers)
        f.rod(knee, foot, 0.08, 0.06, trousers)
        f.rod(foot, (foot[0], foot[1] - 0.05, foot[2] + 0.17), 0.055, 0.05, dark(rng))
        elbow = (0.33 * side, 1.2, 0.5 * (neck[2] + hand[2]) - 0.05)
        f.rod((0.21 * side, 1.43, neck[2]), elbow, 0.08, 0.065, coat)
        f.rod(elbow, hand, 0.06, 0.05, coat)
        f.rod((0.09 * side, 1.0, hip[2]), (0.13 * side, 1.42, neck[2]), 0.135, 0.115, coat)
    head = neck[2] + 0.06
    f.rod((0.0, 1.62, head + 0.03), (0.0, 1.7, head + 0.03), 0.1, 0.1, face)
    f.rod((0.0, 1.68, head - 0.02), (0.0, 1.75, head), 0.14 if motor else 0.115, 0.13 if motor else 0.11, helmet)
    if rng.random() < 0.25:
        f.rod((0.0, 1.35, hip[2] + 0.6 * lean - 0.2), (0.0, 1.1, hip[2] - 0.2), 0.15, 0.18, painted(rng))
    return f


def paint_two_wheeler(canvas: Canvas, motor: bool, ridden: bool, place: np.ndarray, yaw: float, rng: Random) -> int:
    """A bicycle or motorcycle, and its rider on top as a second object."""
    scale = rng.uniform(0.98, 1.12)
    figure = _motorcycle(rng) if motor else _bicycle(rng)
    number = paint_figure(canvas, figure, MOTORCYCLE if motor else BICYCLE, place, yaw, scale)
    if ridden:
        paint_figure(canvas, _rider(rng, motor), RIDER, place, yaw, scale)
    if number and motor and ridden and canvas.light.night:
        front = place + np.array([math.sin(yaw) * 0.6, 0.92, math.cos(yaw) * 0.6])
        uv, depth = canvas.camera.project(front[None])
        facing = math.cos(yaw) < 0
        rgb = (255.0, 245.0, 215.0) if facing else (255.0, 40.0, 30.0)
        reach = 0.7 * canvas.camera.focal_px / float(depth[0])
        canvas.lamps.append(Lamp(float(uv[0, 0]), float(uv[0, 1]), reach, rgb, number))
    return number
