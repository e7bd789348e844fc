"""Measure images/s and the share of time spent waiting for data; kept in log/."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from roadseg.files import write_json

log = logging.getLogger(__name__)
EVERY_S = 10.0
SHOWN_EVERY_S = 2.0  # so that short runs show a loss too
DATA_BOUND = 0.1  # share of waiting time from which data counts as the bottleneck


class Timing:
    """log/timing.jsonl: loss, images/s, the share of time spent waiting for data and memory, every ten seconds.

    Validations and checkpoints don't count, nor does a run's first step, which waits for worker
    processes to start and libraries to choose their algorithms. `device`: whose memory is reported.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._device = folder, device or torch.device("cpu")
        self._row, self._all = _Sum(), _Sum()
        self._first, self._shown_s = True, 0.0
        self.begin()

    def begin(self) -> None:
        """Start measuring: before the first step, and after anything that is not a step."""
        self._since_s = time.monotonic()

    def step(
        self, step: int, waited_s: float, images: int, bar: Any, loss: float | None = None
    ) -> dict[str, float] | None:
        """Record a step. waited_s: how long the device waited for its batch since the last step.

        Returns the row {step, loss (mean of its steps), images_per_s, waiting_share, memory_gb} when one was due.
        `bar` shows the current values every two seconds.
        """
        now_s = time.monotonic()
        took, self._since_s = now_s - self._since_s, now_s
        if self._first:
            self._first = False
            return None
        for total in (self._row, self._all):
            total.add(took, waited_s, images, loss)
        due = self._row.took_s >= EVERY_S
        if not due and self._row.took_s < self._shown_s + SHOWN_EVERY_S:
            return None
        used, total_gb = memory_gb(self._device)
        row = {"step": step, **self._row.mean_loss(), **self._row.rates(), "memory_gb": round(used, 3)}
        bar.set_postfix_str(_status(row, total_gb), refresh=False)
        self._shown_s = self._row.took_s
        if not due:
            return None
        self._row, self._shown_s = _Sum(), 0.0
        with warn_if_disk_full("log/timing.jsonl"), open(self._folder / "timing.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        return row

    def verdict(self) -> str:
        """Whether data or compute was the bottleneck; logged and written to log/bottleneck.json; "" without steps."""
        if not self._all.steps:
            return ""
        rates = self._all.rates()
        share, data = rates["waiting_share"], rates["waiting_share"] >= DATA_BOUND
        verdict = {"bottleneck": "data" if data else "compute", "steps": self._all.steps, **rates}
        with warn_if_disk_full("log/bottleneck.json"):
            write_json(self._folder / "bottleneck.json", verdict)
        text = f"{'data' if data else 'compute'} was the bottleneck: {share:.0%} of the time was spent waiting for data"
        if data:
            text += "; a larger training.batch_size, more training.workers or training.frames_on_gpu may help"
        log.info("%.1f images/s; %s", rates["images_per_s"], text)
        return text


@contextmanager
def warn_if_disk_full(what: str) -> Iterator[None]:
    """Around writing optional files: a full disk is reported once and does not end the training."""
    try:
        yield
    except OSError as e:
        _warn_once(f"{what} is not written ({e.strerror or e}); training goes on without it")


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def memory_gb(device: torch.device) -> tuple[float, float]:
    """(used, total) in 1e9 bytes: on CUDA the peak that PyTorch had allocated, elsewhere what this process holds now.

    Total is the device's, on the CPU the machine's; 0 if it is unknown.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        return resident / 1e9, os.sysconf("SC_PHYS_PAGES") * page / 1e9
    except (OSError, ValueError):  # no /proc on macOS
        return 0.0, 0.0


def _status(row: dict[str, float], total_gb: float) -> str:
    parts = [f"loss {row['loss']:.4g}"] if "loss" in row else []
    parts += [f"{row['images_per_s']} images/s", f"{row['waiting_share']:.0%} waiting for data"]
    if row["memory_gb"]:
        parts.append(f"{row['memory_gb']:.1f} of {total_gb:.0f} GB")
    return ", ".join(parts)


class _Sum:
    def __init__(self) -> None:
        self.steps, self.took_s, self._waited_s, self._images = 0, 0.0, 0.0, 0
        self._loss, self._losses = 0.0, 0

    def add(self, took_s: float, waited_s: float, images: int, loss: float | None) -> None:
        self.steps += 1
        self.took_s += took_s
        self._waited_s += waited_s
        self._images += images
        if loss is not None:
            self._loss += loss
            self._losses += 1

    def mean_loss(self) -> dict[str, float]:
        return {"loss": round(self._loss / self._losses, 6)} if self._losses else {}

    def rates(self) -> dict[str, float]:
        took = max(self.took_s, 1e-9)
        return {"images_per_s": round(self._images / took, 1), "waiting_share": round(self._waited_s / took, 3)}
