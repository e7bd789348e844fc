"""Milliseconds and memory of each term of the loss, forward and backward, beside F.interpolate + F.cross_entropy.

    python benchmarks/loss_terms.py [--size 768x768] [--batch 16] [--classes 19] [--stride 4]

Random logits in bf16 (fp32 on a CPU) and labels of 24-pixel blocks, a tenth of them void. On CUDA a
term is captured in a graph, as training does, and its memory is the peak above what the logits take.
Rounds of all terms are interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields

import torch
from side_by_side import medians_s, print_machine
from torch import Tensor
from torch.nn import functional as F

from roadseg.labels import IGNORE
from roadseg.train.losses.criterion import Criterion, Terms

WARM_UP = 3
MIB = 1 << 20


def losses(label: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name: logits to loss."""
    combinations = {f.name: {f.name: 1.0} for f in fields(Terms)}
    combinations["cross_entropy + ohem + boundary"] = {"cross_entropy": 1.0, "ohem": 1.0, "boundary": 1.0}

    def ours(weights: dict[str, float]) -> Callable[[Tensor], Tensor]:
        terms = Terms(**{"cross_entropy": 0.0, **weights})
        criterion = Criterion(
            main=terms,
            auxiliary=terms,
            auxiliary_weight=0.0,
            class_weights_K=None,
            label_smoothing=0.05,
            ohem_threshold=0.7,
            ohem_keep=0.0625,
            focal_gamma=2.0,
            boundary_px=3,
        )
        return lambda logits: criterion(logits, label, criterion.counts(label), 1)

    def peer(logits: Tensor) -> Tensor:
        large = F.interpolate(logits.float(), label.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(large, label.long(), ignore_index=IGNORE, label_smoothing=0.05)

    return {"F.interpolate + F.cross_entropy": peer, **{name: ours(w) for name, w in combinations.items()}}


def step_of(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Callable[[], object], float]:
    """What computes loss and gradient once, and the MiB that it takes (0 on a CPU)."""

    def step() -> tuple[Tensor, Tensor]:
        value = loss(logits)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    for _ in range(WARM_UP if logits.is_cuda else 1):
        step()
    if not logits.is_cuda:
        return step, 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    mib = (torch.cuda.max_memory_allocated() - before) / MIB
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="768x768")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    a = parser.parse_args()
    height, width = map(int, a.size.split("x"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_machine(device, f"batch {a.batch} of {a.size}")
    draw = torch.Generator().manual_seed(0)
    shape = (a.batch, a.classes, -(-height // a.stride), -(-width // a.stride))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(shape, generator=draw).to(device, dtype, memory_format=torch.channels_last).requires_grad_()
    blocks = torch.randint(0, a.classes, (a.batch, -(-height // 24), -(-width // 24)), generator=draw)
    blocks[torch.rand(blocks.shape, generator=draw) < 0.1] = IGNORE
    label = blocks.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, :height, :width].to(device, torch.uint8)
    steps = {form: step_of(loss, logits) for form, loss in losses(label.contiguous()).items()}
    print("| loss | ms, forward and backward | MiB |\n|---|---|---|")
    for form, seconds in medians_s({form: step for form, (step, _) in steps.items()}, device, a.steps).items():
        print(f"| {form} | {seconds * 1000:.2f} | {steps[form][1]:.0f} |")


if __name__ == "__main__":
    main()
