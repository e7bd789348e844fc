"""How fast steps were, and whether data or compute held them up; kept in log/, apart from what is trained."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from roadseg.files import write_json

log = logging.getLogger(__name__)
EVERY_S = 10.0
DATA_BOUND = 0.1  # share of the time spent waiting from which data is what to work on


class Timing:
    """log/timing.jsonl: images/s and the share of time spent waiting for data, every ten seconds.

    Validations and checkpoints don't count, nor does a run's first step, which waits for worker
    processes to start and libraries to choose their algorithms.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._row, self._all = _Sum(), _Sum()
        self._first = True

    def step(self, step: int, began_s: float, waited_s: float, images: int, bar: Any) -> None:
        """After a step: began_s, on the clock of time.monotonic, and how long it then waited for its batch."""
        if self._first:
            self._first = False
            return
        took = time.monotonic() - began_s
        for total in (self._row, self._all):
            total.add(took, waited_s, images)
        if self._row.took_s < EVERY_S:
            return
        row = {"step": step, **self._row.rates()}
        self._row = _Sum()
        bar.set_postfix_str(
            f"{row['images_per_s']} images/s, {row['waiting_share']:.0%} waiting for data", refresh=False
        )
        with open(self._folder / "timing.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def verdict(self) -> str:
        """What held up this run's steps; logged, and in log/bottleneck.json. "" for a run of one step or none."""
        if not self._all.steps:
            return ""
        rates = self._all.rates()
        share, data = rates["waiting_share"], rates["waiting_share"] >= DATA_BOUND
        write_json(
            self._folder / "bottleneck.json",
            {"bottleneck": "data" if data else "compute", "steps": self._all.steps, **rates},
        )
        text = f"{'data' if data else 'compute'} was the bottleneck: {share:.0%} of the time was spent waiting for data"
        if data:
            text += "; a larger training.batch_size, more training.workers or training.frames_on_gpu may help"
        log.info("%.1f images/s; %s", rates["images_per_s"], text)
        return text


class _Sum:
    def __init__(self) -> None:
        self.steps, self.took_s, self._waited_s, self._images = 0, 0.0, 0.0, 0

    def add(self, took_s: float, waited_s: float, images: int) -> None:
        self.steps += 1
        self.took_s += took_s
        self._waited_s += waited_s
        self._images += images

    def rates(self) -> dict[str, float]:
        took = max(self.took_s, 1e-9)
        return {"images_per_s": round(self._images / took, 1), "waiting_share": round(self._waited_s / took, 3)}
