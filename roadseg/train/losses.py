"""Losses over logits that are coarser than the labels.

Shapes: B images, K classes, H W the label, h w the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roadseg.labels import IGNORE


def upsample(logits_BKhw: Tensor, height_px: int, width_px: int) -> Tensor:
    """Bilinear, align_corners=False: F.interpolate as two matrix products, whose gradient is fast.

    On an H100 the gradient of F.interpolate alone took a quarter of a step's kernel time (docs/experiments.md).
    """
    rows = _interpolation(logits_BKhw.shape[2], height_px, logits_BKhw.device)
    columns = _interpolation(logits_BKhw.shape[3], width_px, logits_BKhw.device)
    return rows @ (logits_BKhw @ columns.T)


@lru_cache(maxsize=64)
def _interpolation(size: int, to_size: int, device: torch.device) -> Tensor:
    """float32 [to_size, size]: row i holds the weights with which the inputs make up output i."""
    centre = ((torch.arange(to_size, dtype=torch.float64) + 0.5) * size / to_size - 0.5).clamp(0, size - 1)
    left = centre.floor().long().clamp(max=max(size - 2, 0))
    share = (centre - left)[:, None]
    matrix = torch.zeros(to_size, size, dtype=torch.float64)
    matrix.scatter_add_(1, left[:, None], 1 - share)
    matrix.scatter_add_(1, (left[:, None] + 1).clamp(max=size - 1), share)
    return matrix.float().to(device)


def cross_entropy(
    logits_BKhw: Tensor, label_BHW: Tensor, class_weights_K: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of the bilinearly upsampled logits, averaged over all valid pixels of the batch.

    label: uint8 or int64 of train ids; IGNORE counts nowhere, and a batch of void alone gives 0, not
    NaN. With class weights every pixel counts as its true class does, also in the smoothed part of its
    target (torch weighs that part by the other classes, so that a common class's pixels would give a
    quarter of their target to rare ones). Computed in float32.
    """
    logits = upsample(logits_BKhw.float(), label_BHW.shape[1], label_BHW.shape[2])
    label = label_BHW.long()
    log_p = F.log_softmax(logits, dim=1)
    total = F.nll_loss(log_p, label, class_weights_K, ignore_index=IGNORE, reduction="sum")
    pixel_weights = (label != IGNORE).float()
    if class_weights_K is not None:
        pixel_weights = pixel_weights * class_weights_K[label.clamp(max=len(class_weights_K) - 1)]
    if label_smoothing:
        spread = -(log_p.mean(dim=1) * pixel_weights).sum()
        total = (1 - label_smoothing) * total + label_smoothing * spread
    return total / pixel_weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def enet_weights(class_pixels: Sequence[int]) -> list[float]:
    """1 / ln(1.02 + frequency) of each class (Paszke et al. 2016, ENet)."""
    pixels = np.asarray(class_pixels, np.float64)
    frequency = pixels / max(pixels.sum(), 1)
    return [float(w) for w in 1 / np.log(1.02 + frequency)]
