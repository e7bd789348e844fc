"""What a network costs, against figures counted by hand and published ones."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.model import Architecture, build
from roadseg.profile.cost import AUXILIARY, LOSS, cost, macs_by_part, peak_bytes, saved_by_part, three_digits

BHW = (2, 10, 20)
PIXELS = 2 * 10 * 20
FP32, BF16, INT64 = 4, 2, 8


class Chain(nn.Module):
    """Two convolutions and a ReLU between, every figure of which can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.c(self.b(self.a(image.float())))


class Classifier(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.whole = timm.create_model(name)

    def forward(self, image: Tensor) -> Tensor:
        return self.whole(image.float())


def small(auxiliary: bool = True) -> nn.Module:
    a = Architecture(
        num_classes=3,
        backbone="test_efficientnet",
        channels=16,
        head="separable",
        atrous_rates=(1, 2),
        auxiliary=auxiliary,
    )
    return build(a, seed=0)


def test_multiply_adds_by_hand() -> None:
    assert macs_by_part(Chain(), BHW) == {"a": PIXELS * 8 * 3 * 9, "b": 0, "c": PIXELS * 4 * 8}


def test_grouped_strided_and_dilated_convolutions_by_hand() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
            self.strided = nn.Conv2d(3, 6, 5, stride=2, padding=2)
            self.dilated = nn.Conv2d(6, 6, 3, padding=4, dilation=4, groups=2)

        def forward(self, image: Tensor) -> Tensor:
            return self.dilated(self.strided(self.depthwise(image.float())))

    want = {"depthwise": PIXELS * 3 * 9, "strided": PIXELS // 4 * 6 * 3 * 25, "dilated": PIXELS // 4 * 6 * 3 * 9}
    assert macs_by_part(Three(), BHW) == want


@pytest.mark.parametrize(("name", "millions"), [("mobilenetv2_100", 300.8), ("resnet18", 1814.1)])
def test_multiply_adds_as_published(name: str, millions: float) -> None:
    """MobileNetV2: 300 M (Sandler et al. 2018), torchvision's ops say 0.301 and for ResNet-18 1.814 GMAC."""
    assert macs_by_part(Classifier(name), (1, 224, 224))["whole"] / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(("bf16", "size"), [(False, FP32), (True, BF16)])
def test_what_a_training_step_keeps_by_hand(bf16: bool, size: int) -> None:
    weights = {"a": 8 * 3 * 9, "c": 4 * 8}  # their copies in bf16 are kept too
    copies = {name: BF16 * count if bf16 else 0 for name, count in weights.items()}
    assert saved_by_part(Chain(), BHW, bf16) == {
        "a": size * PIXELS * 3 + copies["a"],  # its input
        "b": size * PIXELS * 8,  # its output, which is c's input
        **({"c": copies["c"]} if bf16 else {}),
        LOSS: FP32 * PIXELS * 4 + INT64 * PIXELS + FP32,  # log-probabilities, labels, the sum of weights
    }


def test_the_peak_of_inference_by_hand() -> None:
    image, a, b = PIXELS * 3, FP32 * PIXELS * 8, FP32 * PIXELS * 8
    assert peak_bytes(Chain(), BHW, False) == image + a + b  # the float image is gone when b is made


def test_nothing_of_the_network_changes() -> None:
    network = small().eval()
    before = copy.deepcopy(network.state_dict())
    cost(network, (1, 64, 96), (2, 64, 64), True, 2)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_as_much_is_kept_as_by_real_tensors() -> None:
    network, seen = small().train(), {}
    ours = {p.untyped_storage()._cdata for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    label = torch.zeros(2, 64, 96, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
        for head in (output.logits, *output.auxiliary):
            F.cross_entropy(F.interpolate(head, (64, 96), mode="bilinear"), label)
    real = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in ours)
    assert sum(saved_by_part(small(), (2, 64, 96), False).values()) == real


def test_auxiliary_heads_count_in_training_alone() -> None:
    with_them, without = (cost(small(auxiliary), (1, 64, 96), (2, 64, 96), False, 2) for auxiliary in (True, False))
    assert with_them.parameters == without.parameters == small(False).count_parameters()  # type: ignore[operator]
    assert with_them.macs == without.macs and with_them.peak_bytes == without.peak_bytes
    (heads,) = [p for p in with_them.parts if p.name == AUXILIARY]
    whole = sum(p.numel() for p in small().parameters())
    assert heads.parameters == whole - with_them.parameters and heads.macs > 0 and heads.saved_bytes > 0
    assert with_them.saved_bytes > without.saved_bytes and with_them.state_bytes == 4 * whole * 5
    names = [p.name for p in with_them.parts]
    assert [n for n in names if n != "dropout"] == ["backbone", "aspp", "decoder", AUXILIARY, LOSS]


def test_cost_grows_with_the_batch_and_needs_no_memory_of_its_own() -> None:
    one, many = (cost(small(), (b, 64, 96), (2 * b, 64, 96), False, 0) for b in (1, 4096))
    assert many.macs == 4096 * one.macs and many.peak_bytes == pytest.approx(4096 * one.peak_bytes, rel=0.01)
    assert many.saved_bytes == pytest.approx(4096 * one.saved_bytes, rel=0.01) and many.saved_bytes > 10**10
    assert one.to_json()["macs"] == one.macs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4e-6, "0.00000400"),
        (0.0332, "0.0332"),
        (0.1, "0.100"),
        (1, "1.00"),
        (9.994, "9.99"),
        (52.06, "52.1"),
        (100, "100"),
        (12_345.6, "12,346"),
    ],
)
def test_figures_of_any_size_can_be_read(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.gpu
def test_the_counted_peaks_are_those_of_cuda() -> None:
    """Within what workspaces of the libraries add to inference, and what is freed on the way to training."""
    device = torch.device("cuda")
    network = build(Architecture(num_classes=19, auxiliary=True), seed=0)
    image, crops = (1, 1024, 2048), (8, 512, 512)
    counted = cost(network, image, crops, True, 2)
    inference = copy.deepcopy(network).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.zeros(1, 3, *image[1:], dtype=torch.uint8, device=device)
    before = torch.cuda.memory_allocated() - batch.numel()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        inference(batch)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.8 * counted.peak_bytes < peak < 2.5 * counted.peak_bytes, (peak, counted.peak_bytes)

    training = network.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        output = training(torch.zeros(crops[0], 3, *crops[1:], dtype=torch.uint8, device=device))
    label = torch.zeros(crops, dtype=torch.int64, device=device)
    losses = [
        F.cross_entropy(F.interpolate(head.float(), crops[1:], mode="bilinear"), label)
        for head in (output.logits, *output.auxiliary)
    ]
    held = torch.cuda.memory_allocated() - before
    del losses
    assert held == pytest.approx(counted.saved_bytes, rel=0.1), (held, counted.saved_bytes)
