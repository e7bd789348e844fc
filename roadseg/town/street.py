"""The street of a scene: its course, cross-section and lanes.

Places are given as (lateral, along): metres to the right of the camera's lane centre, and metres ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np


@dataclass(frozen=True)
class Lane:
    centre_m: float
    oncoming: bool


@dataclass(frozen=True)
class Side:
    """One side of the road; widths in metres, from the road's edge outwards."""

    sign: int  # -1 left, +1 right
    edge_m: float  # lateral place of the road's edge
    verge_m: float  # a strip of terrain between road and sidewalk, 0 for none
    walk_m: float
    front_m: float  # lateral place of walls and facades
    green: bool  # whether what lies beyond the sidewalk is terrain; else it is paved

    @property
    def walk_start_m(self) -> float:
        return self.edge_m + self.sign * self.verge_m

    @property
    def walk_end_m(self) -> float:
        return self.walk_start_m + self.sign * self.walk_m


@dataclass(frozen=True)
class Street:
    curve_per_m: float
    lanes: tuple[Lane, ...]
    lane_m: float
    left: Side
    right: Side
    parked: tuple[int, ...]  # the sides (-1, +1) with a strip of parked cars, inside the road's edge
    crossing: tuple[float, float] | None  # a road across, from .. to metres ahead

    def at(self, lateral_m: float, along_m: float, up_m: float = 0.0) -> np.ndarray:
        """float64 [3], world."""
        return np.array([lateral_m + 0.5 * self.curve_per_m * along_m * along_m, up_m, along_m])

    def line(self, lateral_m: float, along_N: np.ndarray, up_m: float = 0.0) -> np.ndarray:
        """float64 [N, 3]: the points of one lateral place."""
        x = lateral_m + 0.5 * self.curve_per_m * along_N * along_N
        return np.column_stack([x, np.full_like(x, up_m), along_N])

    def heading(self, along_m: float) -> float:
        """Radians from z towards x."""
        return float(np.arctan(self.curve_per_m * along_m))

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.left, self.right


def draw_street(rng: Random, index: int) -> Street:
    """`index` sets which side is green, so that any two neighbouring scenes have terrain."""
    same = rng.choice((1, 1, 2))
    other = rng.choice((1, 1, 2)) if same == 1 or rng.random() < 0.8 else 0
    own, width = rng.randrange(same), rng.uniform(3.0, 3.6)
    hand = 1 if rng.random() < 0.7 else -1
    lanes = [Lane(hand * width * (i - own), False) for i in range(same)]
    lanes += [Lane(-hand * width * (own + 1 + i), True) for i in range(other)]
    parked = tuple(side for side in (-1, 1) if rng.random() < 0.4)
    low = min(lane.centre_m for lane in lanes) - width / 2
    high = max(lane.centre_m for lane in lanes) + width / 2
    edges = {-1: low - (2.3 if -1 in parked else 0.3), 1: high + (2.3 if 1 in parked else 0.3)}
    sides = []
    for k, sign in enumerate((-1, 1)):
        green = (index + k) % 2 == 0 or rng.random() < 0.3
        verge = rng.uniform(1.2, 3.5) if rng.random() < (0.4 if green else 0.15) else 0.0
        walk = rng.uniform(1.8, 4.5)
        gap = rng.uniform(1.5, 7.0) if green else rng.uniform(0.0, 0.8)
        sides.append(Side(sign, edges[sign], verge, walk, edges[sign] + sign * (verge + walk + gap), green))
    start = rng.uniform(16, 50)
    crossing = (start, start + rng.uniform(7, 12)) if rng.random() < 0.45 else None
    curve = min(max(rng.gauss(0, 0.0022), -0.005), 0.005)
    return Street(curve, tuple(lanes), width, sides[0], sides[1], parked, crossing)
