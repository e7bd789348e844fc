"""Batch norm over two ranks is nn.BatchNorm2d over the batch that they hold between them.

CUDA's form runs on the CPU here, each of its kernels replaced by what it computes; `pytest -m gpu` runs the kernels
themselves, where two GPUs are.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from roadseg.errors import ConfigError, PeerLost
from roadseg.model.deeplab import build
from roadseg.model.surgery import checkpoint_activations
from roadseg.train.distributed import sync_batch_norm as synced_norm
from roadseg.train.distributed.launch import launch
from roadseg.train.distributed.process_group import Ranks, joined
from roadseg.train.distributed.sync_batch_norm import ON_CPU, ON_CUDA, plain_batch_norm, sync_batch_norm
from tests.train.small import small_architecture

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
    "channels last, equal parts": ((2, 2), 0.5, 2.0),
    "bfloat16": ((2, 2), 0.5, 2.0),
    "mean of all steps": ((2, 2), 0.5, 2.0),
    "with activation": ((2, 2), 0.5, 2.0),
    "without weights": ((2, 2), 0.5, 2.0),
    "without running statistics": ((2, 2), 0.5, 2.0),
    "frozen weights": ((2, 2), 0.5, 2.0),
    "frozen input": ((2, 2), 0.5, 2.0),
    "evaluated": ((2, 2), 0.5, 2.0),
}
EQUAL = [case for case, ((first, second), *_) in CASES.items() if first == second]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def norm(case: str) -> nn.BatchNorm2d:
    if case == "with activation":
        made: nn.BatchNorm2d = BatchNormAct2d(5, act_layer=nn.ReLU6, inplace=True)
        made.drop = Doubled()
    else:
        made = nn.BatchNorm2d(
            5,
            momentum=None if case == "mean of all steps" else 0.1,
            affine=case != "without weights",
            track_running_stats=case != "without running statistics",
        )
    draw = torch.Generator().manual_seed(1)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(torch.rand(5, generator=draw) + 0.5)
            made.bias.copy_(torch.randn(5, generator=draw))
    return made.requires_grad_(case != "frozen weights").train(case != "evaluated")


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
    if case.startswith("channels last"):
        x = x.contiguous(memory_format=torch.channels_last)
    return (x.bfloat16(), dy.bfloat16()) if case == "bfloat16" else (x, dy)


def steps(
    layer: nn.Module, case: str, part: slice, device: torch.device = CPU, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Two steps; of the second the output and gradients, and the buffers after both. The whole batch in float32."""
    for step in (0, 1):
        x, dy = (t.float() if part == slice(None) else t[part].to(device) for t in data(case, step))
        x = x.clone(memory_format=torch.preserve_format).requires_grad_(case != "frozen input")
        layer.zero_grad()
        y = (run or layer)(x * 1)  # timm's activations work in place, on what is no leaf
        (y * dy).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    gradients |= {"dx": x.grad} if x.grad is not None else {}
    return {"y": y.detach(), **gradients, **dict(layer.named_buffers())}


def task(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        for case, (counts, *_) in CASES.items():
            layer = sync_batch_norm(nn.Sequential(norm(case)), ranks)
            first = sum(counts[: ranks.rank])
            found = steps(layer, case, slice(first, first + counts[ranks.rank]))
            torch.save(found, Path(folder) / f"{case} {ranks.rank}.pt")


def task_of_cuda(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        for kernel in KERNELS:
            setattr(torch, f"batch_norm_{kernel.__name__}", kernel)
        torch.cuda.is_current_stream_capturing = lambda: False
        with patch("torch.distributed.get_backend", lambda: "nccl"):
            equal_parts(ranks, folder, CPU, None)


def task_compiled(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        equal_parts(ranks, folder, CPU, "aot_eager")


def task_on_gpus(ranks: Ranks, folder: str, compiler: str | None) -> None:
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    with joined(ranks, device):
        equal_parts(ranks, folder, device, compiler)


def task_of_graphs(ranks: Ranks, compiler: str | None) -> None:
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    with joined(ranks, device):
        for seen in (True, False):  # the first message, which connects the ranks, is none of a capture
            for last in (False, True):
                captured(ranks, device, compiler, last, seen)


def equal_parts(ranks: Ranks, folder: str, device: torch.device, compiler: str | None) -> None:
    for case in EQUAL:
        size = CASES[case][0][0]
        torch._dynamo.reset()  # each case is a network of its own
        layer = sync_batch_norm(nn.Sequential(norm(case)).to(device), ranks)
        run = torch.compile(layer, dynamic=False, fullgraph=True, backend=compiler) if compiler else None
        found = steps(layer, case, slice(ranks.rank * size, (ranks.rank + 1) * size), device, run)
        torch.save({name: t.cpu() for name, t in found.items()}, Path(folder) / f"{case} {ranks.rank}.pt")


def captured(ranks: Ranks, device: torch.device, compiler: str | None, last: bool, seen: bool) -> None:
    """A CUDA graph of forward and backward does what plain steps do, also of a size that was never seen before."""
    layer = sync_batch_norm(nn.Sequential(norm("equal parts")).to(device), ranks)
    run = torch.compile(layer, dynamic=False, fullgraph=True, backend=compiler) if compiler else layer
    x = torch.randn(3, 5, 7, 9 + 2 * last + seen, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x

    def step() -> tuple[Tensor, Tensor]:
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = run(given)
        return y, torch.autograd.grad(y.square().sum(), given)[0]

    if seen or compiler:
        step()
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), len(synced_norm._COUNTS)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = step()
        assert len(synced_norm._COUNTS) == kept  # nothing of the graph's own memory
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
    finally:
        graph.reset()  # while it stands, the ranks can't leave one another


def network_of(compiled: bool, ranks: Ranks) -> dict[str, Tensor]:
    """Three steps of a small network whose blocks are computed again for the gradient: its buffers and gradients."""
    network = build(small_architecture(dropout=0.0), seed=0, mean=(120.0,) * 3, std=(60.0,) * 3).train()
    assert checkpoint_activations(network.backbone)
    sync_batch_norm(network, ranks)
    run = torch.compile(network, dynamic=False, backend="aot_eager") if compiled else network
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        image = torch.randint(0, 256, (4, 3, 32, 64), dtype=torch.uint8, generator=draw)
        network.zero_grad()
        sum(logits.square().sum() for logits in flat(run(image.chunk(ranks.world)[ranks.rank]))).backward()  # type: ignore[union-attr]
    for p in network.parameters():
        assert p.grad is not None
        ranks.sum_(p.grad)
    return dict(network.named_buffers()) | {
        name: p.grad for name, p in network.named_parameters() if p.grad is not None
    }


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in flat(part)]


def network_task(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        torch.save(network_of(True, ranks), Path(folder) / f"{ranks.rank}.pt")
        breaks = torch._dynamo.utils.counters["graph_break"]
        (Path(folder) / f"{ranks.rank}.txt").write_text(repr(dict(breaks)))


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


@pytest.fixture(scope="module")
def results_compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled norms")
    launch(task_compiled, (str(folder),), 2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_equal_to_batch_norm_on_the_whole_batch(results: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results, case)


@pytest.mark.parametrize("case", EQUAL)
def test_of_cuda_equal_to_batch_norm_on_the_whole_batch(results_of_cuda: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results_of_cuda, case)


@pytest.mark.parametrize("case", EQUAL)
def test_compiled_equal_to_batch_norm_on_the_whole_batch(results_compiled: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results_compiled, case)


def test_a_network_is_compiled_as_one_graph_and_counts_a_step_once(tmp_path: Path) -> None:
    launch(network_task, (str(tmp_path),), 2)
    whole = network_of(False, Ranks())
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text() == "{}"
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            scale = max(1e-3, float(expected.abs().max()))
            torch.testing.assert_close(
                found[name],
                expected,
                rtol=1e-3,
                atol=1e-4 * scale,
                msg=lambda m, n=name: f"{n}: {m}",  # type: ignore[misc]
            )


def test_counts_are_read_in_a_capture_and_none_of_its_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [False]
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr(synced_norm, "_COUNTS", {})
    kept = synced_norm._counts(7, torch.int32, CPU)
    assert kept.tolist() == [7, 7, 7] and kept.dtype == torch.int32
    capturing[0] = True
    assert synced_norm._counts(7, torch.int32, CPU) is kept
    assert synced_norm._counts(8, torch.float32, CPU) is not synced_norm._counts(8, torch.float32, CPU)
    capturing[0] = False
    assert synced_norm._counts(8, torch.float32, CPU) is synced_norm._counts(8, torch.float32, CPU)


@pytest.mark.parametrize("kinds", [ON_CPU, ON_CUDA], ids=["gloo", "nccl"])
@pytest.mark.parametrize("lost", ["forward", "backward"])
@pytest.mark.parametrize("traced", [False, True])
def test_a_lost_peer_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, kinds: dict[type, type], lost: str, traced: bool
) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    def both_alike(rows: Any, own: Tensor) -> None:
        for row in rows if isinstance(rows, list) else rows.view(2, -1):
            row.copy_(own)

    for kernel in KERNELS:
        monkeypatch.setattr(torch, f"batch_norm_{kernel.__name__}", kernel)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: traced)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl" if kinds is ON_CUDA else "gloo")
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for name in ("all_gather", "all_gather_into_tensor"):
        monkeypatch.setattr(f"torch.distributed.{name}", gone if lost == "forward" else both_alike)
    monkeypatch.setattr("torch.distributed.all_reduce", gone)
    layer = sync_batch_norm(nn.Sequential(norm("equal parts")), TWO)
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    if lost == "backward":
        y = layer(x).square().sum()
    with pytest.raises(
        PeerLost, match=r"another rank no longer answers \(Connection closed by peer \[127.0.0.1\]:1234\)"
    ):
        y.backward() if lost == "backward" else layer(x)


@pytest.fixture(scope="module", params=[None, "inductor"], ids=["kernels", "compiled"])
def results_on_gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms on gpus")
    launch(task_on_gpus, (str(folder), request.param), 2)
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", EQUAL)
def test_on_gpus_equal_to_batch_norm_on_the_whole_batch(results_on_gpus: Path, case: str) -> None:
    is_batch_norm_on_the_whole(results_on_gpus, case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_a_cuda_graph_replays_a_plain_step(compiler: str | None) -> None:
    launch(task_of_graphs, (compiler,), 2)


def is_batch_norm_on_the_whole(results: Path, case: str) -> None:
    whole = steps(nn.Sequential(norm(case)), case, slice(None))
    parts = [torch.load(results / f"{case} {rank}.pt") for rank in (0, 1)]
    assert parts[0].keys() == parts[1].keys() == whole.keys()
    joint = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx") if name in whole}
    joint |= {name: parts[0][name] + parts[1][name] for name in whole if name in ("0.weight", "0.bias")}  # type: ignore[misc]
    for name in whole.keys() - joint.keys():  # statistics: of the whole on each
        assert torch.equal(parts[0][name], parts[1][name])
        joint[name] = parts[0][name]
    for name, expected in whole.items():
        tolerance = 4e-3 if joint[name].dtype == torch.bfloat16 else 1e-5
        if case == "far from zero" and name != "0.running_mean":
            tolerance = 1e-3  # float32 itself: 1000 is stored to 6e-5, and the spread is 0.5
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(joint[name].to(expected), expected, rtol=tolerance, atol=tolerance * scale)


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
    network = build(small_architecture(), seed=0, mean=(120.0,) * 3, std=(60.0,) * 3)
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
