"""Networks that are changed while they stand, against ones that were built that way."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from roadseg.errors import ConfigError
from roadseg.model import Architecture, DeepLabV3Plus, TrainingOutput, build
from roadseg.model.backbone import create_backbone
from roadseg.model.dropout import draw_part
from roadseg.model.surgery import checkpoint_activations, freeze, set_output_stride
from roadseg.release.export import check_export, export_onnx
from roadseg.train.ema import EMA

BACKBONES = ["mobilenetv2_035", "test_efficientnet", "test_resnet", "resnet26d", "regnety_002", "tf_efficientnet_lite0"]


def network(
    backbone: str = "mobilenetv2_035", output_stride: int = 16, rates: tuple[int, ...] = (2, 4)
) -> DeepLabV3Plus:
    a = Architecture(
        num_classes=3,
        backbone=backbone,
        output_stride=output_stride,
        channels=8,
        atrous_rates=rates,
        low_levels=(4,),
        auxiliary=True,
        dropout=0.0,
    )
    return build(a, seed=1).train()


def images(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(images(1))


def loss_of(output: TrainingOutput | list[torch.Tensor]) -> torch.Tensor:
    maps = [output.logits, *output.auxiliary] if isinstance(output, TrainingOutput) else output
    return torch.stack([(m.float() - 0.3).square().mean() for m in maps]).sum()


# ---- freezing -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["backbone", "aspp", "decoder"])
def test_a_frozen_part_stays_and_the_rest_learns(part: str) -> None:
    net = network()
    freeze(net, [part])
    before = {name: p.clone() for name, p in net.named_parameters()}
    learning = [p for p in net.parameters() if p.requires_grad]
    loss_of(net(images())).backward()
    torch.optim.SGD(learning, lr=1.0).step()
    moved = {name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"backbone", "aspp", "decoder", "auxiliary_heads"} - {part}


def test_frozen_statistics_keep_their_values_whoever_calls_train() -> None:
    net = network()
    free = copy.deepcopy(net)
    freeze(net, ["batch_norm"])
    wrapper = nn.Sequential(net).train()
    before = {name: b.clone() for name, b in net.named_buffers()}
    loss_of(net.train()(images())).backward()
    assert wrapper.training and net.training and net.backbone.blocks.training
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert net.aspp.branches[0][1].weight.grad.abs().sum() > 0  # scale and shift go on learning
    free(images())
    changed = [name for name, b in free.named_buffers() if not torch.equal(b, before[name])]
    assert len(changed) == 3 * sum("running_mean" in name for name in before)


def test_frozen_statistics_follow_copies_and_nothing_else() -> None:
    net = network()
    freeze(net, ["batch_norm", "backbone"])
    twin = copy.deepcopy(net).train()
    assert not twin.backbone.bn1.training and twin.training
    assert twin.train.__self__ is twin  # type: ignore[attr-defined]
    assert torch.equal(logits(net.inference_network()), logits(net))
    assert network().train().backbone.bn1.training


def test_freezing_that_leaves_nothing_or_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="training.freeze: backbone, aspp, decoder are all frozen"):
        freeze(network(), ["aspp", "backbone", "batch_norm", "decoder"])
    with pytest.raises(ConfigError, match="unknown part 'head'; expected backbone, aspp, decoder, batch_norm"):
        freeze(network(), ["head"])


# ---- output stride --------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_restrided_network_is_one_built_at_that_stride(backbone: str) -> None:
    net = network(backbone)
    net(images())  # statistics of its own, so that no layer is an identity
    parameters, keys, at_16 = list(net.parameters()), list(net.state_dict()), logits(net)
    set_output_stride(net.train(), 8)
    assert all(m.training for m in net.modules())
    fresh = network(backbone, 8, (4, 8))
    fresh.load_state_dict(net.state_dict())
    assert net.architecture == fresh.architecture and Architecture.from_json(net.architecture.to_json())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True)) and list(net.state_dict()) == keys
    at_8 = logits(net)
    assert torch.equal(at_8, logits(fresh))
    assert not torch.allclose(at_8, at_16, rtol=1e-3, atol=1e-4)
    set_output_stride(net, 16)
    assert torch.equal(logits(net), at_16)


def test_a_pooling_that_only_one_stride_has_comes_and_goes() -> None:
    """ResNeSt pools in the blocks that stride, and has None in the others."""
    net, fresh = network("resnest14d", 8, (4, 8)), network("resnest14d", 16, (2, 4))
    at_8 = logits(net)
    for _ in range(2):
        set_output_stride(net.train(), 16)
        assert all(m.training for m in net.modules())
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(logits(net), logits(fresh))
        set_output_stride(net, 8)
        assert torch.equal(logits(net), at_8)


def test_a_restrided_network_trains_and_ships_as_the_other_does(tmp_path: Path) -> None:
    net, fresh = network("test_efficientnet", 16, (2,)), network("test_efficientnet", 8, (4,))
    set_output_stride(net, 8)
    fresh.load_state_dict(net.state_dict())
    for n in (net, fresh):
        loss_of(n(images())).backward()
    for a, b in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) if a.grad is not None else b.grad is None
    checkpoint_activations(net.backbone)
    shipped = net.inference_network()
    export_onnx(shipped, tmp_path / "model.onnx")
    assert check_export(tmp_path / "model.onnx", shipped, [np.asarray(images(1)[0].permute(1, 2, 0))]) > 0.9999


def test_strides_that_do_not_fit_change_nothing() -> None:
    net = network(rates=(2, 3))
    before = str(net)
    for stride, where, words in (
        (32, "model.atrous_rates", "rates 2/3 at output stride 16 would be 1.0/1.5 at 32; expected multiples of 2"),
        (4, "model.output_stride", "expected 8, 16 or 32"),
        (0, "model.output_stride", "expected 8, 16 or 32"),
    ):
        with pytest.raises(ConfigError) as caught:
            set_output_stride(net, stride)
        assert caught.value.where == where and words in str(caught.value)
    with pytest.raises(ConfigError, match="model.low_levels: .*output_stride 8"):
        set_output_stride(
            build(
                Architecture(
                    num_classes=3, backbone="mobilenetv2_035", output_stride=32, channels=8, low_levels=(16, 4)
                ),
                seed=0,
            ),
            8,
        )
    assert str(net) == before and net.architecture.output_stride == 16


def test_what_others_set_on_a_network_outlives_a_stride() -> None:
    net = network()
    checkpoint_activations(net.backbone)
    freeze(net, ["batch_norm"])
    draw_part(net, 1, 2)
    hooked: list[int] = []
    net.backbone.blocks[6].register_forward_hook(lambda *_: hooked.append(1))
    set_output_stride(net, 8)
    assert (net.dropout.part, net.dropout.parts) == (1, 2) and not net.train().backbone.bn1.training
    loss_of(net(images())).backward()
    assert hooked == [1] and "forward" in vars(net.backbone.blocks[6][0])


# ---- activation checkpointing ---------------------------------------------------------------


def steps(net: nn.Module, count: int = 2) -> None:
    """`count` forward and backward passes that add up in .grad; the statistics move at each."""
    for i in range(count):
        loss_of(net(images(1, 32 + 32 * i, 64).float() / 255)).backward()


def awake(backbone: nn.Module) -> nn.Module:
    """timm starts the last norm of a residual branch at 0: nothing before it would get a gradient."""
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any():
            nn.init.constant_(m.weight, 0.5)
    return backbone.train()


@pytest.mark.parametrize(
    "name",
    ["mobilenetv2_035", "test_resnet", "regnety_002", "tf_efficientnet_lite0", "mobilenetv3_small_050", "xception41"],
)
def test_the_same_gradients_and_statistics_once_a_step(name: str) -> None:
    torch.manual_seed(0)
    plain = awake(create_backbone(name, 16))
    twice = copy.deepcopy(plain)
    assert checkpoint_activations(twice) == checkpoint_activations(twice) > 3
    assert list(twice.state_dict()) == list(plain.state_dict())
    for net in (plain, twice):
        steps(net)
    for (key, a), b in zip(plain.named_parameters(), twice.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
    counters = [b for key, b in twice.named_buffers() if key.endswith("num_batches_tracked")]
    assert counters and all(c == 2 for c in counters)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), twice.buffers(), strict=True))


def held_bytes(backbone: nn.Module) -> int:
    """Of the maps that the graph of one forward pass keeps: what autograd saved, and blocks' inputs."""
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    units = [m for m in backbone.modules() if "forward" in vars(m)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: (keep(inputs[0]), None)[1]) for m in units]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone(images().float())
    for hook in hooks:
        hook.remove()
    assert output[0].requires_grad
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in weights)


@pytest.mark.parametrize(("name", "times"), [("mobilenetv2_035", 5), ("resnet18", 1.9), ("regnety_002", 4)])
def test_most_activations_are_not_kept(name: str, times: float) -> None:
    backbone = create_backbone(name, 16).train()
    before = held_bytes(backbone)
    checkpoint_activations(backbone)
    assert held_bytes(backbone) * times < before


def test_copies_are_plain_networks() -> None:
    net = network()
    checkpoint_activations(net.backbone)
    average = EMA(net, 0.5)
    loss_of(net(images())).backward()
    average.update(9)
    for copied in (average.network, net.inference_network(), copy.deepcopy(net)):
        block = copied.backbone.blocks[1][0]  # type: ignore[union-attr,index]
        assert block is not net.backbone.blocks[1][0] and block.forward.__self__ is block
        plain = network()
        plain.load_state_dict(copied.state_dict(), strict=False)
        assert torch.equal(logits(copied), logits(plain))
    twin = copy.deepcopy(net)
    weights = twin.backbone.blocks[1][0].conv_pw.weight
    with torch.no_grad():
        weights.zero_()
    assert not torch.equal(logits(twin), logits(net))  # its blocks compute with its own weights
    assert checkpoint_activations(twin.backbone) > 3


def test_under_bf16_autocast_and_with_dropped_paths() -> None:
    torch.manual_seed(0)
    plain = awake(create_backbone("mobilenetv2_035", 16))
    for m in plain.modules():
        if getattr(m, "has_skip", False):
            m.drop_path = nn.Dropout(0.5)
    assert any(isinstance(m, nn.Dropout) for m in plain.modules())
    twice = copy.deepcopy(plain)
    checkpoint_activations(twice)
    for net in (plain, twice):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(images().float() / 255)
        loss_of(output).backward()
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) if a.grad is not None else b.grad is None


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Captured once and replayed: gradients and statistics are those of plain steps, and peak memory is less."""
    plain = network().cuda()
    twice, batch = copy.deepcopy(plain), images(2, 256, 256).cuda()
    checkpoint_activations(twice.backbone)
    peaks = []
    for net in (plain, twice):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        loss_of(net(batch)).backward()
        peaks.append(torch.cuda.max_memory_allocated() - held)
        net.zero_grad(set_to_none=False)
    assert peaks[1] < peaks[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_of(twice(batch)).backward()
    torch.cuda.current_stream().wait_stream(stream)
    twice.zero_grad(set_to_none=False)
    loss_of(plain(batch)).backward()
    plain.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(twice(batch)).backward()
    twice.zero_grad(set_to_none=False)
    graph.replay()
    loss_of(plain(batch)).backward()
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for a, b in zip(plain.buffers(), twice.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class InPlace(nn.Module):
    """A block whose first layer overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(self.act(x)))


class OfAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.narrow(self.wide(self.norm(torch.cat(maps, 1))).relu())
        return out


def test_blocks_that_take_lists_are_computed_again() -> None:
    x, found = torch.randn(2, 3, 4, 4, requires_grad=True), []
    for again in (False, True):
        torch.manual_seed(0)
        net = nn.ModuleList([OfAList()])
        if again:
            assert checkpoint_activations(net) == 1
        net[0]([x, 2 * x]).square().sum().backward()
        found.append([*net.buffers(), *(p.grad for p in net.parameters()), x.grad.clone()])
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_can_not_be_computed_twice_is_refused() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(InPlace()))
    checkpoint_activations(backbone)
    with pytest.raises(ConfigError, match="InPlace changes its input in place"):
        backbone(torch.randn(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="training.activation_checkpointing: no blocks are known in Sequential"):
        checkpoint_activations(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
