"""Upsample logits and take the argmax at full resolution, one class at a time.

Shapes: K classes, h w the network's output, H W the image.
"""

from __future__ import annotations

import cv2
import numpy as np


def upsample_argmax(logits_Khw: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Bilinear upsampling (align_corners=False) and argmax; uint8 [H, W] of class indices.

    logits_Khw: float32. Resizes one class at a time and compares it with the best so far, without
    a [K, H, W] array: memory is three maps for any K. Ties go to the lower class.
    """
    size = (width_px, height_px)
    best = cv2.resize(logits_Khw[0], size, interpolation=cv2.INTER_LINEAR)
    label = np.zeros((height_px, width_px), np.uint8)
    plane = np.empty_like(best)
    for k in range(1, len(logits_Khw)):
        cv2.resize(logits_Khw[k], size, dst=plane, interpolation=cv2.INTER_LINEAR)
        label[plane > best] = k
        np.maximum(best, plane, out=best)
    return label
