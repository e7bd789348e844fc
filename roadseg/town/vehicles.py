"""Cars, trucks, buses and trams: a few meshes of each, scaled and painted per item."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np

from roadseg.town import mesh as m
from roadseg.town.canvas import Canvas
from roadseg.town.colours import dark, hsv, painted
from roadseg.town.mesh import Mesh, Modeller, paint_mesh

LABELS = {"car": 26, "truck": 27, "bus": 28, "train": 31}
SMALLEST = 0.93  # the least scale of any side
FRONT, REAR = (0, 0, 1), (0, 0, -1)


def paint_vehicle(canvas: Canvas, kind: str, place: np.ndarray, yaw: float, rng: Random) -> int:
    mesh = draw_mesh(kind, rng)
    scale = np.array([rng.uniform(0.95, 1.06), rng.uniform(SMALLEST, 1.08), rng.uniform(0.94, 1.05)])
    return paint_mesh(canvas, mesh, place, yaw, scale, _palette(canvas, rng), LABELS[kind])


def draw_mesh(kind: str, rng: Random) -> Mesh:
    meshes = {"car": cars, "truck": trucks, "bus": buses, "train": trams}[kind]()
    return meshes[rng.randrange(len(meshes))]


def _palette(canvas: Canvas, rng: Random) -> np.ndarray:
    """float64 [12, 3], by the paints of mesh.py."""
    body = painted(rng)
    second = painted(rng) if rng.random() < 0.6 else tuple(0.85 * c for c in body)
    glass = hsv(0.58, rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.4))
    hub = hsv(0.6, 0.05, rng.uniform(0.3, 0.75))
    trim = dark(rng)
    tail = hsv(rng.uniform(-0.02, 0.03), 0.85, rng.uniform(0.45, 0.9))
    return np.array(
        [
            body,
            second,
            glass,
            dark(rng),
            hub,
            trim,
            (225, 225, 215),
            tail,
            (240, 240, 225),
            (235, 150, 40),
            (60, 200, 120),
            (18, 18, 20),
        ]
    )


def _end(b: Modeller, z: float, sign: int, half_w: float, lamp: tuple[float, float], bumper_y: float) -> None:
    """Lamps (foot and size), plate and bumper on the rear (sign -1) or the front (+1) face at z."""
    outward, z, (y, size) = (0, 0, sign), z + 0.02 * sign, lamp
    b.face(_plate(z, (-half_w, half_w), (bumper_y, bumper_y + 0.16)), outward, m.TRIM)
    for side in (-1, 1):
        x = sorted((side * half_w * 0.96, side * (half_w - size * 1.5)))
        b.face(_plate(z, (x[0], x[1]), (y, y + size)), outward, m.HEAD if sign > 0 else m.TAIL)
    b.face(_plate(z, (-0.27, 0.27), (y - 0.18, y - 0.05)), outward, m.PLATE)


def _plate(z: float, x: tuple[float, float], y: tuple[float, float]) -> list[tuple[float, float, float]]:
    return [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)]


@cache
def cars() -> tuple[Mesh, ...]:
    # (length, height, bonnet height, cabin: foot rear, roof rear, roof front, foot front)
    forms = (
        (4.5, 1.45, 0.95, (-1.9, -1.2, 0.15, 1.0)),
        (4.0, 1.5, 0.95, (-1.95, -1.7, 0.2, 1.05)),
        (4.7, 1.5, 0.95, (-2.3, -2.05, 0.2, 1.05)),
        (4.7, 1.75, 1.08, (-2.3, -2.05, 0.25, 1.1)),
        (4.9, 1.95, 1.1, (-2.42, -2.35, 0.7, 1.55)),
        (4.2, 1.35, 0.9, (-1.7, -0.9, 0.05, 0.85)),
    )
    return tuple(_car(*form) for form in forms)


def _car(length: float, height: float, deck: float, cabin: tuple[float, float, float, float]) -> Mesh:
    b, end, half = Modeller(), length / 2, 0.9
    axles, radius = (-0.29 * length, 0.3 * length), 0.33
    body = [(-end, 0.28, half), (-end, deck - 0.12, half), (-end + 0.15, deck, 0.86), (cabin[3], deck, 0.86),
            (end - 0.25, deck - 0.16, half), (end, deck - 0.32, half), (end, 0.28, half)]  # fmt: skip
    top = [(cabin[0], deck, 0.84), (cabin[1], height, 0.64), (cabin[2], height, 0.64), (cabin[3], deck, 0.84)]
    b.wheels(half, axles, radius)
    b.prism(body, m.BODY)
    for sign in (-1, 1):
        _end(b, sign * end, sign, half, (deck - 0.34, 0.17), 0.3)
    b.both_sides(half + 0.01, [(-end + 0.1, 0.28), (end - 0.1, 0.28), (end - 0.1, 0.38), (-end + 0.1, 0.38)], m.TRIM)
    b.prism(top, m.BODY)
    b.on(b.strip(top, 0), (0.07, 0.93), (0.12, 0.88), m.GLASS, (0, 0.4, -1))
    b.on(b.strip(top, 2), (0.07, 0.93), (0.12, 0.88), m.GLASS, (0, 0.4, 1))
    for sign in (-1, 1):
        for a, c in ((0.05, 0.48), (0.53, 0.95)):
            low = [(cabin[0] + t * (cabin[3] - cabin[0]), deck + 0.06, 0.83) for t in (a, c)]
            high = [(cabin[1] + t * (cabin[2] - cabin[1]), height - 0.08, 0.66) for t in (c, a)]
            b.face([(sign * (w + 0.01), y, z) for z, y, w in low + high], (sign, 0.2, 0), m.GLASS)
    b.discs(half, axles, radius)
    return b.mesh()


@cache
def trucks() -> tuple[Mesh, ...]:
    return tuple(_truck(load, length) for load in ("box", "tarpaulin", "flat", "box") for length in (7.0, 8.5))


def _truck(load: str, length: float) -> Mesh:
    b, half, end = Modeller(), 1.2, length / 2
    axles = (-end + 1.2, -end + 2.4, end - 1.0)
    back, front = -end, end - 2.1
    b.wheels(half, axles, 0.5, 0.4)
    b.box((-1.0, 1.0), (0.6, 1.0), (back, end - 0.4), m.DARK)
    _load(b, load, half, (back, front))
    b.face(_plate(back - 0.01, (-half, half), (0.55, 0.72)), REAR, m.TRIM)
    for sign in (-1, 1):
        ends = sorted((sign * 1.15, sign * 0.75))
        b.face(_plate(back - 0.02, (ends[0], ends[1]), (0.76, 0.97)), REAR, m.TAIL)
    b.group = 1
    cab = [
        (front + 0.1, 0.55, half),
        (front + 0.1, 2.75, 1.15),
        (end - 0.35, 2.75, 1.12),
        (end, 1.5, half),
        (end, 0.55, half),
    ]
    b.prism(cab, m.BODY)
    b.on(b.strip(cab, 2), (0.06, 0.94), (0.08, 0.95), m.GLASS, FRONT)
    b.face(_plate(end + 0.01, (-0.8, 0.8), (0.85, 1.35)), FRONT, m.TRIM)
    _end(b, end, 1, half, (0.75, 0.2), 0.55)
    window = [(end - 1.3, 1.6), (end - 0.35, 1.6), (end - 0.55, 2.5), (end - 1.3, 2.5)]
    b.both_sides(half + 0.01, window, m.GLASS)
    b.discs(half, axles[2:], 0.5)
    b.group = 0
    b.discs(half, axles[:2], 0.5)
    return b.mesh()


def _load(b: Modeller, load: str, half: float, ends: tuple[float, float]) -> None:
    """What stands behind the cab: an open bed with crates, or a closed body with doors at the rear."""
    back, front = ends
    if load == "flat":
        b.box((-half, half), (1.0, 1.6), (back, front), m.SECOND)
        for k in range(3):
            z = back + 0.3 + k * (front - back - 0.6) / 3
            b.box((-1.0, 1.0), (1.6, 2.2 + 0.3 * (k % 2)), (z, z + (front - back) / 3 - 0.4), m.HUB)
    else:
        top = 3.5
        b.box((-half, half), (1.0, top), (back, front), m.SECOND)
        b.core = ((-half, half), (1.0, top), (back, front))
        for k in range(1, 8):
            z = back + k * (front - back) / 8
            if load == "tarpaulin":
                b.both_sides(half + 0.01, [(z - 0.03, 1.0), (z + 0.03, 1.0), (z + 0.03, top), (z - 0.03, top)], m.HUB)
        b.both_sides(half + 0.01, [(back, 1.0), (front, 1.0), (front, 1.15), (back, 1.15)], m.TRIM)
        b.face(_plate(back - 0.01, (-0.03, 0.03), (1.05, top - 0.05)), REAR, m.DARK)
        for x in (-0.75, -0.35, 0.35, 0.75):
            b.face(_plate(back - 0.01, (x - 0.04, x + 0.04), (1.1, top - 0.1)), REAR, m.HUB)
        for k in range(6):
            x = -half + 0.4 * k
            b.face(_plate(back - 0.02, (x, x + 0.4), (1.0, 1.14)), REAR, (m.TAIL, m.PLATE)[k % 2])


@cache
def buses() -> tuple[Mesh, ...]:
    return tuple(_bus(length, decks) for length, decks in ((11.5, 1), (10.5, 1), (10.0, 2)))


def _bus(length: float, decks: int) -> Mesh:
    b, half, end, top = Modeller(), 1.27, length / 2, 3.1 if decks == 1 else 4.3
    axles = (-0.27 * length, 0.3 * length)
    b.wheels(half, axles, 0.5, 0.35)
    b.box((-half, half), (0.32, top), (-end, end), m.BODY)
    b.core = ((-half, half), (0.32, top), (-end, end))
    b.both_sides(half + 0.005, [(-end, 0.32), (end, 0.32), (end, 0.85), (-end, 0.85)], m.SECOND)
    for deck in range(decks):
        low, high = (1.35, 2.45) if deck == 0 else (2.95, 3.85)
        b.both_sides(half + 0.01, [(-end + 0.3, low), (end - 0.2, low), (end - 0.2, high), (-end + 0.3, high)], m.DARK)
        panes = 7
        for k in range(panes):
            z0 = -end + 0.4 + k * (length - 0.7) / panes
            z1 = z0 + (length - 0.7) / panes - 0.14
            b.both_sides(
                half + 0.015, [(z0, low + 0.08), (z1, low + 0.08), (z1, high - 0.08), (z0, high - 0.08)], m.GLASS
            )
        b.face(_plate(end + 0.01, (-1.15, 1.15), (low - 0.15 * (deck == 0), high)), FRONT, m.GLASS)
        b.face(_plate(-end - 0.01, (-0.98, 0.98), (low + 0.15, high)), REAR, m.GLASS)
    for z in (-0.6, end - 1.6):
        b.both_sides(half + 0.02, [(z, 0.4), (z + 1.2, 0.4), (z + 1.2, 2.5), (z, 2.5)], m.TRIM)
        for a in (0.06, 0.63):
            b.both_sides(half + 0.025, [(z + a, 0.5), (z + a + 0.5, 0.5), (z + a + 0.5, 2.4), (z + a, 2.4)], m.GLASS)
    b.face(_plate(end + 0.01, (-0.95, 0.95), (2.55, 2.9)), FRONT, m.DARK)
    b.face(_plate(end + 0.02, (-0.6, 0.7), (2.63, 2.82)), FRONT, m.AMBER)
    b.face(_plate(-end - 0.02, (-0.45, 0.45), (2.62, 2.85)), REAR, m.DARK)
    for k in range(4):
        b.face(_plate(-end - 0.01, (-0.8, 0.8), (0.72 + 0.13 * k, 0.79 + 0.13 * k)), REAR, m.TRIM)
    for sign in (-1, 1):
        _end(b, sign * end, sign, half, (0.85, 0.26), 0.32)
    b.discs(half, axles, 0.5)
    return b.mesh()


@cache
def trams() -> tuple[Mesh, ...]:
    return tuple(_tram(sections, nose) for sections, nose in ((3, 0.5), (2, 1.1)))


def _tram(sections: int, nose: float) -> Mesh:
    b, half, total, top = Modeller(), 1.22, 24.0, 3.35
    one = total / sections
    b.core = ((-1.05, 1.05), (0.3, top - 0.2), (0.4 + nose - total / 2, total / 2 - 0.4 - nose))
    for k in range(sections):
        z0, z1 = -total / 2 + k * one + 0.25, -total / 2 + (k + 1) * one - 0.25
        b.group = 2 * k
        back, ahead = (nose if k == 0 else 0.0), (nose if k == sections - 1 else 0.0)
        foot0, foot1 = z0 + 0.25 * bool(back), z1 - 0.25 * bool(ahead)
        body = [
            (foot0, 0.16, half),
            (z0, 1.25, half),
            (z0 + back, top, 1.1),
            (z1 - ahead, top, 1.1),
            (z1, 1.25, half),
            (foot1, 0.16, half),
        ]
        b.box((-0.8, 0.8), (top, top + 0.35), (z0 + 1.5, z1 - 1.5), m.HUB)
        b.prism(body, m.BODY)
        b.both_sides(half + 0.005, [(foot0, 0.16), (foot1, 0.16), (z1, 0.75), (z0, 0.75)], m.SECOND)
        _tram_windows(b, (z0 + 0.5 * back + 0.2, z1 - 0.5 * ahead - 0.2), half)
        for end, strip, outward in ((k == 0, 1, REAR), (k == sections - 1, 3, FRONT)):
            if end:
                quad = b.strip(body, strip)
                low, high = (0.02, 0.72) if strip == 1 else (0.28, 0.98)
                b.on(quad, (0.08, 0.92), (low, high), m.GLASS, (0, 0.3, outward[2]))
                b.on(quad, (0.3, 0.7), (0.8, 0.94) if strip == 1 else (0.06, 0.2), m.AMBER, (0, 0.3, outward[2]))
                _tram_face(b, z0 if strip == 1 else z1, outward)
        if k == sections // 2:
            _pantograph(b, (z0 + z1) / 2, top)
        if k < sections - 1:
            b.group = 2 * k + 1
            b.box((-1.05, 1.05), (0.3, top - 0.15), (z1 - 0.05, z1 + 0.55), m.DARK)
    return b.mesh()


def _pantograph(b: Modeller, z: float, top: float) -> None:
    for a, c in ((0.0, 0.9), (0.9, 0.0)):
        low, high = top + 0.35 + c, top + 0.35 + a
        b.both_sides(0.05, [(z + a, low), (z + a + 0.1, low), (z + c + 0.1, high), (z + c, high)], m.DARK)
    b.face(_plate(z, (-0.7, 0.7), (top + 1.2, top + 1.3)), REAR, m.DARK)


def _tram_windows(b: Modeller, z: tuple[float, float], half: float) -> None:
    """A dark band of panes with doors between them, on both sides."""
    b.both_sides(half + 0.01, [(z[0], 1.4), (z[1], 1.4), (z[1], 2.7), (z[0], 2.7)], m.DARK)
    slots = 5
    for k in range(slots):
        a = z[0] + k * (z[1] - z[0]) / slots + 0.08
        c = a + (z[1] - z[0]) / slots - 0.16
        if k % 2:
            b.both_sides(half + 0.012, [(a, 0.35), (c, 0.35), (c, 2.75), (a, 2.75)], m.SECOND)
            b.both_sides(half + 0.014, [(a + 0.1, 0.6), (c - 0.1, 0.6), (c - 0.1, 2.6), (a + 0.1, 2.6)], m.GLASS)
        else:
            b.both_sides(half + 0.014, [(a, 1.48), (c, 1.48), (c, 2.62), (a, 2.62)], m.GLASS)


def _tram_face(b: Modeller, z: float, outward: tuple[int, int, int]) -> None:
    """Low round lamps and a bumper under the windscreen."""
    sign = outward[2]
    lean = (0.0, 0.0, 1.0 * sign)
    low, high = z - 0.25 * sign, z

    def at(y: float) -> float:
        return low + (high - low) * (y - 0.16) / 1.09 + 0.01 * sign

    for x0, x1, y0, y1, paint in (
        (-1.1, -0.75, 0.8, 1.05, m.HEAD if sign > 0 else m.TAIL),
        (0.75, 1.1, 0.8, 1.05, m.HEAD if sign > 0 else m.TAIL),
        (-1.15, 1.15, 0.18, 0.4, m.TRIM),
        (-0.5, 0.5, 0.55, 1.1, m.SECOND),
    ):
        b.face([(x0, y0, at(y0)), (x1, y0, at(y0)), (x1, y1, at(y1)), (x0, y1, at(y1))], lean, paint)
