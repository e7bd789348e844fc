"""The sky: a gradient, clouds, and the sun's glow."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np

from roadseg.town import textures
from roadseg.town.canvas import SKY_NUMBER, Canvas
from roadseg.town.colours import hsv

SKY = 23


def paint_sky(canvas: Canvas, rng: Random) -> None:
    """Fill the whole frame with sky, as the first object."""
    camera, light = canvas.camera, canvas.light
    h, w = camera.height_px, camera.width_px
    zenith = np.array(hsv(rng.uniform(0.54, 0.64), rng.uniform(0.0, 0.65), rng.uniform(0.45, 0.9)))
    low = np.array(hsv(rng.choice((0.09, 0.57, 0.6)), rng.uniform(0.0, 0.3), rng.uniform(0.7, 1.0)))
    cloud = np.array(hsv(0.6, rng.uniform(0, 0.1), rng.uniform(0.5, 1.0)))
    cover, x, y, zoom = rng.uniform(-0.5, 1.0), rng.randrange(512), rng.randrange(512), rng.uniform(0.6, 1.6)
    if light.night:
        zenith, low, cloud = 0.05 * zenith + light.haze_rgb * 0.4, light.haze_rgb, light.haze_rgb * 1.3
    elif light.weather in ("fog", "rain"):
        zenith, low, cloud = light.haze_rgb * 0.95, light.haze_rgb, light.haze_rgb * 1.08
    number = canvas.begin(SKY, np.array([[0.0, 0.0], [w - 1.0, h - 1.0]]), 1e5)
    assert number == SKY_NUMBER
    canvas.objects[:] = number
    # All of it is smooth: drawn at a quarter of the size, from the top to the horizon.
    horizon = float(np.clip(max(camera.horizon_px), 1, h))
    rows = min(h, int(horizon) + 4)
    v = np.linspace(0, rows / horizon, max(2, rows // 4), dtype=np.float32)[:, None]
    side = np.linspace(-0.5, 0.5, max(2, w // 4), dtype=np.float32)[None, :]
    t = np.minimum(v, 1) ** 1.3
    # Clouds flatten towards the horizon, as a layer seen from below does.
    u = side * (260 * zoom * (1 + 1.2 * v)) + x
    down = np.repeat(y + 220 * zoom * v * (1 + 1.5 * v), u.shape[1], axis=1)
    layer = cv2.remap(textures.clouds(), u, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    thick = np.clip((layer.astype(np.float32) / 128 - 1 + cover) * 1.2, 0, 1)[..., None]
    clear = ((1 - t) * zenith + t * low).astype(np.float32)[:, None]
    small = clear + (cloud.astype(np.float32) - clear) * thick + _halo(canvas, small_shape=thick.shape[:2], rows=rows)
    canvas.image[:rows] = cv2.resize(np.clip(small, 0, 255).astype(np.uint8), (w, rows), interpolation=cv2.INTER_LINEAR)
    canvas.image[rows:] = np.clip(low, 0, 255)


def _halo(canvas: Canvas, small_shape: tuple[int, int], rows: int) -> np.ndarray:
    """float32 [h, w, 3] to add: the sun's disc and halo, where it stands in view and shines; or [1]."""
    camera, light = canvas.camera, canvas.light
    uv, depth = camera.project((camera.position + 1000 * light.sun)[None])
    if depth[0] <= 0 or light.weather != "clear" or light.direct.max() < 0.25:
        return np.zeros(1, np.float32)
    v = np.linspace(0, rows, small_shape[0], dtype=np.float32)[:, None] - float(uv[0, 1])
    u = np.linspace(0, camera.width_px, small_shape[1], dtype=np.float32)[None, :] - float(uv[0, 0])
    away = (u * u + v * v) / (0.03 * camera.focal_px) ** 2
    return (170 / (1 + 0.35 * away))[..., None] * np.array([1.0, 0.95, 0.8], np.float32)
