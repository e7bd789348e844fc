"""Several forms of one thing timed in one run: their rounds take turns, so that a machine that slows slows them all."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from machine import cpu_name

ROUNDS = 5


def print_machine(device: torch.device, about: str) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}, Python {platform.python_version()}, {about}")


def medians_s(forms: Mapping[str, Callable[[], object]], device: torch.device, calls: int) -> dict[str, float]:
    """Seconds of one call of each form: the median of ROUNDS rounds of so many calls. Who calls has warmed them up."""

    def now_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    took: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            start = now_s()
            for _ in range(calls):
                form()
            took[name].append((now_s() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in took.items()}
