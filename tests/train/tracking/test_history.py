"""What is kept of a run's losses and scores, and what a run that goes on makes of it."""

import errno
import os
from pathlib import Path

import pytest

from roadseg.errors import RoadsegError
from roadseg.files import read_json_lines
from roadseg.train.tracking.history import History


def test_a_run_that_goes_on_drops_later_rows_and_knows_the_earlier_scores(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path, 0)
    for step, score in ((2, 0.3), (4, 0.5), (6, 0.4)):
        first.add(step=step, loss=1.0)
        first.add(step=step, split="val", miou=score)
    first.flush()
    again = History(path, 4)
    assert [row["step"] for row in read_json_lines(path)] == [2, 2, 4, 4]
    assert again.validations_without_gain("val") == 0
    for step, waited in ((6, 1), (8, 2)):
        again.add(step=step, split="val", miou=0.5)  # as good is not better
        assert again.validations_without_gain("val") == waited
    again.add(step=10, split="val", miou=0.51)
    assert again.validations_without_gain("val") == 0 and again.validations_without_gain("holdout") == 0


def test_a_rank_that_writes_nothing_still_knows_scores(tmp_path: Path) -> None:
    history = History(None, 0)
    history.add(step=1, split="val", miou=None)  # no class was there
    history.add(step=2, split="val", miou=None)
    history.flush()
    assert history.validations_without_gain("val") == 1 and not list(tmp_path.iterdir())


@pytest.mark.fault
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "history.jsonl", 0)
    history.add(step=1, loss=1.0)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RoadsegError, match=r"history.jsonl: no space left for .* MB; free .*run again"):
        history.flush()


def test_without_a_path_nothing_is_kept() -> None:
    history = History(None, 0)
    for step in range(1000):
        history.add(step=step, loss=1.0)
    assert not history._new
