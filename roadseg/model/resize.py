"""Bilinear upsampling (align_corners=False) as matrix products: a fast, deterministic gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample_bilinear(map_BChw: Tensor, height: int, width: int) -> Tensor:
    """[B, C, height, width]; in training on CUDA as two matrix products.

    The gradient of F.interpolate adds atomically: on an H100 (768x768, batch 16) it took 5 of a
    compiled step's 52 ms, and two runs of it differ.
    """
    if not (map_BChw.is_cuda and map_BChw.requires_grad):
        return F.interpolate(map_BChw, size=(height, width), mode="bilinear", align_corners=False)
    return as_products(map_BChw, height, width)


def as_products(map_BChw: Tensor, height: int, width: int) -> Tensor:
    """F.interpolate's values, channels last."""
    batch, channels, rows, columns = map_BChw.shape
    down = interpolation(rows, height, map_BChw.device).to(map_BChw.dtype)
    across = interpolation(columns, width, map_BChw.device).to(map_BChw.dtype)
    taller = down @ map_BChw.permute(0, 2, 3, 1).reshape(batch, rows, columns * channels)
    wider = across @ taller.view(batch * height, columns, channels)
    return wider.view(batch, height, width, channels).permute(0, 3, 1, 2)


def interpolation(size: int, to_size: int, device: torch.device) -> Tensor:
    """float32 [to_size, size]: row i holds the weights of the inputs for output i."""
    centre = (torch.arange(to_size, device=device, dtype=torch.float64) + 0.5) * (size / to_size) - 0.5
    away = centre.clamp(0, size - 1)[:, None] - torch.arange(size, device=device, dtype=torch.float64)
    return (1 - away.abs()).clamp(min=0).float()
