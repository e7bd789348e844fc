"""Dilated depthwise convolutions as ordinary ones over interleaved sub-grids, which GPUs compute faster."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DilatedDepthwise(nn.Conv2d):
    """nn.Conv2d that CUDA computes as a plain convolution over sub-grids if it is depthwise, dilated and keeps H x W.

    A convolution of dilation d equals d x d ordinary convolutions, each over every d-th row and column, which are
    stacked along the batch. cuDNN has fast kernels for ordinary ones only: on an H100 the three dilated layers of
    MobileNetV2 at stride 16 took about 9 of a step's 65 ms (768x768, batch 16, bf16). Exported graphs and CPUs use the
    ordinary form.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.is_cuda and self.splits():
            return over_sub_grids(input, self)
        return super().forward(input)

    def splits(self) -> bool:
        """Whether it is depthwise, equally dilated in both directions, and keeps H x W."""
        (kernel, wide), (d, across) = self.kernel_size, self.dilation
        return (
            d == across > 1
            and kernel == wide
            and kernel % 2 == 1
            and self.groups == self.in_channels == self.out_channels
            and self.stride == (1, 1)
            and self.padding == (d * (kernel // 2),) * 2
            and self.padding_mode == "zeros"
        )


def over_sub_grids(map_BCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """The output of a `conv` that `splits` accepts, [B, C, H, W] and channels last like the input."""
    d = conv.dilation[0]
    batch, channels, height, width = map_BCHW.shape
    padded = F.pad(map_BCHW.permute(0, 2, 3, 1), (0, 0, 0, -width % d, 0, -height % d))
    rows, columns = padded.shape[1] // d, padded.shape[2] // d
    grids = padded.reshape(batch, rows, d, columns, d, channels).permute(2, 4, 0, 1, 3, 5)
    stacked = grids.reshape(d * d * batch, rows, columns, channels).permute(0, 3, 1, 2)
    out = F.conv2d(stacked, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=channels)
    grids = out.permute(0, 2, 3, 1).reshape(d, d, batch, rows, columns, channels)
    whole = grids.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * d, columns * d, channels)
    return whole[:, :height, :width].permute(0, 3, 1, 2)


def speed_up_dilated(module: nn.Module) -> None:
    """Make every plain depthwise nn.Conv2d below `module` a DilatedDepthwise, in place: same parameters and names."""
    for m in module.modules():
        if type(m) is nn.Conv2d and m.groups == m.in_channels > 1:
            m.__class__ = DilatedDepthwise
