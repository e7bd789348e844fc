"""Exponential moving average of the weights: the network that is validated, reported and shipped."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


class EMA(Generic[N]):
    """Averages all floating-point state of a network, batch norm's running statistics included.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run is not an average
    of its initial weights. decay 0 follows the network exactly.
    """

    def __init__(self, network: N, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._pairs = _floats(self.network, network)
        mine, theirs = ([t for t in n.buffers() if not t.is_floating_point()] for n in (self.network, network))
        self._counters = mine, theirs

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the network's weights after 0-based `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = self._pairs
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)


def _floats(a: nn.Module, b: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    state_a = [*a.parameters(), *(t for t in a.buffers() if t.is_floating_point())]
    state_b = [*b.parameters(), *(t for t in b.buffers() if t.is_floating_point())]
    return state_a, state_b
