import logging
import os
import time
from pathlib import Path

import pytest

from roadseg.errors import ConfigError
from roadseg.files import read_json, write_json
from roadseg.pipeline.workspace import Workspace, leftovers, remove


def build(work: Path) -> None:
    (work / "a").write_text("same")


def test_made_once_then_found(tmp_path: Path) -> None:
    w = Workspace(tmp_path)
    first = w.make("s", 1, {"x": 1}, {"in": "0"}, build)
    second = w.make("s", 1, {"x": 1}, {"in": "0"}, lambda work: pytest.fail("made twice"))
    assert (first.cached, second.cached) == (False, True)
    assert first.content == second.content and first.folder == second.folder
    assert (first.folder / "stage.json").exists()


@pytest.mark.parametrize("change", [{"version": 2}, {"fields": {"x": 2}}, {"inputs": {"in": "1"}}])
def test_what_changes_the_result_changes_the_key(tmp_path: Path, change: dict) -> None:
    w = Workspace(tmp_path)
    same = {"version": 1, "fields": {"x": 1}, "inputs": {"in": "0"}}
    a = w.make("s", build=build, **same)
    b = w.make("s", build=build, **{**same, **change})
    assert a.key != b.key and a.content == b.content


def test_a_failed_build_leaves_nothing_that_counts_and_starts_clean(tmp_path: Path) -> None:
    w = Workspace(tmp_path)

    def fails(work: Path) -> None:
        (work / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        w.make("s", 1, {}, {}, fails)
    output = w.make("s", 1, {}, {}, build)
    assert sorted(os.listdir(output.folder)) == ["a", "stage.json"]


def test_a_stage_that_resumes_finds_what_was_left(tmp_path: Path) -> None:
    w = Workspace(tmp_path)

    def twice(work: Path) -> None:
        if not (work / "a").exists():
            (work / "a").write_text("first")
            raise RuntimeError("killed")
        (work / "b").write_text("second")

    with pytest.raises(RuntimeError):
        w.make("s", 1, {}, {}, twice, resumes=True)
    output = w.make("s", 1, {}, {}, twice, resumes=True)
    assert (output.folder / "a").read_text() == "first"


def test_its_seconds_are_those_of_all_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    w, clock = Workspace(tmp_path), [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def part(work: Path) -> None:
        number = len(list(work.glob("part-*")))
        (work / f"part-{number}").write_text("x")
        clock[0] += 30
        os.utime(work / f"part-{number}", (clock[0], clock[0]))
        clock[0] += 3600  # a kill has no last words: what came after its last file is not known
        if number < 2:
            raise RuntimeError("killed")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            w.make("s", 1, {}, {}, part, resumes=True)
    with caplog.at_level(logging.INFO, "roadseg"):
        output = w.make("s", 1, {}, {}, part, resumes=True)
    about = read_json(output.folder / "stage.json")
    assert (about["seconds"], about["sessions"]) == (30 + 30 + 3630, 3)
    assert "in 3690.0 s over 3 sessions" in caplog.text
    assert sorted(os.listdir(output.folder)) == ["part-0", "part-1", "part-2", "stage.json"]


def test_what_was_refused_is_no_session(tmp_path: Path) -> None:
    w = Workspace(tmp_path)

    def refused(work: Path) -> None:
        raise ConfigError("never")

    def killed(work: Path) -> None:
        (work / "a").write_text("x")
        raise RuntimeError("killed")

    for attempt, error in ((refused, ConfigError), (killed, RuntimeError), (refused, ConfigError)):
        with pytest.raises(error):
            w.make("s", 1, {}, {}, attempt, resumes=True)
    assert read_json(w.make("s", 1, {}, {}, build, resumes=True).folder / "stage.json")["sessions"] == 2


def test_a_spoilt_record_of_sessions_is_started_anew(tmp_path: Path) -> None:
    w = Workspace(tmp_path)

    def spoils(work: Path) -> None:
        (work / "log" / "sessions.json").write_text("{")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        w.make("s", 1, {}, {}, spoils, resumes=True)
    assert read_json(w.make("s", 1, {}, {}, build, resumes=True).folder / "stage.json")["sessions"] == 1


def test_clean_keeps_what_a_run_names(tmp_path: Path) -> None:
    w = Workspace(tmp_path)
    kept = w.make("s", 1, {"x": 1}, {}, build)
    loose = w.make("s", 1, {"x": 2}, {}, build)
    (tmp_path / "stages" / "s" / "dead.partial").mkdir()
    (tmp_path / "runs" / "r").mkdir(parents=True)
    write_json(tmp_path / "runs" / "r" / "run.json", {"outputs": {"s": {"stage": "s", "key": kept.key}}})
    found = leftovers(tmp_path)
    assert {f.path.name for f in found} == {loose.key, "dead.partial"}
    for leftover in found:
        remove(leftover)
    assert kept.folder.exists() and leftovers(tmp_path) == []
