"""Fuse several feature maps: selective kernel fusion (SKFusion), and the forms it is compared with.

Shapes: B images, C channels, M maps to fuse, H x W pixels. Every fusion here is called with a list
of M maps [B, C_m, H, W] and returns one [B, C, H, W]; a map may be [B, C_m, 1, 1] and then counts
as constant over the pixels.

SKFusion: Song et al., "Vision Transformers for Single Image Dehazing" (TIP 2023) and "Rethinking
Performance Gains in Image Dehazing Networks" (gUNet, 2022). SK convolution: Li et al., "Selective
Kernel Networks" (CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FUSIONS = ("skfusion", "mean", "sknet", "dense", "concat")
UNPROJECTED = ("skfusion", "mean")  # these fuse maps of equal width
HEADS = ("separable", "dense")


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 1, *, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps H x W (odd kernels), batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def conv3x3(in_channels: int, out_channels: int, head: str, *, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of the head's kind, batch norm, ReLU.

    "separable" is a depthwise 3x3 and a 1x1 without norm and ReLU between them: these cost two more passes over
    memory, and DeepLabv3+ implementations that omit them lose nothing.
    """
    if head == "dense":
        return conv_bn_relu(in_channels, out_channels, 3, dilation=dilation)
    depthwise = nn.Conv2d(
        in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
    )
    return nn.Sequential(depthwise, *conv_bn_relu(in_channels, out_channels))


class SelectionGate(nn.Module):
    """Weights [B, M, C, 1, 1] over M maps of C channels, summing to one over M for each channel.

    Sum of the maps, global average, 1x1 to `hidden`, ReLU, 1x1 to C x M, softmax over M. There is no batch
    norm (SKNet has one): over a 1x1 map it can't train with one image, and its statistics come from B
    numbers only. The average is a mean over dims, which exports with dynamic shapes; adaptive pooling does not.
    """

    def __init__(self, channels: int, maps: int, hidden: int) -> None:
        super().__init__()
        self.channels, self.maps = channels, maps
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.excite = nn.Conv2d(hidden, channels * maps, 1, bias=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        # The mean of the sum is the sum of the means: nothing of B x C x H x W is written for it.
        mean_BC11 = features[0].mean((2, 3), keepdim=True)
        for feature in features[1:]:
            mean_BC11 = mean_BC11 + feature.mean((2, 3), keepdim=True)
        scores = self.excite(torch.relu(self.squeeze(mean_BC11)))
        return scores.view(-1, self.maps, self.channels, 1, 1).softmax(dim=1)


def _weighted_sum(weights_BMC11: Tensor, features: Sequence[Tensor]) -> Tensor:
    # softmax runs in float32 under autocast; without the cast the maps would be promoted to it
    weights = weights_BMC11.to(features[0].dtype).unbind(dim=1)
    total = weights[0] * features[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        total = total + weight * feature
    return total


class SKFusion(nn.Module):
    """The gate applied to existing maps, without convolutions; hidden width max(C / 8, 4)."""

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.gate = SelectionGate(channels, maps, max(channels // 8, 4))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return _weighted_sum(self.gate(features), features)


class Mean(nn.Module):
    """The mean of the maps: SKFusion without its gate, for comparison."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        total = features[0]
        for feature in features[1:]:
            total = total + feature
        return total / len(features)


class SelectiveKernel(nn.Module):
    """The SK convolution: two kernels over one map [B, C, H, W], and the gate over their outputs.

    kernels: (size, dilation) of each.
    """

    def __init__(self, channels: int, kernels: Sequence[tuple[int, int]], groups: int, hidden: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            conv_bn_relu(channels, channels, size, dilation=dilation, groups=groups) for size, dilation in kernels
        )
        self.gate = SelectionGate(channels, len(kernels), hidden)

    def forward(self, feature: Tensor) -> Tensor:
        features = [branch(feature) for branch in self.branches]
        return _weighted_sum(self.gate(features), features)


class ConcatFusion(nn.Module):
    """Concatenate, apply `mix` to the concatenated map (nn.Identity for plain DeepLabv3+), project."""

    def __init__(self, mix: nn.Module, project: nn.Module) -> None:
        super().__init__()
        self.mix, self.project = mix, project

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        height, width = features[0].shape[-2:]
        return self.project(self.mix(torch.cat([f.expand(-1, -1, height, width) for f in features], dim=1)))


def make_fusion(fusion: str, widths: Sequence[int], channels: int, project: nn.Module) -> nn.Module:
    """The module that fuses maps of `widths` channels to [B, `channels`, H, W].

    project: module from the concatenated width to `channels`; not used by "skfusion" and "mean", whose
    maps must have `channels` channels. "sknet": 3x3 and dilated 3x3 in 32 groups (or the most that divide),
    gate max(C / 16, 32) wide. "dense": ordinary 3x3 and 5x5, gate C / 16 wide.
    """
    if fusion in UNPROJECTED:
        assert all(width == channels for width in widths), f"{fusion} weighs maps of one width"
        return Mean() if fusion == "mean" else SKFusion(channels, len(widths))
    total = sum(widths)
    mix: nn.Module = nn.Identity()
    if fusion == "sknet":
        groups = next(g for g in range(32, 0, -1) if total % g == 0)
        mix = SelectiveKernel(total, ((3, 1), (3, 2)), groups, max(total // 16, 32))
    elif fusion == "dense":
        mix = SelectiveKernel(total, ((3, 1), (5, 1)), 1, max(total // 16, 4))
    return ConcatFusion(mix, project)
