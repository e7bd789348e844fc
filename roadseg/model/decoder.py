"""The decoder: upsample the ASPP's map, fuse finer backbone maps, classify."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from roadseg.model.resize import upsample_bilinear
from roadseg.model.sk_fusion import UNPROJECTED, conv3x3, conv_bn_relu, make_fusion

# Width of the low level in DeepLabv3+ where maps are concatenated, so that it does not outweigh the high
# one. SKFusion and the mean need maps of equal width and use the decoder's.
CONCAT_LOW_CHANNELS = 48


class Decoder(nn.Module):
    """High map [B, channels, h, w] and low maps, coarse to fine, to logits at the finest one's size.

    For each low map: a 1x1 on it, the high map upsampled to its size (bilinear, pixel areas
    aligned), both fused, a 3x3. Where fusion concatenates, its projection is one more 3x3, so that
    "concat" with one low map is DeepLabv3+'s own decoder.
    """

    def __init__(self, low_channels: Sequence[int], channels: int, num_classes: int, fusion: str, head: str) -> None:
        super().__init__()
        low_width = channels if fusion in UNPROJECTED else min(CONCAT_LOW_CHANNELS, channels)
        widths = [low_width, channels]
        self.laterals = nn.ModuleList(conv_bn_relu(c, low_width) for c in low_channels)
        self.fusions = nn.ModuleList(
            make_fusion(fusion, widths, channels, conv3x3(sum(widths), channels, head)) for _ in low_channels
        )
        self.refinements = nn.ModuleList(conv3x3(channels, channels, head) for _ in low_channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, high: Tensor, lows: Sequence[Tensor]) -> Tensor:
        for low, lateral, fusion, refine in zip(lows, self.laterals, self.fusions, self.refinements, strict=True):
            high = upsample_bilinear(high, low.shape[-2], low.shape[-1])
            high = refine(fusion([lateral(low), high]))
        return self.classifier(high)
