"""benchmarks/side_by_side.py: what it reports of forms whose times are known."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def side_by_side() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("side_by_side")
    sys.path.remove(str(BENCHMARKS))


def test_medians_of_rounds_that_take_turns(side_by_side: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form's calls take 1, 2, 3, ... s, another's ten times as much: in rounds of two the third's mean is 5.5 s."""
    clock_s, called = [0.0], []

    def form(name: str, unit_s: float) -> None:
        called.append(name)
        clock_s[0] += unit_s * called.count(name)

    monkeypatch.setattr(side_by_side, "ROUNDS", 5)
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock_s[0])
    forms = {"a": lambda: form("a", 1), "b": lambda: form("b", 10)}
    assert side_by_side.medians_s(forms, torch.device("cpu"), 2) == {"a": 5.5, "b": 55}
    assert "".join(called) == "aabb" * 5
