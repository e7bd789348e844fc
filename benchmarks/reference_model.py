"""The network of the reference project, written anew from its description, as the peer in benchmarks.

torchvision's MobileNetV2 at output stride 32; ASPP of a 1x1, three dense 3x3 (rates 6, 12, 18) and
image pooling, 256 channels each; a selective kernel of a dense 3x3 and a dense 5x5 on their 1280
channels; a 1x1 to 256. Decoder: the stride-4 map (24 channels) to 48, concatenated with the
upsampled 256, the same selective kernel on these 304, two 3x3 to 256, a 1x1 to the classes,
upsampled to the image. 72.5M parameters, nearly all of them in the first selective kernel.

It shares no code with roadseg.model, so that a mistake there can't hide in both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2


def block(in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseSelectiveKernel(nn.Module):
    """[B, C, H, W] to the same shape: 3x3 and 5x5, weighed for each channel by a softmax gate."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.small = block(channels, channels, 3)
        self.large = block(channels, channels, 5)
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.small(x), self.large(x)
        squeezed = torch.relu(self.reduce((small + large).mean((2, 3))))
        weights = self.expand(squeezed).view(len(x), 2, -1, 1, 1).softmax(dim=1).to(small.dtype)
        return weights[:, 0] * small + weights[:, 1] * large


class ReferenceModel(nn.Module):
    """Image [B, 3, H, W], RGB, uint8 or float in 0..255, to logits [B, num_classes, H, W].

    Image pooling has batch norm, as DeepLabv3+ has it: training needs two images a batch or more.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1))
        features = mobilenet_v2(weights=None).features
        self.low, self.high = features[:4], features[4:]
        self.branches = nn.ModuleList([block(1280, 256, 1)] + [block(1280, 256, 3, rate) for rate in (6, 12, 18)])
        self.pooling = block(1280, 256, 1)
        self.aspp_sk = DenseSelectiveKernel(1280)
        self.project = block(1280, 256, 1)
        self.lateral = block(24, 48, 1)
        self.decoder_sk = DenseSelectiveKernel(304)
        self.refine = nn.Sequential(block(304, 256, 3), block(256, 256, 3))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        low = self.low((image.to(self.mean.dtype) - self.mean) / self.std)
        high = self.high(low)
        pooled = self.pooling(high.mean((2, 3), keepdim=True)).expand(-1, -1, *high.shape[-2:])
        high = self.project(self.aspp_sk(torch.cat([b(high) for b in self.branches] + [pooled], dim=1)))
        high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=False)
        high = self.refine(self.decoder_sk(torch.cat([self.lateral(low), high], dim=1)))
        return F.interpolate(self.classifier(high), size=image.shape[-2:], mode="bilinear", align_corners=False)
