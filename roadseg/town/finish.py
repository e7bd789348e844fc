"""Simulate haze, lamps, rain, lens and sensor on the painted scene."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np

from roadseg.town import textures
from roadseg.town.canvas import Canvas
from roadseg.town.ground import ROAD


def photograph(canvas: Canvas, rng: Random) -> np.ndarray:
    """uint8 [H, W, 3]: the canvas's picture as the camera records it."""
    image = canvas.image
    light = canvas.light
    if light.weather == "rain":
        image = _wet_road(canvas, image)
    image = _haze(canvas, image)
    if light.night:
        image = _night(canvas, image)
    if light.weather == "rain":
        image = _rain(image, rng)
    sigma = light.blur_px * canvas.camera.width_px / 512
    if sigma > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return _sensor(canvas, image, rng)


def _haze(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """Mix in the haze by depth; 1 / depth is affine in the pixel on every object."""
    light = canvas.light
    fog = light.weather == "fog"
    # Thin haze is smooth enough for half the size.
    step = 1 if fog else 2
    objects = canvas.objects[::step, ::step]
    h, w = objects.shape
    planes = np.array(canvas.planes, np.float32)
    inverse = np.take(planes[:, 0], objects)
    inverse += np.take(planes[:, 1], objects) * np.arange(0, step * w, step, dtype=np.float32)[None, :]
    inverse += np.take(planes[:, 2], objects) * np.arange(0, step * h, step, dtype=np.float32)[:, None]
    clear = cv2.exp(np.float32(-light.haze_per_m) / np.maximum(inverse, np.float32(1 / 400)))
    # The sky was painted in its own colours; only fog hides it.
    clear[objects <= 1] = 0.1 if fog else 1.0
    veil_px = np.asarray(255 * (1 - clear), np.uint8)
    if not fog:
        veil_px = np.asarray(cv2.resize(veil_px, image.shape[1::-1], interpolation=cv2.INTER_NEAREST))
    opaque = cv2.cvtColor(veil_px, cv2.COLOR_GRAY2RGB)
    veil = np.arange(256)[:, None] * light.haze_rgb / 255
    return cv2.add(
        cv2.multiply(image, 255 - opaque, scale=1 / 255), cv2.LUT(opaque, veil.clip(0, 255).astype(np.uint8)[None])
    )


def _night(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """The reach of the camera's own headlights, then the glow of every lamp that is not hidden."""
    h, w = canvas.objects.shape
    u = (np.arange(w, dtype=np.float32) / w - 0.5)[None, :]
    v = (np.arange(h, dtype=np.float32) / h - 0.62)[:, None]
    reach = 1 + 1.5 * np.exp(-(u**2 / 0.08 + v**2 / 0.02))
    image = cv2.multiply(image, cv2.merge([reach.astype(np.float32)] * 3), dtype=cv2.CV_8U)
    glow = np.zeros((h, w, 3), np.float32)
    for lamp in canvas.lamps:
        x, y = round(lamp.u), round(lamp.v)
        if not (0 <= x < w and 0 <= y < h) or canvas.objects[y, x] != lamp.number:
            continue
        r = float(np.clip(lamp.radius_px, 2, w / 8))
        x0, x1, y0, y1 = (
            max(int(x - 2 * r), 0),
            min(int(x + 2 * r) + 1, w),
            max(int(y - 2 * r), 0),
            min(int(y + 2 * r) + 1, h),
        )
        du = (np.arange(x0, x1, dtype=np.float32) - lamp.u)[None, :]
        dv = (np.arange(y0, y1, dtype=np.float32) - lamp.v)[:, None]
        away = (du * du + dv * dv) / (r * r)
        shape = 0.35 * np.exp(-3 * away) + 0.9 * np.exp(-60 * away)
        glow[y0:y1, x0:x1] += shape[..., None] * np.array(lamp.colour, np.float32)
    return np.clip(image + glow, 0, 255).astype(np.uint8)


def _wet_road(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """The road mirrors what stands above the horizon, smeared along the view."""
    h, w = canvas.objects.shape
    middle = int(np.clip(np.mean(canvas.camera.horizon_px), 1, h - 2))
    rows = np.clip(2 * middle - np.arange(middle, h), 0, h - 1)
    mirror = cv2.blur(np.ascontiguousarray(image[rows]), (max(1, w // 170), max(3, h // 12)))
    road = np.array(canvas.labels)[canvas.objects[middle:]] == ROAD
    lower = image[middle:]
    wet = cv2.addWeighted(lower, 0.5, mirror, 0.45, 0)
    image = image.copy()
    image[middle:][road] = wet[road]
    return image


def _rain(image: np.ndarray, rng: Random) -> np.ndarray:
    """Streaks of falling drops, and drops on the windscreen that smear what is behind them."""
    h, w = image.shape[:2]
    image = image.copy()
    smear = cv2.blur(image, (max(3, w // 60), max(3, w // 60)))
    spots = np.zeros((h, w), np.uint8)
    for _ in range(rng.randrange(4, 14)):
        r = max(1, round(w * rng.uniform(0.004, 0.014)))
        cv2.circle(spots, (rng.randrange(w), rng.randrange(h)), r, 255, cv2.FILLED)
    cv2.copyTo(smear, spots, image)
    streaks = np.zeros((h, w), np.uint8)
    slant = rng.uniform(-0.25, 0.25)
    for _ in range(260):
        u, v, long = rng.uniform(0, w), rng.uniform(-0.1 * h, h), h * rng.uniform(0.03, 0.1)
        ends = np.array([[u, v], [u + slant * long, v + long]]) * 16
        (a, b), (c, d) = ends.astype(int).tolist()
        cv2.line(streaks, (a, b), (c, d), rng.randrange(20, 60), 1, cv2.LINE_AA, 4)
    return cv2.add(image, cv2.cvtColor(streaks, cv2.COLOR_GRAY2RGB))


def _sensor(canvas: Canvas, image: np.ndarray, rng: Random) -> np.ndarray:
    """Exposure, white balance, contrast, vignette and noise."""
    light = canvas.light
    h, w = image.shape[:2]
    tone = np.arange(256, dtype=np.float64)[:, None] * light.exposure * light.balance
    tone = 128 + (tone - 128) * light.contrast
    # A shoulder instead of clipping: highlights keep some drawing.
    tone = np.where(tone > 200, 200 + 55 * np.tanh((tone - 200) / 70), tone)
    table = np.clip(tone, 0, 255).astype(np.uint8)[None]
    image = cv2.LUT(image, table)
    across, down = (np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in (w, h))
    edge = np.float32(127.5 * rng.uniform(0.0, 0.3)) * (across[None, :] + down[:, None])
    image = cv2.multiply(image, cv2.cvtColor(255 - edge.astype(np.uint8), cv2.COLOR_GRAY2RGB), scale=1 / 255)
    # The tile has deviation 16 around 128.
    amount = light.noise / 16
    return cv2.addWeighted(image, 1.0, _cut(textures.grain(), h, w, rng), amount, -128 * amount)


def _cut(tile: np.ndarray, h: int, w: int, rng: Random) -> np.ndarray:
    """h x w px of a tile that repeats, from a random place."""
    th, tw = tile.shape[:2]
    if h > th or w > tw:
        tile = np.tile(tile, (-(-h // th) + 1, -(-w // tw) + 1, 1))
    y, x = rng.randrange(tile.shape[0] - h + 1), rng.randrange(tile.shape[1] - w + 1)
    return np.ascontiguousarray(tile[y : y + h, x : x + w])
