"""Precomputed texture tiles, the same in every process: noise, ground, facades, walls, fences, crowns.

Facades, walls and hedges are uint8 [h, w, 3]: the weights of three materials out of four, the last
being what is missing to 255 (three channels are coloured 20 times faster than four). A scene gives
the materials their colours. A fence is uint8 [h, w, 4], two materials, nothing, and its opacity;
crowns are uint8 [s, s, 2], brightness and opacity. Each tile comes as mips, halved each time.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

MIPS = 5
CELL_PX = 64  # of a facade: one bay wide, one floor high


@cache
def noise(size_px: int, cells: int, stream: int) -> np.ndarray:
    """float32 [size, size], zero mean, unit deviation, tileable; smooth over size / cells px."""
    rng = np.random.default_rng([stream, cells])
    grid = np.pad(rng.standard_normal((cells, cells)).astype(np.float32), 2, mode="wrap")
    scale = size_px / cells
    big = cv2.resize(grid, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    start = round(2 * scale)
    tile = big[start : start + size_px, start : start + size_px]
    return (tile - tile.mean()) / tile.std()


def fractal(size_px: int, first_cells: int, octaves: int, stream: int) -> np.ndarray:
    """Noise of several scales, each octave 0.6 times as strong as the one before; unit deviation."""
    total = np.zeros((size_px, size_px), np.float32)
    for o in range(octaves):
        total += 0.6**o * noise(size_px, min(first_cells << o, size_px), stream + o)
    return total / total.std()


def mipped(tile: np.ndarray) -> tuple[np.ndarray, ...]:
    levels = [tile]
    for _ in range(MIPS - 1):
        h, w = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (max(w // 2, 2), max(h // 2, 2)), interpolation=cv2.INTER_AREA))
    return tuple(levels)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@cache
def grain() -> np.ndarray:
    """uint8 [1024, 1024, 3], 128 neutral: sensor noise of unit deviation = 16."""
    rng = np.random.default_rng(101)
    return _bytes(128 + 16 * rng.standard_normal((1024, 1024, 3), np.float32))


@cache
def clouds() -> np.ndarray:
    """uint8 [512, 512]: 0 clear to 255 thick."""
    return _bytes(128 + 70 * fractal(512, 4, 6, 11))


GROUND_PX, GROUND_PX_PER_M = 1024, 48


@cache
def ground(pavers: bool) -> np.ndarray:
    """uint8 [3 * GROUND_PX, GROUND_PX], 128 neutral, one below the other: asphalt, slabs or small pavers, lawn."""
    fine = noise(1024, 512, 21)
    asphalt = 128 + 16 * fine + 9 * fractal(1024, 16, 4, 22) - 40 * (noise(1024, 256, 27) > 2.1)
    paved = 128 + (_paving(16, 8, 8, 32) if pavers else _paving(32, 32, 0, 31)) + 6 * fine
    lawn = 128 + 26 * noise(1024, 256, 24) + 16 * fractal(1024, 8, 4, 25) + 14 * fine
    return np.concatenate([_bytes(a) for a in (asphalt, paved, lawn)])


def _paving(long_px: int, short_px: int, shift_px: int, stream: int) -> np.ndarray:
    """Stones of long x short px with dark joints; every second row shifted."""
    rng = np.random.default_rng(stream)
    v, u = np.mgrid[0:1024, 0:1024]
    row = v // short_px
    u = (u + (row % 2) * shift_px) % 1024
    tone = rng.normal(0, 13, (1024 // short_px, 1024 // long_px))[row, u // long_px]
    joint = (v % short_px < 2) | (u % long_px < 2)
    return np.where(joint, -52.0, tone)


@cache
def patches() -> np.ndarray:
    """uint8 [256, 256], 128 neutral: stains some metres wide, on any ground."""
    return _bytes(128 + 30 * fractal(256, 8, 4, 41))


# Facade materials: wall, dark glass, glass that is lit at night, trim. What is dark on any of them
# (joints, stains) is mixed from it and the glass.
WALL, GLASS, LIT, TRIM = range(4)


def _mixed(weight: np.ndarray, material: int = WALL) -> np.ndarray:
    """uint8 [h, w, 3]: this much (0..255) of a material, the rest glass."""
    tile = np.zeros((*weight.shape, 3), np.uint8)
    if material != TRIM:
        tile[..., material] = _bytes(weight)
    if material != GLASS:
        tile[..., GLASS] = 255 - _bytes(weight)
    return tile


def _rect(tile: np.ndarray, material: int, x0: float, y0: float, x1: float, y1: float, weight: float = 255) -> None:
    """Put one material into a part of a tile; coordinates in 0..1 of the tile."""
    h, w = tile.shape[:2]
    part = tile[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)]
    part[:] = _mixed(np.full(part.shape[:2], weight), material)


def _window(cell: np.ndarray, style: int, glass: int) -> None:
    """One floor of one bay: style 0..5 are casement, tall, band, shutters, balcony, twin."""
    x0, x1, y0, y1 = ((0.28, 0.72, 0.22, 0.78), (0.32, 0.68, 0.12, 0.88), (0.04, 0.96, 0.3, 0.8),
                      (0.32, 0.68, 0.2, 0.76), (0.2, 0.8, 0.15, 0.92), (0.16, 0.84, 0.25, 0.75))[style]  # fmt: skip
    if style == 3:
        _rect(cell, TRIM, x0 - 0.17, y0, x1 + 0.17, y1, 210)
    _rect(cell, TRIM, x0 - 0.05, y0 - 0.05, x1 + 0.05, y1 + 0.07)
    _rect(cell, glass, x0, y0, x1, y1)
    if style in (0, 3, 5):
        _rect(cell, TRIM, 0.48, y0, 0.52, y1)
    if style in (0, 1):
        _rect(cell, TRIM, x0, y0 + 0.2, x1, y0 + 0.24)
    if style == 4:
        _rect(cell, TRIM, 0.1, 0.62, 0.9, 0.68)
        for i in range(9):
            _rect(cell, TRIM, 0.1 + 0.09 * i, 0.68, 0.125 + 0.09 * i, 0.97, 180)
        _rect(cell, WALL, 0.06, 0.95, 0.94, 1.0, 150)


def _street_floor(cell: np.ndarray, style: int, glass: int) -> None:
    """The ground floor of one bay: style 0 shop, 1 door, 2 gate, 3 and up a window."""
    if style == 0:
        _rect(cell, TRIM, 0.02, 0.05, 0.98, 0.25)
        _rect(cell, glass, 0.06, 0.28, 0.94, 0.88)
        _rect(cell, TRIM, 0.48, 0.28, 0.52, 0.88)
    elif style == 1:
        _rect(cell, TRIM, 0.3, 0.2, 0.7, 1.0)
        _rect(cell, glass, 0.36, 0.25, 0.64, 0.5, 200)
    elif style == 2:
        _rect(cell, TRIM, 0.1, 0.2, 0.9, 1.0, 170)
        for i in range(4):
            _rect(cell, TRIM, 0.1, 0.3 + 0.17 * i, 0.9, 0.32 + 0.17 * i, 90)
    else:
        _window(cell, 0, glass)


def _masonry(h: int, w: int, kind: int, stream: int) -> np.ndarray:
    """float32 [h, w], about 0..255: plaster, brick, panels, blocks."""
    size = 512
    base = 225 + 7 * fractal(size, 4, 6, stream)
    v, u = np.mgrid[0:size, 0:size]
    if kind in (1, 3):
        rows, length = ((8, 16), (32, 64))[kind == 3]
        row = v // rows
        shifted = (u + (row % 2) * length // 2) % size
        tone = np.random.default_rng(stream).normal(0, 16, (size // rows, size // length))
        joint = (v % rows < max(1, rows // 8)) | (shifted % length < max(1, rows // 8))
        base = np.where(joint, base - 65, base + tone[row, shifted // length])
    elif kind == 2:
        base = np.where((v % 64 < 2) | (u % 128 < 2), base - 70, base)
    return np.tile(base, (-(-h // size), -(-w // size)))[:h, :w]


@cache
def facades() -> tuple[tuple[int, int, tuple[np.ndarray, ...]], ...]:
    """(floors, bays, mips) of each facade."""
    made = []
    for n in range(24):
        rng = np.random.default_rng([61, n])
        floors, bays = int(rng.integers(2, 8)), int(rng.integers(2, 6))
        h, w = floors * CELL_PX, bays * CELL_PX
        tile = _mixed(_masonry(h, w, int(rng.integers(0, 4)), 70 + n))
        style, street = int(rng.integers(0, 6)), int(rng.integers(0, 4))
        for f in range(floors):
            for b in range(bays):
                cell = tile[f * CELL_PX : (f + 1) * CELL_PX, b * CELL_PX : (b + 1) * CELL_PX]
                glass = GLASS if rng.random() < 0.55 else LIT
                if f < floors - 1:
                    _window(cell, style, glass)
                else:
                    _street_floor(cell, 1 if b == bays // 2 and street else street, glass)
            if rng.random() < 0.3:
                _rect(tile, TRIM, 0, (f + 0.96) / floors, 1, (f + 1) / floors, 200)
        _rect(tile, TRIM, 0, 0, 1, 0.12 / floors, 235)
        made.append((floors, bays, mipped(tile)))
    return tuple(made)


@cache
def walls() -> tuple[tuple[np.ndarray, ...], ...]:
    """Mips of walls, 4:1: masonry, coping as trim, stains at the foot, some with posters or paint."""
    made = []
    for n in range(8):
        rng = np.random.default_rng([62, n])
        tile = _mixed(_masonry(128, 512, 1 + n % 3, 170 + n) - 60 * np.linspace(0, 1, 128)[:, None] ** 4)
        if n % 2:
            _rect(tile, TRIM, 0, 0, 1, 0.09)
        if n % 3 == 0:
            for k in range(5):
                _rect(tile, TRIM, 0.2 * k, 0, 0.2 * k + 0.04, 1, 220)
        if n in (2, 5):
            x = float(rng.uniform(0.1, 0.7))
            blob = cv2.resize(fractal(128, 4, 3, 180 + n), (110, 70)) > 0.2
            part = tile[40:110, round(x * 512) : round(x * 512) + 110]
            part[blob] = (60, 0, 195)
        made.append(mipped(tile))
    return tuple(made)


@cache
def fences() -> tuple[tuple[np.ndarray, ...], ...]:
    """Mips of fences, 4:1: pickets, bars, lattice, boards, hoarding mesh; last channel opacity."""
    v, u = np.mgrid[0:128, 0:512]
    post = (u % 128 < 9) & (v > 2)
    rails = (abs(v - 26) < 5) | (abs(v - 102) < 5)
    kinds = (
        (u % 32 < 19) & (v > 4 + 0.5 * abs(u % 32 - 9)),
        (u % 16 < 5) & (v > 6),
        ((u + v) % 24 < 4) | ((u - v) % 24 < 4) | (v < 5),
        (v % 32 < 19) & (v > 6),
        ((u % 12 < 3) | (v % 12 < 3)) & (v > 3),
    )
    made = []
    for n, kind in enumerate(kinds):
        shown = kind | post | (rails if n in (0, 1) else post)
        tone = np.clip(210 + 14 * np.tile(noise(128, 32, 190 + n), (1, 4)), 0, 255)
        tile = np.zeros((128, 512, 4), np.uint8)
        tile[..., 0] = np.where(kind & ~post, tone, 0)
        tile[..., 1] = np.where(shown & ~(kind & ~post), tone - 30, 0)
        tile[..., 3] = np.where(shown, 255, 0)
        made.append(mipped(tile))
    return tuple(made)


@cache
def foliage() -> tuple[np.ndarray, ...]:
    """Mips of a clipped hedge, 4:1; leaves as wall, gaps as glass."""
    leaves = np.tile(0.7 * noise(128, 32, 201) + 0.6 * noise(128, 64, 202) + 0.4 * noise(128, 8, 203), (1, 4))
    return mipped(_mixed(150 + 55 * leaves - 50 * np.linspace(0, 1, 128)[:, None] ** 2))


@cache
def crowns() -> tuple[tuple[np.ndarray, ...], ...]:
    """Mips of tree crowns and bushes, lit from the upper left: 0-6 round, 7-9 tall, 10-12 firs, 13-15 bushes."""
    size = 256
    v, u = np.mgrid[0:size, 0:size].astype(np.float32) / size
    made = []
    for n in range(16):
        rng = np.random.default_rng([63, n])
        rough = fractal(size, 12, 4, 300 + 8 * n)
        leaves = 0.8 * noise(size, 40, 306 + 8 * n) + 0.7 * noise(size, 100, 307 + 8 * n)
        if 10 <= n < 13:
            body = 0.46 * v - abs(u - 0.5) + 0.035 * np.sin(v * 60)
            light = 0.3 - 0.9 * (u - 0.5) + 0.5 * np.sin(v * 60 + 0.8)
        else:
            wide, tall = (0.27, 0.42) if 7 <= n < 10 else (0.42, 0.42)
            body, light = np.full_like(u, -1.0), np.zeros_like(u)
            for _ in range(9):
                cx, cy = 0.5 + rng.uniform(-0.55, 0.55) * wide, 0.52 + rng.uniform(-0.55, 0.5) * tall
                blob = rng.uniform(0.45, 0.62) * wide - np.hypot(u - cx, v - cy)
                light = np.where(blob > body, 3.0 * ((cx - u) + 1.3 * (cy - v)), light)
                body = np.maximum(body, blob)
        opacity = _bytes(127.5 + 2200 * (body + 0.016 * rough))
        made.append(mipped(np.dstack([_bytes(120 + 62 * light + 34 * leaves + 10 * rough), _filled(opacity)])))
    return tuple(made)


def _filled(opacity: np.ndarray) -> np.ndarray:
    """Without holes inside the outline, so that an outline says all of a shape."""
    outlines, _ = cv2.findContours((opacity > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    solid = cv2.drawContours(np.zeros_like(opacity), outlines, -1, 255, cv2.FILLED)
    return np.where((solid > 0) & (opacity < 128), 255, opacity).astype(np.uint8)
