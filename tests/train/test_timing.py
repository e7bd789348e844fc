"""What a run says of its own speed."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from roadseg.files import read_json, read_json_lines
from roadseg.train import timing
from roadseg.train.timing import Timing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, waited_s: float, steps: int = 31) -> Timing:
    """Steps of a second, after a first one of a minute; a minute of validation after every tenth."""
    clock, bar = Clock(), SimpleNamespace(set_postfix_str=lambda *_, **__: None)
    monkeypatch.setattr(timing, "time", clock)
    made = Timing(folder)
    for step in range(1, steps + 1):
        began = clock.now
        clock.now += 60 if step == 1 else 1
        made.step(step, began, 59.0 if step == 1 else waited_s, 8, bar)
        clock.now += 60 if step % 10 == 0 else 0
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


def test_one_step_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "log", monkeypatch, 0.5, 1).verdict() == ""
    assert not (tmp_path / "log" / "bottleneck.json").exists()
