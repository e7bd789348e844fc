"""A step that the device was told to take, and what is learned of it once it is through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roadseg.data.batches.sampler import Sample
from roadseg.errors import NonFiniteLoss
from roadseg.train.distributed.process_group import Ranks


@dataclass
class Taken:
    """A step that the device was told to take; its loss is known once it is through.

    values: loss, gradient norm, and how many ranks had been sent a signal, on the host once the device
    `arrived`. waited_s: how long this process waited for the batch. begun: when the device could begin.
    """

    step: int
    learning_rate: float
    samples: Sequence[Sample]
    values: torch.Tensor
    waited_s: float
    before: torch.cuda.Event | None
    begun: torch.cuda.Event | None
    arrived: torch.cuda.Event | None
    loss: float = math.nan
    norm: float = math.nan
    signalled: bool = False
    noted: bool = False

    def finite(self) -> bool:
        """Are loss and gradient norm, the same on all ranks, finite numbers? Waits for the step."""
        if self.arrived:
            self.arrived.synchronize()
        self.loss, self.norm, flag = self.values.tolist()
        self.signalled = bool(flag)
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def waited(self) -> float:
        """Seconds that the batch kept the device waiting: not those in which it was at the step before."""
        if self.before is None or self.begun is None:
            return self.waited_s
        return min(self.waited_s, max(0.0, self.before.elapsed_time(self.begun) / 1000))


def mark(device: torch.device) -> torch.cuda.Event | None:
    """When the device will have done what it was told so far; None where that is at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def on_its_way(loss: torch.Tensor, norm: torch.Tensor, signalled: int, ranks: Ranks) -> torch.Tensor:
    values = torch.stack([loss, norm, torch.full_like(loss, bool(signalled))])
    if ranks.world > 1:
        values[2] = ranks.sum_(values[2:].clone())[0]
    return values.to("cpu", non_blocking=values.is_cuda)  # elsewhere no event would tell that they have come


def non_finite(
    loss: float, norm: float, step: int, samples: Sequence[Sample], name_of: Callable[[int], str]
) -> NonFiniteLoss:
    rows = ", ".join(f"{name_of(sample.index)} (epoch {sample.epoch})" for sample in samples)
    return NonFiniteLoss(
        f"loss {loss}, gradient norm {norm} at step {step + 1}, nothing of which was saved",
        expected="finite numbers",
        where=f"train, {rows}",
        todo="look at these samples; a lower training.learning_rate, a longer training.warmup_steps or "
        "training.precision fp32 often helps",
    )
