"""Enlargement as matrix products is F.interpolate, gradient included."""

import pytest
import torch
from torch.nn import functional as F

from roadseg.model.resize import as_products, upsample_bilinear


@pytest.mark.parametrize(
    ("size", "to"), [((13, 7), (26, 14)), ((23, 30), (45, 60)), ((1, 1), (4, 5)), ((6, 4), (6, 4))]
)
def test_it_is_bilinear_interpolation(size: tuple[int, int], to: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, *size, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    reference, ours = F.interpolate(x, size=to, mode="bilinear", align_corners=False), as_products(x, *to)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=0)  # the weights are float32
    weights = torch.randn(2, 8, *to, dtype=torch.double)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_exported_and_evaluated_maps_are_those_of_interpolate() -> None:
    x = torch.randn(1, 4, 5, 6)
    assert torch.equal(
        upsample_bilinear(x, 10, 12), F.interpolate(x, size=(10, 12), mode="bilinear", align_corners=False)
    )
