"""Random colors that hardly reveal the class: nearly all objects use the same wide range.

RGB, floats of 0..255, before light.
"""

from __future__ import annotations

import colorsys
from random import Random

RGB = tuple[float, float, float]


def hsv(hue: float, saturation: float, value: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * r, 255 * g, 255 * b


def painted(rng: Random) -> RGB:
    """Paint, cloth, plaster: greys of any brightness, muted colours, few vivid ones."""
    kind = rng.random()
    if kind < 0.45:
        return hsv(rng.random(), rng.uniform(0, 0.12), rng.uniform(0.12, 0.95))
    if kind < 0.8:
        return hsv(rng.random(), rng.uniform(0.15, 0.5), rng.uniform(0.25, 0.9))
    return hsv(rng.random(), rng.uniform(0.5, 0.95), rng.uniform(0.35, 0.95))


def masonry(rng: Random) -> RGB:
    """Facades and walls: as `painted`, with more brick, sand and grey."""
    if rng.random() < 0.35:
        return painted(rng)
    return hsv(rng.uniform(0.0, 0.14), rng.uniform(0.02, 0.5), rng.uniform(0.25, 0.92))


def mineral(rng: Random) -> RGB:
    """Asphalt, slabs, concrete: one range for road, sidewalk and wall."""
    return hsv(
        rng.uniform(0.0, 0.2) if rng.random() < 0.6 else rng.uniform(0.5, 0.7),
        rng.uniform(0, 0.16),
        rng.uniform(0.24, 0.66),
    )


def plant(rng: Random) -> RGB:
    """Leaves and lawns, one range: fresh, dark, dry, autumn."""
    kind = rng.random()
    if kind < 0.7:
        return hsv(rng.uniform(0.17, 0.36), rng.uniform(0.2, 0.6), rng.uniform(0.25, 0.6))
    return hsv(rng.uniform(0.05, 0.17), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.65))


def soil(rng: Random) -> RGB:
    """Terrain: lawn, or bare ground as grey and brown as any pavement."""
    if rng.random() < 0.65:
        return plant(rng)
    return hsv(rng.uniform(0.04, 0.14), rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.65))


def skin(rng: Random) -> RGB:
    return hsv(rng.uniform(0.03, 0.08), rng.uniform(0.25, 0.6), rng.uniform(0.3, 0.9))


def dark(rng: Random) -> RGB:
    return hsv(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.06, 0.22))


def scaled(colour: RGB, factor: float) -> RGB:
    r, g, b = colour
    return min(255.0, r * factor), min(255.0, g * factor), min(255.0, b * factor)
