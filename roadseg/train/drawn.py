"""Logits and labels of pixels drawn from whole frames: what is fitted once a training is done is fitted to these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.data.augment import generator
from roadseg.data.shards import Split
from roadseg.labels import IGNORE


@torch.inference_mode()
def drawn_pixels(
    network: nn.Module,
    split: Split,
    frames: Sequence[int] | np.ndarray,
    pixels_a_frame: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits, float32 [N, K]; labels, int64 [N]) on the CPU: at most so many valid pixels of each frame, the same ones
    in every run, their logits bilinearly upsampled.

    network: in eval mode on `device`, the CPU if None. frames: at least one. N is 0 where they hold no valid pixel.
    """
    logits_NK, labels_N = [], []
    for index in frames:
        image, label = split.read(int(index))
        logits = network(torch.from_numpy(image.copy()).to(device or "cpu").permute(2, 0, 1)[None]).float()
        full_KN = F.interpolate(logits, label.shape, mode="bilinear", align_corners=False)[0].flatten(1)
        valid = np.flatnonzero(label.ravel() != IGNORE)
        drawn = generator(0, 4, int(index)).choice(valid, min(pixels_a_frame, len(valid)), replace=False)
        logits_NK.append(full_KN[:, torch.from_numpy(drawn).to(full_KN.device)].T.cpu())
        labels_N.append(torch.from_numpy(label.ravel()[drawn].astype(np.int64)))
    return torch.cat(logits_NK), torch.cat(labels_N)
