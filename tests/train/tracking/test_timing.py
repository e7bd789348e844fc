"""What a run says of its own speed."""

from __future__ import annotations

import logging
import mmap
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from roadseg.files import read_json, read_json_lines
from roadseg.progress import progress
from roadseg.train.tracking import timing
from roadseg.train.tracking.timing import Timing, memory_gb


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Bar:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        assert not refresh, "a redraw of its own would be a line of its own on a pipe"
        self.texts.append(text)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, waited_s: float, steps: int = 31, bar: Bar | None = None,
        losses: bool = True) -> Timing:  # fmt: skip
    """Steps of a second, after a first one of a minute; a minute of validation after every tenth. Loss is the step."""
    clock, bar = Clock(), bar or Bar()
    monkeypatch.setattr(timing, "time", clock)
    made = Timing(folder)
    for step in range(1, steps + 1):
        clock.now += 60 if step == 1 else 1
        made.step(step, 59.0 if step == 1 else waited_s, 8, bar, float(step) if losses else None)
        if step % 10 == 0:
            clock.now += 60
            made.begin()
    return made


@pytest.mark.parametrize(
    ("waited_s", "bottleneck", "said"),
    [
        (0.01, "compute", "compute was the bottleneck: 1% of the time was spent waiting for data"),
        (0.6, "data", "data was the bottleneck: 60% of the time was spent waiting for data; a larger"),
    ],
)
def test_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, waited_s: float,
    bottleneck: str, said: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "roadseg"):
        verdict = run(tmp_path / "log", monkeypatch, waited_s).verdict()
    assert verdict.startswith(said) and verdict in caplog.text
    assert read_json(tmp_path / "log" / "bottleneck.json") == {
        "bottleneck": bottleneck, "steps": 30, "images_per_s": 8.0, "waiting_share": waited_s
    }  # fmt: skip
    rows = read_json_lines(tmp_path / "log" / "timing.jsonl")
    assert [row["step"] for row in rows] == [11, 21, 31]
    assert all(row["images_per_s"] == 8.0 and row["waiting_share"] == waited_s for row in rows)


def test_a_row_is_the_mean_of_its_steps_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "memory_gb", lambda device: (3.21, 79.6))
    run(tmp_path / "log", monkeypatch, 0.25, bar=(bar := Bar()))
    rows = read_json_lines(tmp_path / "log" / "timing.jsonl")
    assert [row["loss"] for row in rows] == [6.5, 16.5, 26.5]  # of steps 2-11, 12-21, 22-31
    assert {row["memory_gb"] for row in rows} == {3.21}
    losses = [2.5, 3.5, 4.5, 5.5, 6.5, 12.5]  # every two seconds of what a row has so far
    assert bar.texts[:6] == [f"loss {x}, 8.0 images/s, 25% waiting for data, 3.2 of 80 GB" for x in losses]


@pytest.mark.fault
def test_a_disk_without_room_for_statistics_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "timing.jsonl").mkdir()  # what can't be written to
    (folder / "bottleneck.json").mkdir()
    assert "compute was the bottleneck" in run(folder, monkeypatch, 0.01).verdict()
    said = [m for m in caplog.messages if "training goes on without it" in m]
    assert said == [
        f"log/{name} is not written (Is a directory); training goes on without it"
        for name in ("timing.jsonl", "bottleneck.json")
    ]  # each once, though three rows were due


def test_rows_are_returned_when_due_and_need_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "EVERY_S", 0.0)
    made = Timing(tmp_path)
    assert made.step(1, 0.0, 2, Bar()) is None
    row = made.step(2, 0.0, 2, Bar())
    assert row is not None and row["step"] == 2 and "loss" not in row
    assert [row] == read_json_lines(tmp_path / "timing.jsonl")


def test_memory_of_the_cpu_is_this_process() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    before, total = memory_gb(torch.device("cpu"))
    held = np.frombuffer(mmap.mmap(-1, 64_000_000), np.uint8)  # not from what the allocator has kept
    held[:] = 1
    after, _ = memory_gb(torch.device("cpu"))
    assert 0.05 < after - before < 0.08 and after < total and held.all()


@pytest.mark.gpu
def test_memory_of_cuda_is_the_peak() -> None:
    device = torch.device("cuda")
    torch.ones(500_000_000, dtype=torch.uint8, device=device)
    used, total = memory_gb(device)
    assert 0.5 <= used < total


def test_one_step_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "log", monkeypatch, 0.5, 1).verdict() == ""
    assert not (tmp_path / "log" / "bottleneck.json").exists()


def test_a_pipe_sees_plain_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := StringIO())
    bar = progress(10, "train", "step")
    bar.delay = bar.mininterval = 0
    bar.set_postfix_str("loss 0.5, 8 images/s", refresh=False)
    bar.update()
    bar.close()
    line = stream.getvalue().splitlines()[0]
    assert line.startswith("train 1/10 step, ") and line.endswith(" left, loss 0.5, 8 images/s")
    assert "\r" not in stream.getvalue()
