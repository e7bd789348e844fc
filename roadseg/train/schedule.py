"""Learning rate as a function of the step."""

from __future__ import annotations

import math


def lr_factor(step: int, steps: int, scheduler: str, warmup_steps: int, poly_power: float) -> float:
    """Factor of the peak learning rate at 0-based `step` of `steps`.

    Linear warm-up over min(warmup_steps, steps // 2) steps, then poly (1 - t) ** power, cosine or
    constant, t in 0..1 over the whole run.
    """
    warmup = min(warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    t = step / steps
    if scheduler == "poly":
        return (1 - t) ** poly_power
    if scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    assert scheduler == "constant"
    return 1.0
