"""The Triton kernels against F.interpolate and F.cross_entropy in float64, interpreted on the CPU and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from roadseg.labels import IGNORE
from roadseg.train.losses.pixel import plain_cross_entropy_sum

BATCH = 2
FACTOR = 0.7  # what the loss is multiplied by before its gradient is taken


@dataclass(frozen=True)
class Case:
    low: tuple[int, int]
    size: tuple[int, int]
    classes: int
    class_weights: bool = False
    smoothing: float = 0.0
    pixel_weights: bool = False
    dtype: torch.dtype = torch.float32
    extreme: bool = False  # every logit is +-65504
    void: str = "some"
    layout: str = "channels last"
    label_dtype: torch.dtype = torch.uint8


CASES = {
    "ratio 4": Case((6, 5), (24, 20), 4),
    "ratio 8": Case((4, 3), (32, 24), 3, smoothing=0.1),
    "ratio 16": Case((2, 3), (32, 48), 2, class_weights=True),
    "no whole ratio": Case((5, 7), (19, 26), 11, True, 0.1, True),
    "ratio over a group's lanes": Case((2, 2), (3, 75), 2, True, 0.1, True),
    "one logit": Case((1, 1), (9, 4), 2, True, 0.1),
    "one row": Case((1, 6), (1, 24), 3),
    "equal sizes": Case((6, 7), (6, 7), 5, True, 0.1),
    "more logits than pixels": Case((9, 8), (4, 3), 5, pixel_weights=True),
    "more rows, fewer columns": Case((9, 4), (5, 13), 3),
    "19 classes": Case((3, 5), (12, 20), 19, True, 0.05, True),
    "33 classes": Case((3, 3), (7, 8), 33, True, 0.1),
    "contiguous": Case((4, 5), (16, 20), 3, True, layout="contiguous"),
    "a slice": Case((4, 5), (16, 20), 3, True, layout="slice"),
    "int64 labels": Case((4, 5), (16, 20), 3, True, label_dtype=torch.int64),
    "no void": Case((4, 5), (16, 20), 3, void="none"),
    "all void": Case((4, 5), (16, 20), 3, True, 0.1, True, void="all"),
    "extreme": Case((4, 5), (16, 20), 5, True, 0.1, True, extreme=True),
    "extreme, all void": Case((4, 5), (16, 20), 5, extreme=True, void="all"),
    "bf16": Case((4, 5), (16, 20), 11, True, 0.1, True, dtype=torch.bfloat16),
    "bf16, extreme": Case((4, 5), (16, 20), 5, True, dtype=torch.bfloat16, extreme=True),
    "fp16": Case((4, 5), (16, 20), 5, dtype=torch.float16),
}
LARGE = {
    f"bf16, stride {stride}": Case((side, side), (768, 768), 19, True, 0.05, dtype=torch.bfloat16)
    for stride, side in ((4, 192), (8, 96), (16, 48))
}


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    label: Tensor
    class_weights: Tensor | None
    smoothing: float
    pixel_weights: Tensor | None

    def all(self) -> tuple[Tensor, Tensor, Tensor | None, float, Tensor | None]:
        return self.logits, self.label, self.class_weights, self.smoothing, self.pixel_weights


def inputs(case: Case, device: str) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, case.classes, *case.low, generator=draw) * 3
    if case.extreme:
        logits = logits.sign() * 65504
    logits = logits.to(device, case.dtype)
    if case.layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    elif case.layout == "slice":
        logits = F.pad(logits, (1, 2, 3, 0, 1, 1))[:, 1:-1, 3:, 1:-2]
    label = torch.randint(0, case.classes, (BATCH, *case.size), generator=draw)
    if case.void != "none":
        label[torch.rand(label.shape, generator=draw) < {"some": 0.3, "all": 1.1}[case.void]] = IGNORE
    weights = torch.rand(case.classes, generator=draw) + 0.5 if case.class_weights else None
    pixels = torch.rand(label.shape, generator=draw) if case.pixel_weights else None
    return Inputs(
        logits.detach().requires_grad_(),
        label.to(device, case.label_dtype),
        None if weights is None else weights.to(device),
        case.smoothing,
        None if pixels is None else pixels.to(device),
    )


def reference(i: Inputs) -> tuple[Tensor, Tensor]:
    """Each pixel's weighted loss [B, H, W] and the gradient of FACTOR times their sum, in float64."""
    logits = i.logits.detach().double().requires_grad_()
    label = i.label.long()
    fine = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
    losses = (1 - i.smoothing) * F.cross_entropy(fine, label, ignore_index=IGNORE, reduction="none")
    losses = losses - i.smoothing * fine.log_softmax(1).mean(1)
    weights = (label != IGNORE).double()
    if i.class_weights is not None:
        weights = weights * i.class_weights.double()[label.clamp(max=logits.shape[1] - 1)]
    if i.pixel_weights is not None:
        weights = weights * i.pixel_weights.double()
    losses = losses * weights
    (FACTOR * losses.sum()).backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


def compare(kernel: ModuleType, case: Case, device: str) -> None:
    i = inputs(case, device)
    losses, slope = reference(i)
    loss = kernel.upsampled_cross_entropy(*i.all())
    (gradient,) = torch.autograd.grad(FACTOR * loss, i.logits)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.dtype == case.dtype and gradient.stride() == torch.empty_like(i.logits).stride()
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=2e-6, atol=1e-5)
    # A rounding of interpolated logits of +-65504 moves two equal ones apart by 0.01, and their gradients with them.
    finest = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[case.dtype]
    error = (gradient.double() - slope).abs().max()
    assert error <= (0.05 if case.extreme else finest) * slope.abs().max(), float(error)
    each = kernel.upsampled_losses(*i.all())
    torch.testing.assert_close(each.double(), losses, rtol=1e-5, atol=0.03 if case.extreme else 1e-5)
    assert (each[i.label == IGNORE] == 0).all()


def compare_with_plain(kernel: ModuleType, device: str) -> None:
    i = inputs(CASES["19 classes"], device)
    got, wanted = kernel.upsampled_cross_entropy(*i.all()), plain_cross_entropy_sum(*i.all())
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(kernel.upsampled_cross_entropy(*i.all()), got)
    slopes = [torch.autograd.grad(x, i.logits)[0] for x in (got, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)


def a_label_that_is_no_class_is_not_counted_silently(kernel: ModuleType, device: str) -> None:
    i = inputs(CASES["ratio 4"], device)
    i.label[1, 3, 3] = CASES["ratio 4"].classes
    assert kernel.upsampled_cross_entropy(*i.all()).isnan()


def check(kernel: ModuleType, name: str, device: str) -> None:
    if name == "plain":
        compare_with_plain(kernel, device)
    elif name == "wrong label":
        a_label_that_is_no_class_is_not_counted_silently(kernel, device)
    else:
        compare(kernel, {**CASES, **LARGE}[name], device)


CHECKS = [*CASES, "plain", "wrong label"]

INTERPRETED = """
import json, traceback
from test_pixel_kernel import CHECKS, check
from roadseg.train.losses import pixel_kernel as loss_kernel
said = {}
for name in CHECKS:
    try:
        check(loss_kernel, name, "cpu")
        said[name] = ""
    except Exception:
        said[name] = traceback.format_exc()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in each check, in one process: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_in_tritons_interpreter_are_the_reference(interpreted: dict[str, str], name: str) -> None:
    assert interpreted[name] == "", interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CHECKS, *LARGE])
def test_the_kernels_on_a_gpu_are_the_reference(name: str) -> None:
    from roadseg.train.losses import pixel_kernel as loss_kernel

    check(loss_kernel, name, "cuda")


@pytest.mark.gpu
def test_a_cuda_graph_holds_it_and_gives_equal_bits() -> None:
    from roadseg.train.losses.pixel_kernel import upsampled_cross_entropy

    i = inputs(LARGE["bf16, stride 8"], "cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = upsampled_cross_entropy(*i.all())
        return loss.detach(), torch.autograd.grad(loss / 1000, i.logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
