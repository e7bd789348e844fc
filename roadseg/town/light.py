"""The light of a scene by weather: sun, sky light, haze and exposure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from roadseg.town.colours import hsv

Weather = Literal["clear", "night", "fog", "rain"]


@dataclass(frozen=True)
class Light:
    """RGB [3] factors on a colour: `direct` where the sun stands upright on a face, `ambient` anywhere."""

    weather: Weather
    sun: np.ndarray  # [3], unit vector towards the sun
    direct: np.ndarray
    ambient: np.ndarray
    shadow: float  # brightness of the ground in shadow, relative to lit ground
    haze_rgb: np.ndarray
    haze_per_m: float
    exposure: float
    balance: np.ndarray  # [3], white balance
    contrast: float
    blur_px: float  # sigma, at a frame 512 px wide
    noise: float  # standard deviation, grey levels

    @property
    def night(self) -> bool:
        return self.weather == "night"

    def shade(self, normals_N3: np.ndarray) -> np.ndarray:
        """[N, 3]: the factors on faces of these normals."""
        facing = np.maximum(normals_N3 @ self.sun, 0.0)[:, None]
        up = 0.8 + 0.2 * normals_N3[:, 1:2]
        return self.ambient * up + self.direct * facing

    @property
    def level(self) -> np.ndarray:
        """[3]: the factors on things without a clear normal: people, leaves, thin rods."""
        return self.ambient + 0.55 * self.direct


def draw_light(rng: Random, weather: Weather) -> Light:
    """The same draws in every weather, so that a scene's weathers differ in light alone."""
    azimuth, height = rng.uniform(-math.pi, math.pi), rng.uniform(0.25, 1.2)
    sun = np.array([math.sin(azimuth) * math.cos(height), math.sin(height), math.cos(azimuth) * math.cos(height)])
    overcast = rng.random() < 0.45
    strength = rng.uniform(0.0, 0.15) if overcast else rng.uniform(0.35, 0.75)
    warm = np.array(hsv(rng.uniform(0.06, 0.14), rng.uniform(0, 0.3) * (1.3 - height), 1.0)) / 255
    cold = np.array(hsv(rng.uniform(0.55, 0.65), rng.uniform(0, 0.22), 1.0)) / 255
    tint = np.array([rng.gauss(1, 0.05), 1.0, rng.gauss(1, 0.06)])
    exposure, contrast = math.exp(rng.gauss(0.08, 0.2)), rng.uniform(0.85, 1.2)
    haze, blur, noise = rng.uniform(0.0005, 0.004), rng.uniform(0.0, 0.7), rng.uniform(1.0, 5.0)
    extra = rng.random()
    grey = np.array([1.0, 1.0, 1.0])
    sky_rgb = 255 * cold * rng.uniform(0.75, 0.95)
    ambient = cold * (1.02 - 0.55 * strength)
    day = (sun, warm * strength * 1.15, ambient, 1.0 - 0.75 * strength)
    if weather == "night":
        moon = cold * np.array([0.75, 0.85, 1.1])
        night_rgb = 16 * moon + 22 * warm * extra
        return Light(weather, sun, 0.04 * moon, 0.42 * moon, 0.9, night_rgb, haze, exposure, tint, 1.1, blur, noise + 4)
    if weather == "fog":
        fog_rgb = 255 * (0.6 + 0.3 * extra) * (0.7 * grey + 0.3 * cold)
        return Light(
            weather, sun, 0.1 * warm, 0.85 * cold, 0.9, fog_rgb, 0.02 + 0.03 * extra, exposure, tint, 0.9, blur, noise
        )
    if weather == "rain":
        wet_rgb = 255 * (0.45 + 0.25 * extra) * (0.6 * grey + 0.4 * cold)
        return Light(
            weather,
            sun,
            0.05 * warm,
            0.7 * cold,
            0.95,
            wet_rgb,
            0.006,
            exposure,
            tint,
            contrast,
            blur + 0.35,
            noise + 1,
        )
    return Light(weather, *day, sky_rgb, haze, exposure, tint, contrast, blur, noise)
