import numpy as np
import pytest
import torch

from roadseg.model.sk_fusion import SelectionGate, SelectiveKernel, SKFusion, conv3x3, make_fusion


def numpy_sk_fusion(features: list[np.ndarray], squeeze: np.ndarray, excite: np.ndarray) -> np.ndarray:
    """The definition, map by map: squeeze [hidden, C], excite [M * C, hidden], features [C, H, W]."""
    total = np.sum(np.stack(np.broadcast_arrays(*features)), axis=0)
    hidden = np.maximum(squeeze @ total.mean(axis=(1, 2)), 0)
    scores = (excite @ hidden).reshape(len(features), total.shape[0])
    weights = np.exp(scores) / np.exp(scores).sum(axis=0)
    assert np.allclose(weights.sum(axis=0), 1)
    return sum(w[:, None, None] * f for w, f in zip(weights, features, strict=True))


@pytest.mark.parametrize("maps", [2, 5])
def test_sk_fusion_against_numpy(maps: int) -> None:
    rng = np.random.default_rng(maps)
    features = [rng.normal(size=(2, 24, 7, 9)) for _ in range(maps - 1)] + [rng.normal(size=(2, 24, 1, 1))]
    fusion = SKFusion(24, maps).double()
    squeeze, excite = (conv.weight.detach().numpy()[:, :, 0, 0] for conv in (fusion.gate.squeeze, fusion.gate.excite))
    assert squeeze.shape == (4, 24)  # max(24 / 8, 4)
    with torch.inference_mode():
        got = fusion([torch.from_numpy(f) for f in features]).numpy()
    for i in range(2):
        expected = numpy_sk_fusion([f[i] for f in features], squeeze, excite)
        np.testing.assert_allclose(got[i], expected, rtol=1e-10, atol=1e-12)


def test_gate_weights_sum_to_one_over_the_maps() -> None:
    gate = SelectionGate(16, 3, 8)
    torch.nn.init.normal_(gate.excite.weight, std=5.0)  # far from uniform
    with torch.inference_mode():
        weights = gate([torch.randn(4, 16, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert weights.shape == (4, 3, 16, 1, 1)
    assert weights.min() >= 0 and weights.std() > 0.1
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4, 16, 1, 1))


def test_equal_maps_come_out_unchanged() -> None:
    feature = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SKFusion(8, 3)([feature] * 3), feature)


def test_selective_kernel_picks_the_branch_its_gate_names() -> None:
    unit = SelectiveKernel(8, ((3, 1), (3, 2)), groups=4, hidden=32).eval()
    feature = torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0)).abs()
    with torch.no_grad():
        unit.gate.squeeze.weight.fill_(1.0)
        unit.gate.excite.weight[:8] = -1e3
        unit.gate.excite.weight[8:] = 1e3
        torch.testing.assert_close(unit(feature), unit.branches[1](feature))
    dilated = unit.branches[1][0]
    assert (dilated.groups, dilated.dilation, dilated.kernel_size) == (4, (2, 2), (3, 3))


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (304, 19), (176, 22), (37, 1)])
def test_sknet_takes_the_most_groups_that_divide(width: int, groups: int) -> None:
    fusion = make_fusion("sknet", [width], 8, torch.nn.Identity())
    assert fusion.mix.branches[0][0].groups == groups


def test_concat_takes_a_pooled_map_as_constant() -> None:
    fusion = make_fusion("concat", [2, 3], 5, torch.nn.Identity())
    a, b = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 1, 1)
    out = fusion([a, b])
    assert torch.equal(out[:, :2], a)
    assert torch.equal(out[:, 2:], b.expand(1, 3, 4, 6))


def test_mean_weighs_every_map_alike() -> None:
    fusion = make_fusion("mean", [3, 3, 3], 3, torch.nn.Identity())
    a, b, pooled = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(fusion([a, b, pooled]), (a + b + pooled.expand(2, 3, 4, 6)) / 3)
    assert not list(fusion.parameters())


def test_separable_has_one_filter_a_channel() -> None:
    conv = conv3x3(6, 10, "separable", dilation=3)
    assert conv[0].weight.shape == (6, 1, 3, 3)
    assert conv(torch.randn(2, 6, 5, 5)).shape == (2, 10, 5, 5)
