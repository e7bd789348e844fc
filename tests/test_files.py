import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roadseg import files
from roadseg.errors import Busy


def test_content_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("1")
        (folder / "y").write_text("2")
    (b / "stage.json").write_text("left out")
    assert files.content_digest(a) == files.content_digest(b, leave_out=("stage.json",))
    assert files.content_digest(a) != files.content_digest(b)
    (b / "sub" / "x").rename(b / "sub" / "z")
    assert files.content_digest(a) != files.content_digest(b, leave_out=("stage.json",))


def test_a_failed_write_keeps_the_old_bytes_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_incomplete_json_lines_are_read_up_to_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert files.read_json_lines(tmp_path / "absent") == []


HOLD = """
import sys, time
from pathlib import Path
from roadseg.files import lock
with lock(Path(sys.argv[1]), "it", wait=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_lock_names_its_owner_and_is_released_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        started = time.monotonic()
        with pytest.raises(Busy, match=f"process {owner.pid}"), files.lock(path, "it", wait=False):
            pass
        assert time.monotonic() - started < 2
        owner.kill()
        owner.wait()
    with files.lock(path, "it", wait=False):
        pass
