"""One training step that the device has been given, and its values once they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from roadseg.data.batches.sampler import Sample
from roadseg.errors import NonFiniteLoss
from roadseg.train.distributed.process_group import Ranks


@dataclass(kw_only=True)
class Step:
    """A step that the device has been given; its loss is known once the device has computed it.

    values: loss, gradient norm, and how many ranks had a signal, on the host once the device has `arrived`. waited_s:
    how long this process waited for the batch. before: when the device had finished the step before. begun: when it
    could begin this one. settled: whether the loss has been logged.
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
    settled: bool = False

    def finite(self) -> bool:
        """Whether loss and gradient norm, the same on all ranks, are finite. Waits for the step."""
        if self.arrived:
            self.arrived.synchronize()
        self.loss, self.norm, flag = self.values.tolist()
        self.signalled = bool(flag)
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def device_waited_s(self) -> float:
        """Seconds for which the device waited for the batch: not those in which it computed the step before."""
        if self.before is None or self.begun is None:
            return self.waited_s
        return min(self.waited_s, max(0.0, self.before.elapsed_time(self.begun) / 1000))


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event for when the device has done everything it was given so far; None where that is at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def send_to_host(loss: torch.Tensor, norm: torch.Tensor, signalled: int, ranks: Ranks) -> torch.Tensor:
    """float32 [3] on the CPU: loss, gradient norm and the number of ranks with a signal; on CUDA copied later."""
    values = torch.stack([loss, norm, torch.full_like(loss, bool(signalled))])
    if ranks.world > 1:
        values[2] = ranks.sum_(values[2:].clone())[0]
    return values.to("cpu", non_blocking=values.is_cuda)  # on other devices no event would show when they have arrived


def non_finite(
    loss: float, norm: float, step: int, samples: Sequence[Sample], name_of: Callable[[int], str]
) -> NonFiniteLoss:
    rows = ", ".join(f"{name_of(sample.index)} (epoch {sample.epoch})" for sample in samples)
    return NonFiniteLoss(
        f"loss {loss}, gradient norm {norm} at step {step + 1}, nothing of which was saved",
        expected="finite numbers",
        where=f"train, {rows}",
        todo="check these samples; a lower training.learning_rate, a longer training.warmup_steps or "
        "training.precision fp32 often helps",
    )
