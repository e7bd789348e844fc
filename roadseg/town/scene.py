"""Sample a scene from (seed, index): a street, a camera position and a list of items.

Rare classes are scheduled by index, so that any twelve scenes in a row show all nineteen classes:
a large vehicle or riders come first in a lane near the camera, in turn, and so do signs, lights,
two-wheelers, walls and fences beside the road. Everything else is drawn at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from roadseg.town.street import Lane, Side, Street, draw_street

LENGTH_M = {"car": 4.6, "truck": 8.0, "bus": 11.5, "train": 24.0, "motorcyclist": 2.2, "cyclist": 1.8}
_HEROES = (
    ("train", "truck"),
    ("bus", "motorcyclist"),
    ("truck", "cyclist"),
    ("train", "bus"),
    ("motorcyclist", "cyclist"),
)
_SIDEWALK = (("person", 30), ("tree", 15), ("pole", 10), ("sign", 10), ("light", 6), ("bicycle", 12), ("motorcycle", 7),
             ("bush", 4), ("bollard", 5), ("clutter", 3))  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing of the scene. `far_m` ends what has a length along the street; `seed` draws its looks."""

    kind: str
    lateral_m: float
    along_m: float
    seed: str
    yaw: float = 0.0  # where it faces: radians from the street's own direction towards the right
    far_m: float = 0.0
    side: int = 0

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Lateral from, to, along from, to: the base, for what hides what and what has room."""
        if self.far_m:
            out = self.lateral_m + self.side * (14.0 if self.kind == "building" else 0.5)
            return min(self.lateral_m, out), max(self.lateral_m, out), self.along_m, self.far_m
        half = LENGTH_M.get(self.kind, 0.6) / 2
        wide = 1.2 if half > 1.5 else 0.3
        s, c = abs(math.sin(self.yaw)), abs(math.cos(self.yaw))
        x, z = wide * c + half * s, wide * s + half * c
        return self.lateral_m - x, self.lateral_m + x, self.along_m - z, self.along_m + z


@dataclass(frozen=True)
class Scene:
    street: Street
    items: tuple[Item, ...]  # far to near
    rails: tuple[float, ...]  # lateral places of tram tracks


class _Draft:
    """The items placed so far; gives each item its own seed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: list[Item] = []

    def free(self, lateral: float, along: float, half_x: float, half_z: float) -> bool:
        """True if no vehicle overlaps this rectangle."""
        for item in self.items:
            if item.kind in LENGTH_M:
                x0, x1, z0, z1 = item.extent
                if x0 < lateral + half_x and x1 > lateral - half_x and z0 < along + half_z and z1 > along - half_z:
                    return False
        return True

    def put(self, kind: str, lateral: float, along: float, yaw: float = 0.0, far: float = 0.0, side: int = 0) -> None:
        self.items.append(Item(kind, lateral, along, f"{self.name}/{len(self.items)}", yaw, far, side))


def draw_scene(seed: int, index: int) -> Scene:
    """A pure function of (seed, index)."""
    name = f"town/{seed}/{index}"
    rng = Random(f"{name}/scene")
    street = draw_street(rng, index)
    draft = _Draft(name)
    rails = _traffic(draft, rng, street, index)
    _parked(draft, rng, street)
    if street.crossing:
        _cross_traffic(draft, rng, street)
    for k, side in enumerate(street.sides):
        _frontage(draft, rng, street, side, index + k)
        _sidewalk(draft, rng, street, side, index + k)
    _walkers(draft, rng, street)
    return Scene(street, _far_to_near(draft.items), rails)


def _far_to_near(items: list[Item]) -> tuple[Item, ...]:
    """Sort items into painting order. An item can hide another only if it begins nearer to the camera, along the
    street or sideways; sorting by distance alone would paint people behind a long tram in front of it."""
    x0, x1, z0, z1 = np.array([i.extent for i in items]).T
    x0, x1, z0, z1 = x0 + 0.1, x1 - 0.1, z0 + 0.1, z1 - 0.1
    nearer = z1[:, None] <= z0[None, :]
    inner = ((x1[:, None] <= x0[None, :]) & (x0[None, :] > 0)) | ((x0[:, None] >= x1[None, :]) & (x1[None, :] < 0))
    before = nearer | inner  # [i, j]: i is not hidden by j
    middle = z0 + z1
    unclear = ~before & ~before.T
    hides = (before & ~before.T) | (unclear & (middle[:, None] < middle[None, :]))
    # Paint next the farthest item that hides no unpainted item. If items hide each other in a cycle, take the
    # farthest of those that hide the fewest.
    penalty = np.where(hides, 1e6, 0.0)
    score = middle - penalty.sum(axis=1)
    order = []
    for _ in items:
        k = int(score.argmax())
        order.append(items[k])
        score += penalty[:, k]
        score[k] = -np.inf
    return tuple(order)


def _traffic(draft: _Draft, rng: Random, street: Street, index: int) -> tuple[float, ...]:
    """Place vehicles lane by lane, the scheduled ones first and near. Returns lateral positions of tram tracks."""
    heroes = list(_HEROES[index % len(_HEROES)])
    if rng.random() < 0.4:
        heroes.reverse()
    lanes = sorted(street.lanes, key=lambda lane: rng.random() - 0.35 * (lane.centre_m != 0))
    rails = []
    for k, lane in enumerate(lanes):
        along = rng.uniform(6.0, 15.0) if k < 2 else rng.uniform(8.0, 30.0)
        first = heroes[k] if k < 2 else ""
        if first and lane.centre_m == 0.0:
            along += rng.uniform(1.5, 5.0)
        if first == "train" or rng.random() < 0.12:
            rails.append(lane.centre_m)
        while along < 75:
            kind = first or _vehicle(rng)
            first = ""
            length = LENGTH_M[kind]
            middle = along + length / 2
            aside = rng.gauss(0, 0.15) if kind != "train" else 0.0
            if kind == "cyclist":
                aside = rng.uniform(0.3, 1.0) * (1 if lane.centre_m >= 0 else -1)
            yaw = math.pi if lane.oncoming else 0.0
            if not _crossed(street, along, along + length) or kind == "train" or middle < 14:
                draft.put(kind, lane.centre_m + aside, middle, yaw + (rng.gauss(0, 0.03) if kind != "train" else 0))
            along += length + rng.uniform(3, 22)
    return tuple(rails)


def _vehicle(rng: Random) -> str:
    kinds = ("car", "truck", "bus", "motorcyclist", "cyclist")
    return rng.choices(kinds, (58, 12, 10, 10, 10))[0]


def _crossed(street: Street, near_m: float, far_m: float) -> bool:
    return street.crossing is not None and near_m < street.crossing[1] and far_m > street.crossing[0]


def _parked(draft: _Draft, rng: Random, street: Street) -> None:
    for sign in street.parked:
        side = street.left if sign < 0 else street.right
        along = rng.uniform(5.0, 14.0)
        while along < 70:
            kind = rng.choices(("car", "truck", "motorcycle", "bicycle", ""), (66, 5, 8, 6, 15))[0]
            length = LENGTH_M.get(kind, 2.5)
            yaw = rng.choice((0.0, math.pi)) + rng.gauss(0, 0.02)
            if kind in ("motorcycle", "bicycle"):
                yaw += rng.choice((0.0, 1.1, -1.1))
            if kind and not _crossed(street, along - 2, along + length + 2):
                draft.put(kind, side.edge_m - sign * 1.15, along + length / 2, yaw)
            along += length + rng.uniform(0.8, 3.0)


def _cross_traffic(draft: _Draft, rng: Random, street: Street) -> None:
    assert street.crossing is not None
    start, end = street.crossing
    for lane in (Lane(start + 0.27 * (end - start), False), Lane(start + 0.73 * (end - start), True)):
        x = rng.uniform(-45, -10)
        while x < 40:
            kind = rng.choices(("car", "truck", "bus", "motorcyclist", "cyclist"), (45, 15, 15, 12, 13))[0]
            room = draft.free(x + LENGTH_M[kind] / 2, lane.centre_m, LENGTH_M[kind] / 2 + 0.5, 1.5)
            if rng.random() < 0.6 and room:
                yaw = -math.pi / 2 if lane.oncoming else math.pi / 2
                draft.put(kind, x + LENGTH_M[kind] / 2, lane.centre_m, yaw + rng.gauss(0, 0.05))
            x += LENGTH_M[kind] + rng.uniform(3, 20)


def _frontage(draft: _Draft, rng: Random, street: Street, side: Side, turn: int) -> None:
    """Buildings, walls, fences, hedges and open ground along one side; `turn` sets what comes first."""
    first = ("fence", "wall", "", "wall", "fence", "")[turn % 6]
    built = rng.choice((0.25, 0.5, 0.75))
    free = 1 - built
    weights = (built, 0.33 * free + 0.04, 0.36 * free + 0.06, 0.12 * free, 0.17 * free)
    along, end = rng.uniform(-2.0, 3.0), 110.0
    stretches = [(along, end)]
    if street.crossing:
        stretches = [(along, street.crossing[0] - 3), (street.crossing[1] + 3, end)]
    for along, end in stretches:
        while along < end - 2:
            kind = first or rng.choices(("building", "wall", "fence", "hedge", "open"), weights)[0]
            first = ""
            far = min(along + rng.uniform(9, 20), end)
            _segment(draft, rng, side, kind, along, far)
            along = far + (rng.uniform(0, 3) if rng.random() < 0.3 else 0.0)


def _segment(draft: _Draft, rng: Random, side: Side, kind: str, near: float, far: float) -> None:
    if kind == "building":
        draft.put("building", side.front_m + side.sign * rng.uniform(0, 0.5), near, far=far, side=side.sign)
        return
    behind = side.front_m + side.sign * rng.uniform(5, 12)
    if kind != "open":
        pieces = max(1, round((far - near) / 5))
        look = rng.randrange(1 << 30)
        for p in range(pieces):
            a, b = near + (far - near) * p / pieces, near + (far - near) * (p + 1) / pieces
            draft.items.append(Item(kind, side.front_m, a, f"{draft.name}/{look}", 0.0, b, side.sign))
    if rng.random() < 0.55:
        draft.put("building", behind, near, far=far, side=side.sign)
    else:
        for _ in range(rng.randrange(1, 4)):
            draft.put(rng.choice(("tree", "tree", "bush")), behind, rng.uniform(near, far))


def _sidewalk(draft: _Draft, rng: Random, street: Street, side: Side, turn: int) -> None:
    kinds, weights = zip(*_SIDEWALK, strict=True)
    scheduled = [("sign", "light", "pole")[turn % 3], "person", ("bicycle", "motorcycle")[turn % 2]]
    rng.shuffle(scheduled)
    along = rng.uniform(7.0, 10.0)
    while along < 50:
        kind = scheduled.pop() if scheduled else rng.choices(kinds, weights)[0]
        if scheduled or not _crossed(street, along - 1, along + 1):
            _on_sidewalk(draft, rng, side, kind, along)
        along += rng.uniform(1.2, 3.2) * (1 + along / 40)
    if street.crossing and rng.random() < 0.7:
        draft.put("light", side.edge_m + side.sign * 0.6, street.crossing[0] - 1.5, side=side.sign)


def _on_sidewalk(draft: _Draft, rng: Random, side: Side, kind: str, along: float) -> None:
    kerb = side.edge_m + side.sign * rng.uniform(0.4, 0.9)
    anywhere = side.walk_start_m + side.sign * rng.uniform(0.4, max(0.5, side.walk_m - 0.3))
    if kind == "person":
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            yaw = rng.choice((0.0, math.pi, rng.uniform(-3, 3))) + rng.gauss(0, 0.3)
            draft.put("person", anywhere + rng.uniform(-0.5, 0.5), along + rng.uniform(-0.5, 0.5), yaw)
    elif kind in ("bicycle", "motorcycle"):
        yaw = rng.choice((0.0, math.pi / 2, -math.pi / 2, math.pi)) + rng.gauss(0, 0.25)
        for n in range(rng.choice((1, 1, 2, 3)) if kind == "bicycle" else 1):
            draft.put(kind, anywhere, along + 0.7 * n, yaw + rng.gauss(0, 0.08))
    elif kind in ("tree", "bush"):
        draft.put(kind, kerb if side.verge_m else anywhere, along)
    elif kind == "clutter":
        draft.put(kind, anywhere, along, rng.uniform(-0.5, 0.5))
    else:
        draft.put(kind, kerb, along, side=side.sign)


def _walkers(draft: _Draft, rng: Random, street: Street) -> None:
    """People on the road, most of them crossing it."""
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        along = street.crossing[0] - 3 if street.crossing and rng.random() < 0.6 else rng.uniform(12, 35)
        lateral = rng.uniform(street.left.edge_m, street.right.edge_m)
        yaw = rng.choice((-1, 1)) * math.pi / 2 + rng.gauss(0, 0.4)
        if draft.free(lateral, along, 0.6, 0.8):
            draft.put("person", lateral, along, yaw)
