"""One suite for every form of the network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from roadseg.model import Architecture, DeepLabV3Plus, TrainingOutput, build
from roadseg.model.sk_fusion import FUSIONS, HEADS

TINY = Architecture(num_classes=5, backbone="mobilenetv2_035", channels=32, atrous_rates=(1, 2, 3), auxiliary=True)

VARIANTS = {f"{fusion}-{head}": replace(TINY, fusion=fusion, head=head) for fusion in FUSIONS for head in HEADS}
VARIANTS |= {
    "stride8": replace(TINY, output_stride=8, low_levels=(4,)),
    "stride32": replace(TINY, output_stride=32, low_levels=(16, 8, 4)),
    "one-low-level": replace(TINY, low_levels=(4,)),
    "to-stride2": replace(TINY, low_levels=(8, 4, 2)),
    "full-size-stem": replace(TINY, output_stride=8, early_strides=(1, 2), low_levels=(4, 2, 1)),
    "fine": replace(TINY, output_stride=8, early_strides=(2, 1), low_levels=(4,), backbone="resnet18", channels=16),
    "finest": replace(TINY, output_stride=8, early_strides=(1, 1), low_levels=(2,), atrous_rates=(2, 4)),
    "no-auxiliary": replace(TINY, auxiliary=False),
    "resnet18": replace(TINY, backbone="resnet18", channels=16),
    "regnety_002": replace(TINY, backbone="regnety_002", fusion="concat"),
    "efficientnet_lite0": replace(TINY, backbone="efficientnet_lite0", head="separable"),
}


BY_DEFAULT = ("skfusion-dense", "concat-separable", "finest", "full-size-stem", "efficientnet_lite0")


@pytest.fixture(
    scope="module",
    params=[name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def network(request: pytest.FixtureRequest) -> DeepLabV3Plus:
    return build(VARIANTS[request.param], seed=1)


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 65), (64, 96), (75, 50)])
def test_logits_have_the_ceil_of_the_size_over_the_stride(network: DeepLabV3Plus, size: tuple[int, int]) -> None:
    stride = network.architecture.logit_stride
    with torch.inference_mode():
        logits = network.eval()(images(2, *size))
    assert logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_gradients_reach_every_parameter(network: DeepLabV3Plus) -> None:
    network.train().zero_grad()
    for module in network.backbone.modules():
        # timm starts the last norm of a residual branch at 0: nothing before it learns in the first step
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
    output = network(images(2, 97, 129))
    every = [output]
    if network.architecture.auxiliary:
        assert isinstance(output, TrainingOutput)
        every = [output.logits, *output.auxiliary]
        assert len(output.auxiliary) == 2
        strides = [network.architecture.logit_stride, *network.architecture.auxiliary_strides]
        assert [x.shape[1:] for x in every] == [(5, -(-97 // s), -(-129 // s)) for s in strides]
    target = torch.arange(5)
    loss = sum(nn.functional.cross_entropy(x, target[images(2, *x.shape[-2:])[:, 0].long() % 5]) for x in every)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    unreached = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_trains_on_a_single_image(network: DeepLabV3Plus) -> None:
    output = network.train()(images(1, 65, 65))
    logits = output.logits if isinstance(output, TrainingOutput) else output
    assert logits.isfinite().all()


def test_eval_is_deterministic_and_independent_of_the_batch(network: DeepLabV3Plus) -> None:
    batch = images(3, 48, 80)
    with torch.inference_mode():
        first, second = network.eval()(batch), network(batch)
        alone = network(batch[1:2])
    assert torch.equal(first, second)
    torch.testing.assert_close(alone, first[1:2], rtol=1e-4, atol=1e-4)


def test_float_and_uint8_images_give_the_same(network: DeepLabV3Plus) -> None:
    batch = images(1, 40, 40)
    with torch.inference_mode():
        assert torch.equal(network.eval()(batch), network(batch.float()))


def test_bf16_autocast_and_channels_last(network: DeepLabV3Plus) -> None:
    batch = images(2, 65, 97)
    ours = copy.deepcopy(network).eval()
    with torch.inference_mode():
        exact = ours(batch)
        ours.to(memory_format=torch.channels_last)
        batch = batch.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(batch), exact, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half = ours(batch)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.1 * exact.std()
    with torch.autocast("cpu", torch.bfloat16):
        output = ours.train()(batch)
    logits = output.logits if isinstance(output, TrainingOutput) else output
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in ours.aspp.parameters() if p.grad is not None)


def test_inference_network_is_the_same_function_without_auxiliary_heads(network: DeepLabV3Plus) -> None:
    shipped = network.inference_network()
    assert not shipped.training and not shipped.architecture.auxiliary
    assert sum(p.numel() for p in shipped.parameters()) == shipped.count_parameters() == network.count_parameters()
    assert not any(key.startswith("auxiliary") for key in shipped.state_dict())
    rebuilt = DeepLabV3Plus(shipped.architecture)
    rebuilt.load_state_dict(shipped.state_dict())  # what an archive's loader does
    with torch.inference_mode():
        expected = network.eval()(images(1, 33, 47))
        assert torch.equal(shipped(images(1, 33, 47)), expected)
        assert torch.equal(rebuilt.eval()(images(1, 33, 47)), expected)


@pytest.mark.parametrize(
    ("fusion", "head", "parameters"),
    [
        ("skfusion", "dense", 3_330_835),
        ("skfusion", "separable", 2_096_595),
        ("sknet", "dense", 4_185_299),
        ("sknet", "separable", 2_593_779),
        ("dense", "dense", 19_914_803),
        ("dense", "separable", 18_323_283),
        ("concat", "dense", 3_789_651),
        ("concat", "separable", 2_198_131),
    ],
)
def test_parameter_counts_at_default_size(fusion: str, head: str, parameters: int) -> None:
    network = build(Architecture(num_classes=19, fusion=fusion, head=head, auxiliary=True), seed=0)
    assert network.count_parameters() == parameters


@pytest.mark.parametrize(
    ("fusion", "head", "millions"),
    [("concat", "dense", 5.82), ("concat", "separable", 2.72), ("dense", "dense", 64.99)],
)
def test_parameter_counts_of_published_forms(fusion: str, head: str, millions: float) -> None:
    """DeepLabv3+ with MobileNetV2 at its own 256 channels, and the reference project's SK on 320 channels."""
    a = Architecture(num_classes=19, fusion=fusion, head=head, channels=256, low_levels=(4,))
    assert build(a, seed=0).count_parameters() / 1e6 == pytest.approx(millions, abs=0.006)


def test_build_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = build(TINY, seed=3), build(TINY, seed=3), build(TINY, seed=4)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(one.decoder.laterals[0][0].weight, other.decoder.laterals[0][0].weight)


def test_normalises_with_the_given_statistics() -> None:
    plain = build(TINY, seed=0, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    scaled = build(TINY, seed=0, mean=(10, 20, 30), std=(2, 4, 8)).eval()
    batch = images(1, 32, 32)
    by_hand = (batch.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 4, 8]).view(3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(scaled(batch), plain(by_hand), rtol=1e-4, atol=1e-4)
