"""Batch norm over two ranks is nn.BatchNorm2d over the batch that they hold between them.

CUDA's form runs on the CPU here, each of its kernels replaced by what PyTorch documents of it; `pytest -m gpu` runs the
kernels themselves, where two GPUs are.
"""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.model.deeplab import Architecture, build
from roadseg.train.launch import launch
from roadseg.train.ranks import Ranks, joined
from roadseg.train.synced_norm import (
    ON_CPU,
    ON_CUDA,
    NcclBatchNorm2d,
    _same_counts,
    plain_batch_norm,
    sync_batch_norm,
)

CPU = torch.device("cpu")
TWO = Ranks(0, 2)
# name: (samples of each rank, mean and spread of the values, options)
CASES: dict[str, tuple[tuple[int, int], float, float]] = {
    "equal parts": ((2, 2), 0.5, 2.0),
    "unequal parts": ((3, 1), 0.5, 2.0),
    "an empty part": ((4, 0), 0.5, 2.0),
    "far from zero": ((2, 2), 1000.0, 0.5),
    "one value each": ((1, 1), 0.0, 1.0),
    "channels last": ((2, 3), 0.5, 2.0),
    "bfloat16": ((2, 2), 0.5, 2.0),
    "mean of all steps": ((2, 2), 0.5, 2.0),
    "with activation": ((2, 2), 0.5, 2.0),
    "without weights": ((2, 2), 0.5, 2.0),
    "evaluated": ((2, 2), 0.5, 2.0),
}
EQUAL = [case for case, ((first, second), *_) in CASES.items() if first == second]


def norm(case: str) -> nn.BatchNorm2d:
    if case == "with activation":
        made: nn.BatchNorm2d = BatchNormAct2d(5, act_layer=nn.ReLU6, inplace=True)
    else:
        made = nn.BatchNorm2d(
            5, momentum=None if case == "mean of all steps" else 0.1, affine=case != "without weights"
        )
    draw = torch.Generator().manual_seed(1)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(torch.rand(5, generator=draw) + 0.5)
            made.bias.copy_(torch.randn(5, generator=draw))
    return made.train(case != "evaluated")


# ---- what PyTorch's CUDA kernels of batch norm compute ----------------------------------------


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def gather_stats_with_counts(
    x: Tensor, mean: Tensor, invstd: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert counts.dtype == mean.dtype and counts.shape == (len(mean),)
    n = counts[:, None].double()
    all_mean = (mean * n).sum(0) / n.sum()
    all_var = ((invstd.double() ** -2 - eps + (mean - all_mean) ** 2) * n).sum(0) / n.sum()
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(all_mean.float(), momentum)
        running_var.lerp_((all_var * n.sum() / (n.sum() - 1)).float(), momentum)
    return all_mean.float(), torch.rsqrt(all_var + eps).float()


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    y = (x.float() - wide(mean)) * wide(invstd)
    y = y if weight is None else y * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor | None, ...]:
    sum_dy, sum_dy_xmu = dy.float().sum((0, 2, 3)), (dy.float() * (x.float() - wide(mean))).sum((0, 2, 3))
    made = (sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy)
    return tuple(t if ok else None for t, ok in zip(made, (wanted[0], *wanted), strict=True))


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sum_dy: Tensor, sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:  # fmt: skip
    assert count.dtype == torch.int32
    n = count.sum()
    dx = dy.float() - wide(sum_dy / n) - (x.float() - wide(mean)) * wide(invstd**2 * sum_dy_xmu / n)
    return (dx * wide(invstd if weight is None else invstd * weight)).to(x.dtype)


def wide(value: Tensor) -> Tensor:
    return value[:, None, None]


KERNELS = (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt)

# -----------------------------------------------------------------------------------------------


def data(case: str, step: int) -> tuple[Tensor, Tensor]:
    """Values and gradients of the whole batch."""
    counts, mean, spread = CASES[case]
    side = 1 if case == "one value each" else 6
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(sum(counts), 5, side, side, generator=draw) * spread + mean
    dy = torch.randn(x.shape, generator=draw)
    if case == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    return (x.bfloat16(), dy.bfloat16()) if case == "bfloat16" else (x, dy)


def steps(layer: nn.Module, case: str, part: slice, device: torch.device = CPU) -> dict[str, Tensor]:
    """Two steps; of the second the output and gradients, and the buffers after both."""
    for step in (0, 1):
        x, dy = (t[part].to(device) for t in data(case, step))
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        y = layer(x * 1)  # timm's activations work in place, on what is no leaf
        (y * dy).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


def task(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        for case, (counts, *_) in CASES.items():
            layer = sync_batch_norm(nn.Sequential(norm(case)), ranks)
            first = sum(counts[: ranks.rank])
            found = steps(layer, case, slice(first, first + counts[ranks.rank]))
            torch.save(found, Path(folder) / f"{case} {ranks.rank}.pt")


def equal_parts(ranks: Ranks, folder: str, device: torch.device, compiled: bool) -> None:
    for case in EQUAL:
        size = CASES[case][0][0]
        layer = sync_batch_norm(nn.Sequential(norm(case)).to(device), ranks)
        assert isinstance(layer[0], NcclBatchNorm2d)
        run = torch.compile(layer, dynamic=False) if compiled else layer
        found = steps(run, case, slice(ranks.rank * size, (ranks.rank + 1) * size), device)
        found = {name.removeprefix("_orig_mod."): t.cpu() for name, t in found.items()}
        torch.save(found, Path(folder) / f"{case} {ranks.rank}.pt")


def task_of_cuda(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        for kernel in KERNELS:
            setattr(torch, f"batch_norm_{kernel.__name__}", kernel)
        torch.cuda.is_current_stream_capturing = lambda: False
        with patch("torch.distributed.get_backend", lambda: "nccl"):
            equal_parts(ranks, folder, CPU, False)


def task_on_gpus(ranks: Ranks, folder: str, compiled: bool) -> None:
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    with joined(ranks, device):
        equal_parts(ranks, folder, device, compiled)
        if not compiled:
            captured(ranks, device)


def captured(ranks: Ranks, device: torch.device) -> None:
    """A CUDA graph of forward and backward, of a size that was never seen before, does what eager steps do."""
    layer = sync_batch_norm(nn.Sequential(norm("equal parts")).to(device), ranks)
    x = torch.randn(3, 5, 7, 9, device=device)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), _same_counts.cache_info().currsize
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        given = x.clone().requires_grad_()
        y = layer(given)
        (dx,) = torch.autograd.grad(y.square().sum(), given)
    assert _same_counts.cache_info().currsize == kept  # the graph's own memory is not kept
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    again = x.clone().requires_grad_()
    expected = layer(again)
    (dx_expected,) = torch.autograd.grad(expected.square().sum(), again)
    assert torch.equal(y, expected) and torch.equal(dx, dx_expected)
    graph.reset()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms")
    launch(task, (str(folder),), 2)
    return folder


@pytest.fixture(scope="module")
def results_of_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms of cuda")
    launch(task_of_cuda, (str(folder),), 2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_equal_to_batch_norm_on_the_whole_batch(results: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results, case)


@pytest.mark.parametrize("case", EQUAL)
def test_of_cuda_equal_to_batch_norm_on_the_whole_batch(results_of_cuda: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results_of_cuda, case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_gpus_equal_to_batch_norm_on_the_whole_batch(tmp_path: Path, compiled: bool) -> None:
    launch(task_on_gpus, (str(tmp_path), compiled), 2)
    for case in EQUAL:
        is_batch_norm_on_the_whole(tmp_path, case)


def is_batch_norm_on_the_whole(results: Path, case: str) -> None:
    whole = steps(nn.Sequential(norm(case)), case, slice(None))
    parts = [torch.load(results / f"{case} {rank}.pt") for rank in (0, 1)]
    assert parts[0].keys() == parts[1].keys() == whole.keys()
    joint = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
    joint |= {name: parts[0][name] + parts[1][name] for name in whole if name in ("0.weight", "0.bias")}
    for name in whole.keys() - joint.keys():  # statistics: of the whole on each
        assert torch.equal(parts[0][name], parts[1][name])
        joint[name] = parts[0][name]
    for name, expected in whole.items():
        tolerance = 4e-3 if expected.dtype == torch.bfloat16 else 1e-5
        if case == "far from zero" and name != "0.running_mean":
            tolerance = 1e-3  # float32 itself: 1000 is stored to 6e-5, and the spread is 0.5
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(joint[name], expected, rtol=tolerance, atol=tolerance * scale)


def test_against_double_precision_far_from_zero(results: Path) -> None:
    """Means of squares would have lost all of a spread of 0.5 around 1000."""
    x = torch.cat([data("far from zero", step)[0] for step in (1,)]).double()
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    layer = norm("far from zero")
    expected = expected * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]
    found = torch.cat([torch.load(results / f"far from zero {rank}.pt")["y"] for rank in (0, 1)])
    assert (found.double() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("kinds", [ON_CPU, ON_CUDA], ids=["gloo", "nccl"])
def test_conversion_keeps_parameters_and_keys_and_goes_back(monkeypatch: pytest.MonkeyPatch, kinds: dict) -> None:
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl" if kinds is ON_CUDA else "gloo")
    a = Architecture(3, "test_efficientnet", 16, "skfusion", "separable", 8, (1, 2, 3), (8, 4), True, 0.1)
    network = build(a, seed=0, mean=(120.0,) * 3, std=(60.0,) * 3)
    plain = [type(m) for m in network.modules()]
    assert nn.BatchNorm2d in plain and BatchNormAct2d in plain  # else the test shows nothing
    tensors, keys = [id(t) for t in (*network.parameters(), *network.buffers())], list(network.state_dict())
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = network.eval()(image)
    assert sync_batch_norm(network, TWO) is network
    assert [type(m) for m in network.modules()] == [kinds.get(kind, kind) for kind in plain]
    assert [id(t) for t in (*network.parameters(), *network.buffers())] == tensors
    assert list(network.state_dict()) == keys
    copied = plain_batch_norm(copy.deepcopy(network))  # as the average of the weights is
    assert [type(m) for m in copied.modules()] == plain and list(copied.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(copied(image), expected)


def test_alone_nothing_changes_and_unknown_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    layer = nn.Sequential(nn.BatchNorm2d(3))
    assert type(sync_batch_norm(layer, Ranks())[0]) is nn.BatchNorm2d
    with pytest.raises(ConfigError, match=r"BatchNorm3d \(1\) can't be shared.*sync_batch_norm to false"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm3d(3)), TWO)
