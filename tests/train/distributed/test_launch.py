"""What several processes end with is made into one error."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roadseg.errors import DataError, Interrupted, NonFiniteLoss, PeerFailed, PeerLost, RoadsegError
from roadseg.train.distributed.launch import _verdict
from roadseg.train.distributed.run_store import read_error, write_error_file


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an error file of an error and reads our part of it."""

    def written(error: BaseException, rank: int) -> Any:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        write_error_file(error, rank)
        return json.loads((tmp_path / "error.json").read_bytes())["message"]["extraInfo"]["roadseg"]

    return written


def test_errors_keep_class_parts_and_exit_code(row: Any) -> None:
    for error in (
        NonFiniteLoss("loss nan", expected="finite numbers", where="samples 1", todo="look"),
        DataError("bad frame", where="x.png"),
        Interrupted("stopped by SIGTERM after step 3", signal_number=15),
        PeerLost("gone", todo="run again"),
    ):
        again = read_error(row(error, 1))
        assert str(again) == str(error) and isinstance(again, RoadsegError) and again.exit_code == error.exit_code
        assert type(again) is type(error)
    try:
        raise KeyError("missing")
    except KeyError as e:
        foreign = read_error(row(e, 1))
    assert type(foreign) is RuntimeError and str(foreign) == "KeyError in rank 1: 'missing'"
    assert "raise KeyError" in foreign.__notes__[0]
    full = read_error(row(OSError(28, "No space left on device", "/x"), 0))
    assert isinstance(full, OSError) and full.errno == 28 and full.filename == "/x"


def test_without_an_error_file_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    write_error_file(ValueError("x"), 0)


def failure(exit_code: int, pid: int = 101) -> Any:
    return SimpleNamespace(exitcode=exit_code, pid=pid, timestamp=0)


def test_the_cause_is_reported_among_its_consequences(row: Any) -> None:
    lost, failed = PeerLost("another rank no longer answers"), PeerFailed("rank 1 failed: bad")
    stop, echo = (Interrupted(f"stopped by {by}", signal_number=15) for by in ("SIGTERM", "another rank's signal"))
    bad = DataError("bad")
    assert _verdict([], {}, 0) is None
    assert str(_verdict([row(lost, 0), row(bad, 1)], {0: failure(1)}, 0)) == "bad"
    assert str(_verdict([row(failed, 0), row(bad, 1)], {0: failure(1)}, 0)) == "bad"
    assert str(_verdict([row(stop, 0), row(bad, 1)], {1: failure(1)}, 15)) == "bad"
    assert str(_verdict([row(echo, 0), row(stop, 1)], {}, 0)) == "stopped by SIGTERM"
    early = _verdict([], {0: failure(-15)}, 15)
    assert isinstance(early, Interrupted) and early.exit_code == 143
    killed = _verdict([row(lost, 0)], {0: failure(1), 1: failure(-9)}, 0)
    assert "rank 1 (process 101) was killed by SIGKILL" in str(killed)
    assert "rank 1 (process 101) ended with exit code 3" in str(_verdict([], {1: failure(3)}, 0))
    assert isinstance(_verdict([row(lost, 0), row(lost, 1)], {0: failure(1)}, 0), PeerLost)
