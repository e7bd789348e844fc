"""One number that makes a network's confidence honest (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from roadseg.data.augment import generator
from roadseg.data.shards import Split
from roadseg.labels import IGNORE

PIXELS_A_FRAME = 4000


@torch.inference_mode()
def fit_temperature(network: nn.Module, split: Split, frames: Sequence[int] | np.ndarray) -> float:
    """The T in 0.1..10 that minimises the cross-entropy of softmax(logits / T) over drawn pixels.

    network: in eval mode on the CPU. 1.0 where the frames hold no valid pixel.
    """
    logits_NK, labels_N = [], []
    for index in frames:
        image, label = split.read(int(index))
        logits = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
        full_KN = F.interpolate(logits, label.shape, mode="bilinear", align_corners=False)[0].flatten(1)
        valid = np.flatnonzero(label.ravel() != IGNORE)
        drawn = generator(0, 4, int(index)).choice(valid, min(PIXELS_A_FRAME, len(valid)), replace=False)
        logits_NK.append(full_KN[:, torch.from_numpy(drawn)].T.double())
        labels_N.append(torch.from_numpy(label.ravel()[drawn].astype(np.int64)))
    logits_all, labels_all = torch.cat(logits_NK), torch.cat(labels_N)
    if not len(labels_all):
        return 1.0
    grid = np.exp(np.linspace(np.log(0.1), np.log(10), 33))
    for _ in range(3):  # each round narrows the best cell of the one before
        nll = [float(F.cross_entropy(logits_all / t, labels_all)) for t in grid]
        best = int(np.argmin(nll))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 17)
    return round(float(grid[len(grid) // 2]), 4)
