"""Gradients of a batch: in parts as in one, and plainly where compilation fails."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roadseg.data.loader import Batch
from roadseg.model.deeplab import Architecture, build
from roadseg.train.criterion import Criterion, Terms
from roadseg.train.gradients import Gradients
from roadseg.train.objective import Objective

CPU = torch.device("cpu")


def network() -> nn.Module:
    return build(Architecture(3, "mobilenetv2_035", 16, channels=8, auxiliary=True, dropout=0.0), seed=0)


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8, generator=draw)
    return Batch(image, torch.randint(0, 3, (4, 32, 48), dtype=torch.uint8, generator=draw), ())


def objective() -> Objective:
    return Objective(Criterion(Terms(), Terms(), 0.4, None, 0.0, 0.7, 0.0625, 2.0, 3))


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
    losses = [gradients(batch()).item() for _ in range(3)]
    assert calls == [where]  # tried once
    assert "the network is not compiled (RuntimeError: inductor can't compile this)" in caplog.text
    plain, expected = of(network())
    assert losses == [plain] * 3
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=False) if p.grad is not None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("DataLoader worker (pid 7)")])
def test_other_troubles_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def forward(image: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "compile", lambda net, **_: forward)
    with pytest.raises(type(error), match=str(error).split("(")[0]):
        Gradients(network(), objective(), CPU, False, False, compiled=True)(batch())
