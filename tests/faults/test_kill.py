"""Killed anywhere and run again, the whole way ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from roadseg.files import content_digest, read_json
from roadseg.pipeline.workspace import LEAVE_OUT, Workspace
from tests.conftest import MICRO, Micro
from tests.faults.processes import DEADLINE_S, running, when


def start(workspace: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "roadseg.cli", "run", "--config", str(MICRO), "--workspace", str(workspace)]
    return running(command, workspace.with_suffix(".log"))


def finish(workspace: Path) -> str:
    with start(workspace) as process:
        code = process.wait(DEADLINE_S)
    log = workspace.with_suffix(".log").read_text()
    assert code == 0, log
    return log


def contents(workspace: Path) -> dict[str, str]:
    """By stage, read again from the files and not believed."""
    found = {}
    for record in workspace.glob("stages/*/*/stage.json"):
        found[record.parent.parent.name] = content_digest(record.parent, LEAVE_OUT)
        assert read_json(record)["content"] == found[record.parent.parent.name]
    return found


def assert_like(micro: Micro, workspace: Path) -> None:
    assert contents(workspace) == micro.contents
    assert not list(workspace.glob("stages/*/*.partial")) and not list(workspace.rglob("*.tmp"))
    store = workspace / "store"
    digest = read_json(store / "champion.json")["digest"]
    assert [p.name for p in (store / "releases").iterdir()] == [digest]
    names = {p.name for p in (store / "releases" / digest).iterdir()}
    assert names == {"model.tar.gz", "evaluation.json", "card.md", "decision.json"}
    assert [p.name for p in (store / "history").iterdir()] == ["000001.json"]


def test_killed_in_every_stage_and_run_again_the_same_comes_out(micro: Micro, tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    stages, history = workspace / "stages", lambda: next(stages.glob("train/*.partial/history.jsonl"), None)

    def exporting() -> bool:
        path = history()
        return path is not None and '"step": 6, "split"' in path.read_text()

    moments: list[tuple[str, Callable[[], bool], float]] = [
        ("ingest", lambda: any(stages.glob("ingest/*.partial/tree/leftImg8bit/*/*/*.png")), 0),
        ("transform", lambda: any(stages.glob("transform/*.partial")), 0.1),
        ("train", lambda: any(stages.glob("train/*.partial/checkpoints/step-00000002.json")), 0),
        ("export", exporting, 1.0),
    ]
    for number, (stage, there, delay_s) in enumerate(moments):
        with start(workspace) as process:
            assert when(process, there), workspace.with_suffix(".log").read_text()
            time.sleep(delay_s)
            if number % 2:  # the whole group, or the run alone, whose workers must then end by themselves
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            assert process.wait(30) == -signal.SIGKILL, "it was through already"
        assert (stages / ("train" if stage == "export" else stage)).exists()
        assert not (workspace / "store").exists()
    log = finish(workspace)
    assert "going on after step 6 of 6" in log
    assert_like(micro, workspace)


@pytest.mark.fault
@pytest.mark.parametrize("resumes", [True, False])
def test_what_a_kill_left_half_written_is_no_part_of_the_result(tmp_path: Path, resumes: bool) -> None:
    """A write that was cut off leaves a hidden file, which must not become a member of the output."""

    def build(work: Path) -> None:
        (work / "a").write_text("whole")

    workspace = Workspace(tmp_path)
    whole = workspace.make("s", 1, {}, {}, build, resumes=resumes)
    partial = whole.folder.with_suffix(".partial")
    whole.folder.rename(partial)
    (partial / "stage.json").unlink()
    (partial / ".a.12.34.tmp").write_bytes(b"wh")
    (partial / "checkpoints").mkdir()
    (partial / "checkpoints" / ".step-1.json.12.34.tmp").write_bytes(b"{")
    assert workspace.make("s", 1, {}, {}, build, resumes=resumes).content == whole.content


@pytest.mark.fault
def test_a_removal_that_was_killed_halfway_stands_in_nobody_s_way(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    whole = workspace.make("s", 1, {}, {}, lambda work: (work / "a").touch())
    (whole.folder / "stage.json").unlink()  # what the removal took first
    assert workspace.make("s", 1, {}, {}, lambda work: (work / "a").touch()).content == whole.content


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(5))
def test_fifty_kills_at_random_instants(micro: Micro, tmp_path: Path, seed: int) -> None:
    """Ten a seed, spread over the time that the first, uninterrupted run took."""
    started = time.monotonic()
    finish(tmp_path / "whole")
    whole_s = time.monotonic() - started
    rng, workspace, kills, round_ = random.Random(seed), tmp_path / "w0", 0, 0
    while kills < 10:
        with start(workspace) as process:
            try:
                process.wait(rng.uniform(0, whole_s))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
                process.wait(30)
                kills += 1
                continue
        assert process.returncode == 0, workspace.with_suffix(".log").read_text()
        assert_like(micro, workspace)
        round_ += 1
        workspace = tmp_path / f"w{round_}"
    finish(workspace)
    assert_like(micro, workspace)
