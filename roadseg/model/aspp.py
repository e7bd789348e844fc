"""Atrous spatial pyramid pooling (Chen et al., 2017).

Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (ECCV 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from roadseg.model.sk_fusion import conv3x3, conv_bn_relu, make_fusion


class ASPP(nn.Module):
    """[B, in_channels, H, W] to [B, channels, H, W]: a 1x1, a 3x3 for each rate, image pooling, fused.

    Rates are in pixels of this map: where rate x 2 + 1 exceeds it, a 3x3 is left with its centre
    (at 360x480 and output stride 16 the map is 23x30: use 3/6/9).
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], fusion: str, head: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, channels)]
            + [conv3x3(in_channels, channels, head, dilation=rate) for rate in rates]
        )
        # A bias in place of batch norm: over a 1x1 map that would refuse one image in training, and
        # its running statistics would come from B numbers a step, so that train and eval disagree.
        self.pooling = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))
        widths = [channels] * (len(rates) + 2)
        self.fusion = make_fusion(fusion, widths, channels, conv_bn_relu(sum(widths), channels))

    def forward(self, feature: Tensor) -> Tensor:
        pooled_BC11 = self.pooling(feature.mean((2, 3), keepdim=True))
        return self.fusion([branch(feature) for branch in self.branches] + [pooled_BC11])
