"""Losses over logits that are coarser than the labels.

Shapes: B images, K classes, H W the label, h w the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roadseg.labels import IGNORE


def cross_entropy(
    logits_BKhw: Tensor, label_BHW: Tensor, class_weights_K: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of the bilinearly upsampled logits, averaged over all valid pixels of the batch.

    label: uint8 or int64 of train ids; IGNORE counts nowhere, and a batch of void alone gives 0, not
    NaN. With class weights the mean is weighted by them. Computed in float32.
    """
    logits = F.interpolate(logits_BKhw.float(), label_BHW.shape[1:], mode="bilinear", align_corners=False)
    label = label_BHW.long()
    total = F.cross_entropy(
        logits, label, class_weights_K, ignore_index=IGNORE, label_smoothing=label_smoothing, reduction="sum"
    )
    valid = label != IGNORE
    if class_weights_K is None:
        count = valid.sum()
    else:
        count = (class_weights_K[label.clamp(max=len(class_weights_K) - 1)] * valid).sum()
    return total / count.clamp(min=torch.finfo(torch.float32).tiny)


def enet_weights(class_pixels: Sequence[int]) -> list[float]:
    """1 / ln(1.02 + frequency) of each class (Paszke et al. 2016, ENet)."""
    pixels = np.asarray(class_pixels, np.float64)
    frequency = pixels / max(pixels.sum(), 1)
    return [float(w) for w in 1 / np.log(1.02 + frequency)]
