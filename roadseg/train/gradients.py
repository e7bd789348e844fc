"""Forward and backward of one step: micro-batches, compilation, CUDA graph.

An eager step is bound by the CPU, which launches many small kernels (docs/experiments.md); a CUDA graph launches
them at once. Clipping, the optimizer and the average stay outside: they are few kernels, launched while the device
is busy with the graph.

Shapes: B samples of this process, H W the crop.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from roadseg.data.batches.loader import Batch
from roadseg.errors import PeerLost
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.losses.objective import Objective

log = logging.getLogger(__name__)
EAGER_STEPS = 11  # eager steps before capture: libraries choose algorithms, allocators settle
NOT_COMPILED = (RuntimeError, ImportError, OSError)  # no compiler, a full disk, or a layer that can't be compiled


class Gradients:
    """A call leaves the whole batch's gradients in the parameters and returns the detached loss.

    The batch is `accumulate` micro-batches of every rank. With `graph`, every batch must have the
    shape of the first; if compilation or capture fails, a warning is logged and steps stay eager. Either all ranks
    compile or none, because a compiled network uses other collectives.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        device: torch.device,
        bf16: bool,
        graph: bool,
        *,
        compiled: bool = False,
        accumulate: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self._network, self._objective, self._device, self._bf16 = network, objective, device, bf16
        compiled = compiled and (ranks.world == 1 or _all_compile(ranks, device))
        self._forward: Any = torch.compile(network, dynamic=False) if compiled else network
        self._trusted = not compiled
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._accumulate, self._ranks, self._parts = accumulate, ranks, accumulate * ranks.world
        self._captures = graph and device.type == "cuda"
        self._until_capture = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def compiles(self) -> bool:
        """Whether the next call compiles the network, which may take minutes."""
        return not self._trusted

    def close(self) -> None:
        """Free the graph: leaving the process group blocks forever while a graph with NCCL collectives exists."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
        self._captures = False

    def __call__(self, batch: Batch) -> Tensor:
        if self._parts == 1:
            return self._part(batch.image_BHWC, batch.label_BHW, None)
        size = len(batch.image_BHWC) // self._accumulate
        images, labels = batch.image_BHWC.split(size), batch.label_BHW.split(size)
        counted = [self._objective.counts(label.to(self._device, non_blocking=True)) for label in labels]
        counts = self._ranks.sum_(torch.stack(counted).sum(0))
        loss = torch.zeros((), device=self._device)
        sums: list[Tensor] = []
        for image, label in zip(images, labels, strict=True):
            loss += self._part(image, label, counts)
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            if not sums:
                sums = [g.clone() for g in gradients] if self._accumulate > 1 else gradients
            else:
                torch._foreach_add_(sums, gradients)
        for p, total in zip((p for p in self._parameters if p.grad is not None), sums, strict=True):
            p.grad = total
        return self._ranks.sum_gradients(self._parameters, loss)

    def _part(self, image_BHWC: Tensor, label_BHW: Tensor, counts: Tensor | None) -> Tensor:
        if self._graph is not None:
            self._image.copy_(image_BHWC, non_blocking=True)
            self._label.copy_(label_BHW, non_blocking=True)
            if counts is not None and self._counts is not None:
                self._counts.copy_(counts)
            self._graph.replay()
            for p, gradient in zip(self._parameters, self._gradients, strict=True):
                p.grad = gradient
            return self._loss
        image = image_BHWC.to(self._device, non_blocking=True)
        label = label_BHW.to(self._device, non_blocking=True)
        if self._captures and self._until_capture == 0 and self._capture(image, label, counts):
            return self._part(image, label, counts)
        self._until_capture -= 1
        return self._compute(image, label, counts)

    def _compute(self, image_BHWC: Tensor, label_BHW: Tensor, counts: Tensor | None) -> Tensor:
        """Run forward and backward; the first time this compiles both, and falls back to eager if that fails."""
        if self._trusted:
            return self._forward_and_backward(image_BHWC, label_BHW, counts)
        # If the backward fails, the compiled forward has already updated running statistics and drawn numbers.
        buffers, draws = [(b, b.clone()) for b in self._network.buffers()], _generator(self._device)
        state = draws.get_state()
        try:
            loss = self._forward_and_backward(image_BHWC, label_BHW, counts)
        except NOT_COMPILED as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            log.warning("the network is not compiled (%s)", _first_line(e))
            self._forward = self._network
            draws.set_state(state)
            for buffer, before in buffers:
                buffer.copy_(before)
            loss = self._forward_and_backward(image_BHWC, label_BHW, counts)
        self._trusted = True
        return loss

    def _forward_and_backward(self, image_BHWC: Tensor, label_BHW: Tensor, counts: Tensor | None) -> Tensor:
        for p in self._parameters:
            p.grad = None
        image_BCHW = image_BHWC.permute(0, 3, 1, 2)
        # The cache of cast weights must not outlive a capture; without one it saves the casts of shared weights.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=not self._captures):
            output = self._forward(image_BCHW)
        if counts is None:
            counts = self._objective.counts(label_BHW)
        loss = self._objective(image_BCHW, output, label_BHW, counts, self._parts)
        loss.backward()
        return loss.detach()

    def _capture(self, image: Tensor, label: Tensor, counts: Tensor | None) -> bool:
        self._image, self._label = image.clone(), label.clone()
        self._counts = None if counts is None else counts.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        draws = _generator(self._device)
        before = draws.clone_state()
        try:
            # The loader's thread pins memory meanwhile, which must not break the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._compute(self._image, self._label, self._counts)
        except (RuntimeError, PeerLost) as e:  # a collective that can't be captured raises PeerLost
            log.warning("steps stay eager: the CUDA graph could not be captured (%s)", str(e).splitlines()[0])
            torch.cuda.synchronize()
            draws.graphsafe_set_state(before)  # a capture that fails leaves it waiting for the capture's end
            self._captures = False
            return False
        self._gradients = [p.grad for p in self._parameters]
        self._graph = graph
        return True


def _generator(device: torch.device) -> torch.Generator:
    """The generator that dropout uses."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _all_compile(ranks: Ranks, device: torch.device) -> bool:
    """Whether every rank can compile: one may lack a compiler or disk space."""
    failure = None
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(_trial, dynamic=False)(x).backward()
    except NOT_COMPILED as e:
        failure = _first_line(e)
    failures = [(rank, words) for rank, words in enumerate(ranks.gathered(failure)) if words is not None]
    if failures and ranks.main:
        log.warning("the network is not compiled (rank %d: %s)", *failures[0])
    return not failures


def _trial(x: Tensor) -> Tensor:
    return (x * x + 1).sum()


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split()):.200}"
