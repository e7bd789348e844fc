"""What a picture looks like, in a few hundred bytes: exposure, sharpness, colour, and a descriptor of its content."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Look:
    """Measured on uint8 [H, W, 3] RGB, reduced by area averaging.

    mean_rgb, std_rgb: by channel, 0..255. dark, bright: shares of pixels (0..1) whose luma is at most 8,
    at least 247. sharpness: see look_of. descriptor: what near-duplicates are found by.
    """

    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float]
    dark: float
    bright: float
    sharpness: float
    descriptor: bytes


def look_of(image: np.ndarray) -> Look:
    small = cv2.resize(image, (256, 128), interpolation=cv2.INTER_AREA)
    luma = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    mean, std = cv2.meanStdDev(small)
    return Look(
        tuple(float(v) for v in mean.ravel()),  # type: ignore[arg-type]
        tuple(float(v) for v in std.ravel()),  # type: ignore[arg-type]
        float((luma <= 8).mean()),
        float((luma >= 247).mean()),
        float(cv2.Laplacian(luma, cv2.CV_32F).var()),
        cv2.resize(luma, (32, 16), interpolation=cv2.INTER_AREA).tobytes(),
    )
