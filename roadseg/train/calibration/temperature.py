"""Fit the temperature that calibrates a network's probabilities (Guo et al., 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from roadseg.data.shards.index import Split
from roadseg.train.calibration.sampled_pixels import sampled_pixels

PIXELS_A_FRAME = 4000


def fit_temperature(
    network: nn.Module, split: Split, frames: Sequence[int] | np.ndarray, offsets_K: np.ndarray
) -> float:
    """The T in 0.1..10 that minimizes the cross-entropy of softmax((logits - offsets) / T) on sampled pixels.

    network: in eval mode on the CPU. offsets: class offsets that its logits include. Returns 1.0 if the frames have no
    valid pixel.
    """
    logits_NK, labels_N = sampled_pixels(network, split, frames, PIXELS_A_FRAME)
    if not len(labels_N):
        return 1.0
    logits_NK = logits_NK.double() - torch.from_numpy(offsets_K)
    grid = np.exp(np.linspace(np.log(0.1), np.log(10), 33))
    for _ in range(3):  # each round refines the best cell of the round before
        nll = [float(F.cross_entropy(logits_NK / t, labels_N)) for t in grid]
        best = int(np.argmin(nll))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 17)
    return round(float(grid[len(grid) // 2]), 4)
