"""Runs of `roadseg train` that tests kill: of a small data set, each started within a fraction of a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadseg.files import read_json
from tests.conftest import MICRO
from tests.faults.processes import children, environment

DEADLINE_S = 120
STEPS = 12


@dataclass(frozen=True)
class Driver:
    """The process that forks them."""

    process: subprocess.Popen[str]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, workspace: Path, shards: Path, *flags: str, prelude: str = "") -> Run:
        """`roadseg train` on these shards, a checkpoint a step, in a process group of its own.

        prelude: code that runs before it, to break what the product has no switch to break.
        """
        arguments = ["train", "--config", str(MICRO), "--workspace", str(workspace), "--transform.shards", str(shards)]
        arguments += ["--training.steps", str(STEPS), "--training.pictures", "0", *flags]
        log = workspace.with_suffix(".log")
        return Run(self, self.ask(start=arguments, log=str(log), prelude=prelude)["pid"], workspace, log)


@dataclass(frozen=True)
class Run:
    driver: Driver
    pid: int
    workspace: Path
    log: Path

    def code(self) -> int | None:
        code: int | None = self.driver.ask(poll=self.pid)["code"]
        return code

    def text(self) -> str:
        return self.log.read_text()

    def wait(self, within_s: float = DEADLINE_S) -> int:
        """Its exit code, or minus the signal."""
        until = time.monotonic() + within_s
        while (code := self.code()) is None:
            assert time.monotonic() < until, f"still running after {within_s} s: {self.text()}"
            time.sleep(0.005)
        return code

    def reaches(self, step: int) -> None:
        """Wait until the checkpoint of a step is there."""
        until = time.monotonic() + DEADLINE_S
        while newest_step(self.workspace) < step:
            assert self.code() is None, self.text()
            assert time.monotonic() < until, f"step {step} does not come: {self.text()}"
            time.sleep(0.002)

    def kill(self, group: bool = False) -> None:
        """By SIGKILL: the run alone, whose workers must then end by themselves, or all its processes."""
        os.killpg(self.pid, signal.SIGKILL) if group else os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.text()

    def children(self) -> set[int]:
        return children(self.pid)


@contextmanager
def driver() -> Iterator[Driver]:
    command = [sys.executable, str(Path(__file__).parent / "training_driver.py")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment(MICRO.parent)) as process:
        try:
            yield Driver(process)
        finally:
            assert process.stdin
            process.stdin.close()


def work(workspace: Path) -> Path:
    """Where the train stage works, or worked."""
    return next(workspace.glob("stages/train/*.partial"), None) or next(
        p for p in workspace.glob("stages/train/*") if p.is_dir()
    )


def newest_step(workspace: Path) -> int:
    names = [p.stem for p in workspace.glob("stages/train/*/checkpoints/step-*.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def digests(workspace: Path) -> dict[int, str]:
    """SHA-256 of all that training goes on from, by step."""
    found = [read_json(path) for path in work(workspace).glob("checkpoints/step-*.json")]
    return {about["step"]: about["sha256"] for about in found}


def to_the_end(start: Callable[[], Run]) -> None:
    """Until the last step is saved; what comes after, an export, takes longer than all steps."""
    run = start()
    run.reaches(STEPS)
    run.kill(group=True)
