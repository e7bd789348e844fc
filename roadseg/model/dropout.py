"""Dropout and drop path whose masks cover the whole batch, so that several ranks draw what one would.

All ranks draw the mask of the whole batch from one seed, and each uses its part of it.
Shapes: B images of this rank, followed by any dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from roadseg.errors import ConfigError


class Dropout(nn.Module):
    """nn.Dropout whose mask is a part of the whole batch's."""

    part, parts = 0, 1

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        return x * _kept(x, x.shape[1:], self.share, self.part, self.parts).to(x.dtype) / (1 - self.share)


class SharedDropPath(DropPath):
    """timm's DropPath (drops an image's whole branch) with a mask that is a part of the whole batch's."""

    part, parts = 0, 1
    drop_prob: float
    scale_by_keep: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        kept = _kept(x, [1] * (x.ndim - 1), self.drop_prob, self.part, self.parts).to(x.dtype)
        return x * kept / ((1 - self.drop_prob) if self.scale_by_keep else 1.0)


def _kept(x: Tensor, each: Sequence[int], share: float, part: int, parts: int) -> Tensor:
    """bool [B, *each]: this part's rows of the whole batch's mask."""
    draws = torch.rand((len(x) * parts, *each), device=x.device, dtype=torch.float32)
    return draws[len(x) * part : len(x) * (part + 1)] >= share


def share_draws(module: nn.Module) -> None:
    """Replace every timm DropPath in `module` by a SharedDropPath, in place."""
    for m in module.modules():
        if type(m) is DropPath:
            m.__class__ = SharedDropPath


def refuse_unshared_draws(network: nn.Module) -> None:
    """Raise ConfigError for layers that draw for one rank's images only, such as timm's DropBlock2d."""
    for name, m in network.named_modules():
        share = getattr(m, "p", 0) or getattr(m, "drop_prob", 0)
        if "drop" in type(m).__name__.lower() and share and not isinstance(m, (Dropout, SharedDropPath)):
            raise ConfigError(
                f"{type(m).__name__} ({name}, {share}) draws anew on each of several processes",
                expected="draws of the whole batch: drop_path_rate, or model.dropout",
                where="model.backbone_options",
                todo="leave it out, or train on one GPU",
            )


def draw_part(module: nn.Module, part: int, parts: int) -> None:
    """Set which of `parts` equal parts of the batch all dropout in `module` uses."""
    for m in module.modules():
        if isinstance(m, (Dropout, SharedDropPath)):
            m.part, m.parts = part, parts
