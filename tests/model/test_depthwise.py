"""A dilated depthwise convolution over sub-grids is the convolution itself."""

import pytest
import torch
from torch import nn

from roadseg.model.backbone import create_backbone
from roadseg.model.depthwise import DilatedDepthwise, over_sub_grids


@pytest.mark.parametrize(
    ("height", "width", "dilation", "kernel"), [(23, 30, 2, 3), (24, 32, 4, 3), (13, 7, 3, 5), (3, 5, 4, 3)]
)
def test_sub_grids_give_the_same_outputs_and_gradients(height: int, width: int, dilation: int, kernel: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=8).double()
    x = torch.randn(2, 8, height, width, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randn(2, 8, height, width, dtype=torch.double)
    results = []
    for out in (plain(x), over_sub_grids(x, plain)):
        results.append((out, *torch.autograd.grad((out * target).sum(), (x, plain.weight, plain.bias))))
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference)
    assert results[1][0].shape == x.shape


def test_maps_stay_channels_last() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    x = torch.randn(2, 8, 24, 32).to(memory_format=torch.channels_last)
    assert over_sub_grids(x, conv).is_contiguous(memory_format=torch.channels_last)


def test_backbones_have_it_under_the_same_names_and_on_the_cpu_nothing_changes() -> None:
    backbone = create_backbone("mobilenetv2_035", 8)
    dilated = {n: m for n, m in backbone.named_modules() if isinstance(m, DilatedDepthwise) and m.dilation[0] > 1}
    assert {m.dilation[0] for m in dilated.values()} == {2, 4}
    assert all(m.splits() for m in dilated.values())
    name, conv = next(iter(dilated.items()))
    plain = nn.Conv2d(conv.in_channels, conv.in_channels, 3, padding=conv.padding, dilation=conv.dilation,
                      groups=conv.groups, bias=False)  # fmt: skip
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, conv.in_channels, 12, 16)
    assert torch.equal(conv(x), plain(x))
    assert f"{name}.weight" in backbone.state_dict()


@pytest.mark.parametrize("change", [{"groups": 1}, {"stride": 2}, {"padding": 0}, {"dilation": 1, "padding": 1}])
def test_other_convolutions_are_left_to_torch(change: dict[str, int]) -> None:
    conv = DilatedDepthwise(4, 4, 3, **{"padding": 2, "dilation": 2, "groups": 4} | change)
    assert not conv.splits()
