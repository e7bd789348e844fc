"""Gradients of a batch: in parts as in one, and plainly where compilation or capture fails."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roadseg.config.training import Loss
from roadseg.data.batches.loader import Batch
from roadseg.errors import PeerLost
from roadseg.model.deeplab import Architecture, build
from roadseg.model.dropout import draw_part
from roadseg.train.distributed.launch import launch
from roadseg.train.distributed.process_group import ALONE, Ranks, joined
from roadseg.train.distributed.sync_batch_norm import sync_batch_norm
from roadseg.train.gradients import EAGER_STEPS, Gradients
from roadseg.train.losses.criterion import Criterion, Terms
from roadseg.train.losses.objective import Objective
from tests.train.small import plain_criterion

CPU = torch.device("cpu")


def network(dropout: float = 0.0) -> nn.Module:
    return build(
        Architecture(
            num_classes=3, backbone="mobilenetv2_035", output_stride=16, channels=8, auxiliary=True, dropout=dropout
        ),
        seed=0,
    )


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8, generator=draw)
    return Batch(image, torch.randint(0, 3, (4, 32, 48), dtype=torch.uint8, generator=draw), ())


def objective() -> Objective:
    return Objective(plain_criterion())


def of(net: nn.Module, **options: Any) -> tuple[float, list[Tensor]]:
    net.eval()  # batch norm by its running statistics: parts see what the whole sees
    loss = Gradients(net, objective(), CPU, False, False, **options)(batch())
    return loss.item(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_micro_batches_add_up() -> None:
    loss, whole = of(network())
    for parts in (2, 4):
        split_loss, split = of(network(), accumulate=parts)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


def of_the_default_network(ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, training, with dropout and every term of the loss: of a whole batch of 4."""
    architecture = Architecture(num_classes=19, backbone="mobilenetv2_100", auxiliary=True)
    net = build(architecture, seed=0, mean=(120.0,) * 3, std=(60.0,) * 3).train().double()
    draw_part(sync_batch_norm(net, ranks), ranks.rank, ranks.world)
    every = Terms(**dict.fromkeys(Loss.model_fields, 0.5))
    criterion = Criterion(
        main=every,
        auxiliary=every,
        auxiliary_weight=0.4,
        class_weights_K=torch.linspace(1, 10, 19),
        label_smoothing=0.1,
        ohem_threshold=0.7,
        ohem_keep=0.0625,
        focal_gamma=2.0,
        boundary_px=2,
        ranks=ranks,
    )
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 8, 12, generator=draw) * 255
    image = nn.functional.interpolate(coarse, (64, 96), mode="bilinear").byte().permute(0, 2, 3, 1)
    label = (image.float().mean(-1) / 14).byte()
    mine = slice(ranks.rank * 4 // ranks.world, (ranks.rank + 1) * 4 // ranks.world)
    torch.manual_seed(0)
    loss = Gradients(net, Objective(criterion), CPU, False, False, ranks=ranks)(Batch(image[mine], label[mine], ()))
    return loss, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def default_network_task(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        torch.save(of_the_default_network(ranks), Path(folder) / f"{ranks.rank}.pt")


def test_two_ranks_compute_the_default_network_s_gradient(tmp_path: Path) -> None:
    """In float32 rounding alone moves it by up to a percent, as some of its ReLUs switch. Sums are sent as float32."""
    launch(default_network_task, (str(tmp_path),), 2)
    loss, whole = of_the_default_network(ALONE)
    for rank in (0, 1):
        found_loss, found = torch.load(tmp_path / f"{rank}.pt")
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-6) and found.keys() == whole.keys()
        largest = max(float(g.norm()) for g in whole.values())
        for name, expected in whole.items():
            apart = float((found[name] - expected).norm())
            assert apart < 1e-6 * max(float(expected.norm()), 1e-3 * largest), name


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("inductor can't\ncompile this")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_can_not_be_compiled_is_computed_plainly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    calls = []

    def compile_(net: nn.Module, **_: Any) -> Any:
        def forward(image: Tensor) -> Tensor:
            calls.append(where)
            if where == "forward":
                raise RuntimeError("inductor can't\ncompile this")
            out: Tensor = FailsBackward.apply(net(image))
            return out

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    net = network().eval()
    gradients = Gradients(net, objective(), CPU, False, False, compiled=True)
    assert gradients.compiles
    losses = [gradients(batch()).item() for _ in range(3)]
    assert calls == [where] and not gradients.compiles  # tried once
    assert "the network is not compiled (RuntimeError: inductor can't compile this)" in caplog.text
    plain, expected = of(network())
    assert losses == [plain] * 3
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=False) if p.grad is not None)


def test_a_backward_that_can_not_be_compiled_leaves_no_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled forward came through: it has drawn, and updated running statistics."""
    monkeypatch.setattr(torch, "compile", lambda net, **_: lambda image: FailsBackward.apply(net(image).logits))
    found = []
    for compiled in (False, True):
        net = network(dropout=0.5).train()
        torch.manual_seed(0)
        loss = Gradients(net, objective(), CPU, False, False, compiled=compiled)(batch())
        found.append((loss, [p.grad for p in net.parameters()], list(net.buffers())))
    for plain, retried in zip(*found, strict=True):
        pairs = zip(plain, retried, strict=True) if isinstance(plain, list) else [(plain, retried)]
        assert all(torch.equal(a, b) for a, b in pairs)


def compiling_task(ranks: Ranks, folder: str) -> None:
    said = []
    logging.getLogger("roadseg.train.gradients").addFilter(lambda record: said.append(record.getMessage()) or True)
    with joined(ranks, CPU):
        found = []
        for broken in (None, 1):

            def compile_(f: Any, broken: int | None = broken, **_: Any) -> Any:
                if ranks.rank == broken:
                    raise OSError(28, "No space left on device")
                return f

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "compile", compile_)
                found.append(Gradients(network(), objective(), CPU, False, False, compiled=True, ranks=ranks).compiles)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps([found, said]))


def test_where_one_rank_can_not_compile_none_does(tmp_path: Path) -> None:
    launch(compiling_task, (str(tmp_path),), 2)
    (first, said), (second, silent) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == [True, False]
    assert said == ["the network is not compiled (rank 1: OSError: [Errno 28] No space left on device)"] and not silent


def test_a_lack_of_memory_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(image: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "compile", lambda net, **_: forward)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Gradients(network(), objective(), CPU, False, False, compiled=True)(batch())


NOT_CAPTURED = "steps stay eager: the CUDA graph could not be captured ("


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("not permitted when stream is capturing"), "a previous error during capture"),
        (PeerLost("another rank no longer answers"), "another rank no longer answers"),
    ],
)
def test_what_can_not_be_captured_is_computed_plainly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, told: str
) -> None:
    """CUDA is faked: it refuses what the network does in a capture, and then to end the capture, in several lines."""
    capturing, tried = [False], []

    @contextmanager
    def graph(made: object, **_: Any) -> Iterator[None]:
        capturing[0] = True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("a previous error during capture\nCompile with ...") from None
        finally:
            capturing[0] = False

    def refuse(*_: Any) -> None:
        if capturing[0]:
            tried.append(True)
            raise error

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    put_back: list[str] = []
    draws = SimpleNamespace(clone_state=lambda: "as before", graphsafe_set_state=put_back.append)
    monkeypatch.setattr("roadseg.train.gradients._generator", lambda _: draws)
    net = network().eval()
    net.register_forward_pre_hook(refuse)
    gradients = Gradients(net, objective(), CPU, False, True)
    gradients._captures = True  # on a CPU it is not asked for
    losses = [gradients(batch()).item() for _ in range(EAGER_STEPS + 3)]
    assert tried == [True] and put_back == ["as before"]  # once
    assert caplog.messages == [f"{NOT_CAPTURED}{told})"]
    plain, expected = of(network())
    assert losses == [plain] * len(losses)
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=False) if p.grad is not None)


class ReadsBack(nn.Module):
    """What it returns is looked at on the host, which no stream that is being captured allows."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_BCHW: Tensor) -> Any:
        output = self.network(image_BCHW)
        assert output.logits.float().abs().mean().item() < 1e6
        return output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no dropout", "dropout"])  # drawn from a generator of the device
def test_a_layer_that_forbids_capture_trains_as_without_a_graph(
    caplog: pytest.LogCaptureFixture, dropout: float
) -> None:
    """One class alone, which is learned by 1 to 2 % a step; rounding in another order grows to some 0.03 % of it."""
    cuda = torch.device("cuda")
    image = torch.randint(0, 256, (8, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one_class = Batch(image, torch.ones(image.shape[:3], dtype=torch.uint8), ())

    def losses(graph: bool) -> list[float]:
        net = ReadsBack(network(dropout)).to(cuda, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(net.parameters(), 0.02)
        gradients, found = Gradients(net, objective(), cuda, False, graph), []
        for step in range(EAGER_STEPS + 4):
            torch.manual_seed(step)  # as the loop does
            found.append(gradients(one_class).item())
            optimizer.step()
        return found

    eager = losses(False)
    assert caplog.messages == [] and eager[-1] < 0.9 * eager[0]
    assert losses(True) == pytest.approx(eager, rel=3e-3)
    (line,) = caplog.messages
    assert line.startswith(NOT_CAPTURED)
