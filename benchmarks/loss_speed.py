"""Milliseconds of cross-entropy with gradient over upsampled bf16 logits: the Triton kernels beside the plain form.

    python benchmarks/loss_speed.py [--size 768x768] [--batch 16] [--classes 19] [--strides 4,8,16] [--seconds 45]

Needs a CUDA device. First how far value and gradient of both are from the plain form in float64, on two images.
Then forward and backward as CUDA graphs, as the training loop has them, interleaved, medians; each graph goes
through several batches, so that a batch's logits are not in the cache from the round before. Bytes are those that
the kernels read and write; the share is of what a large copy moves in the same time. Last the kernels' block
sizes, one changed at a time, as far as --seconds reach: compiling a form takes Triton some seconds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped,import-not-found]
from machine import cpu_name
from torch import Tensor

from roadseg.labels import IGNORE
from roadseg.train.losses import pixel_kernel as loss_kernel
from roadseg.train.losses.pixel import plain_cross_entropy_sum

ROUNDS = 7
BATCHES = 3  # in a graph
SMOOTHING = 0.05
# What is changed, one row at a time, of loss_kernel's constants.
TRIED: tuple[dict[str, int], ...] = (
    {},
    {"ROWS": 8},
    {"ROWS": 32},
    {"ROWS": 64},
    {"COLUMNS": 64},
    {"COLUMNS": 32, "COLUMN_WARPS": 2},
    {"COLUMNS": 64, "COLUMN_WARPS": 8},
    {"LANES": 128, "WARPS": 4},
    {"LANES": 32, "WARPS": 1},
    {"LANES": 128, "WARPS": 2},
)


@dataclass(frozen=True)
class Head:
    """One batch's logits of a head, bf16 [B, K, h, w] channels last, with what its loss takes."""

    logits: Tensor
    label: Tensor  # uint8 [B, H, W]
    weights: Tensor  # float32 [K]


def head(batch: int, classes: int, size: tuple[int, int], stride: int, seed: int) -> Head:
    draw = torch.Generator("cuda").manual_seed(seed)
    low = [-(-side // stride) for side in size]
    logits = 3 * torch.randn(batch, classes, *low, generator=draw, device="cuda")
    logits = logits.to(torch.bfloat16, memory_format=torch.channels_last)
    label = torch.randint(0, classes, (batch, *size), generator=draw, device="cuda", dtype=torch.uint8)
    label[torch.rand(label.shape, generator=draw, device="cuda") < 0.05] = IGNORE
    return Head(logits.requires_grad_(), label, torch.rand(classes, generator=draw, device="cuda") + 0.5)


Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def errors(loss_of: Loss, h: Head) -> tuple[float, float]:
    """|value - reference| / reference and the same of the gradient's norm, against the plain form in float64."""

    def both(f: Loss, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = f(logits, h.label, h.weights, SMOOTHING)
        return loss.detach().double(), torch.autograd.grad(loss, logits)[0].double()

    value, slope = both(loss_of, h.logits)
    wanted, wanted_slope = both(plain_cross_entropy_sum, h.logits.detach().double().requires_grad_())
    return float((value - wanted).abs() / wanted), float((slope - wanted_slope).norm() / wanted_slope.norm())


def captured(step: Callable[[Head], object], heads: Sequence[Head]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(heads[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for h in heads:
            step(h)
    return graph


def trained(loss_of: Loss) -> Callable[[Head], object]:
    return lambda h: torch.autograd.grad(loss_of(h.logits, h.label, h.weights, SMOOTHING), h.logits)


def forward(h: Head) -> object:
    return loss_kernel.upsampled_cross_entropy(h.logits, h.label, h.weights, SMOOTHING)


def losses(h: Head) -> object:
    return loss_kernel.upsampled_losses(h.logits, h.label)


def medians(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Milliseconds a batch of each graph, rounds interleaved."""
    took: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(ROUNDS + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            end.synchronize()
            if repeat:  # the first warms up
                took[name].append(start.elapsed_time(end) / 4 / BATCHES)
    return {name: statistics.median(ms) for name, ms in took.items()}


def copy_bytes_per_ms() -> float:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(times)


def moved_bytes(h: Head) -> int:
    """Logits and labels read, the sums over pixel rows written and read, the gradient written."""
    loss = loss_kernel.upsampled_cross_entropy(h.logits, h.label, h.weights, SMOOTHING)
    assert loss.grad_fn is not None
    (sums,) = loss.grad_fn.saved_tensors  # type: ignore[attr-defined]
    return 2 * h.logits.nbytes + h.label.nbytes + 2 * int(sums.nbytes)


@contextmanager
def constants(changed: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(loss_kernel, name) for name in changed}
    for name, value in changed.items():
        setattr(loss_kernel, name, value)
    yield
    for name, value in before.items():
        setattr(loss_kernel, name, value)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="768x768", help="height x width of the label")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--strides", default="4,8,16", help="of the heads")
    parser.add_argument("--seconds", type=float, default=45, help="no further block size is begun after these")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: the kernels run on one alone")
    height, width = map(int, a.size.split("x"))
    size, strides = (height, width), [int(s) for s in a.strides.split(",")]
    print(
        f"{torch.cuda.get_device_name()}, {cpu_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}, "
        f"Python {platform.python_version()}; batch {a.batch} of {a.size}, {a.classes} classes, bf16"
    )
    forms: dict[str, Loss] = {"kernels": loss_kernel.upsampled_cross_entropy, "plain": plain_cross_entropy_sum}
    print("\n| relative error against float64 | value | gradient |\n|---|---|---|")
    for stride in strides:
        for name, loss_of in forms.items():
            value, slope = errors(loss_of, head(2, a.classes, size, stride, 1))
            print(f"| stride {stride}, {name} | {value:.1e} | {slope:.1e} |")
    print(f"after {time.perf_counter() - began:.0f} s", flush=True)

    copied = copy_bytes_per_ms()
    print(f"\na copy moves {copied / 1e9:.2f} TB/s, read and written")
    print("| stride | plain, ms | kernels, ms | times faster | of it forward | losses alone | MB | of a copy |")
    print("|---|---|---|---|---|---|---|---|")
    heads = {s: [head(a.batch, a.classes, size, s, seed) for seed in range(BATCHES)] for s in strides}
    for stride, own in heads.items():
        steps = {**{name: trained(loss_of) for name, loss_of in forms.items()}, "forward": forward, "losses": losses}
        ms = medians({name: captured(step, own) for name, step in steps.items()})
        moved = moved_bytes(own[0])
        print(
            f"| {stride} | {ms['plain']:.2f} | {ms['kernels']:.3f} | {ms['plain'] / ms['kernels']:.1f} "
            f"| {ms['forward']:.3f} | {ms['losses']:.3f} | {moved / 1e6:.0f} "
            f"| {moved / ms['kernels'] / copied:.0%} |"
        )
    print(f"after {time.perf_counter() - began:.0f} s", flush=True)

    print("\n| changed | " + " | ".join(f"stride {s}, ms (forward)" for s in strides) + " |")
    print("|---|" + "---|" * len(strides))
    step = trained(forms["kernels"])
    for changed in TRIED:
        cells = []
        for own in heads.values():
            if time.perf_counter() - began > a.seconds:
                cells.append("")
                continue
            with constants(changed):
                ms = medians({"both": captured(step, own), "forward": captured(forward, own)})
            cells.append(f"{ms['both']:.3f} ({ms['forward']:.3f})")
        name = ", ".join(f"{k} {v}" for k, v in changed.items()) or "nothing"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
