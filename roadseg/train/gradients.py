"""Forward and backward of one batch; on CUDA replayed as one graph.

Run eagerly, a step is bound by the CPU that launches its many small kernels (docs/experiments.md); a
graph launches them at once. Clipping, the optimizer and the average stay outside: they are few
kernels, and the loop must look at the loss before it lets the optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from roadseg.data.loader import Batch

log = logging.getLogger(__name__)
EAGER_STEPS = 11  # before capture: libraries choose algorithms, allocators settle


class Gradients:
    """Calling it leaves the batch's gradients in the parameters and returns the loss, detached.

    loss_of(output, label_BHW): a scalar. With `graph`, every batch must have the shape of the first;
    where capture fails, a warning is logged and steps stay eager.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[Any, Tensor], Tensor],
        device: torch.device,
        bf16: bool,
        graph: bool,
    ) -> None:
        self._network, self._loss_of, self._device, self._bf16 = network, loss_of, device, bf16
        self._until_capture = EAGER_STEPS if graph and device.type == "cuda" else -1
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self._graph is not None:
            self._image.copy_(batch.image_BHWC, non_blocking=True)
            self._label.copy_(batch.label_BHW, non_blocking=True)
            self._graph.replay()
            return self._loss
        image = batch.image_BHWC.to(self._device, non_blocking=True)
        label = batch.label_BHW.to(self._device, non_blocking=True)
        if self._until_capture == 0 and self._capture(image, label):
            return self(batch)
        self._until_capture -= 1
        return self._compute(image, label)

    def _compute(self, image_BHWC: Tensor, label_BHW: Tensor) -> Tensor:
        for p in self._network.parameters():
            p.grad = None
        # The cache of cast weights must not outlive a capture; without one it saves the casts of shared weights.
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=self._until_capture < 0
        ):
            output = self._network(image_BHWC.permute(0, 3, 1, 2))
        loss = self._loss_of(output, label_BHW)
        loss.backward()
        return loss.detach()

    def _capture(self, image: Tensor, label: Tensor) -> bool:
        self._image, self._label = image.clone(), label.clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # The loader pins memory in a thread of its own meanwhile; it must not spoil the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._compute(self._image, self._label)
        except RuntimeError as e:
            log.warning("steps stay eager: the CUDA graph could not be captured (%s)", str(e).splitlines()[0])
            torch.cuda.synchronize()
            return False
        self._graph = graph
        return True
