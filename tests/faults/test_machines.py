"""Several machines, each a torchrun of its own; here all are this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from roadseg.cli import main as cli
from roadseg.files import read_json_lines
from tests.conftest import MICRO, Micro
from tests.faults.processes import DEADLINE_S, running

pytestmark = [pytest.mark.fault, pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2")]
MACHINES = ("first", "second")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def cluster(micro: Micro, folder: Path, *flags: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`roadseg train` on two machines with two ranks each; each has a workspace with the data already in it."""
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    with ExitStack() as stack:
        started = []
        for number, (name, own) in enumerate(zip(MACHINES, flags, strict=True)):
            for stage in ("ingest", "transform"):
                if not (there := folder / name / "stages" / stage).exists():
                    shutil.copytree(micro.workspace / "stages" / stage, there)
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
            command += ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
            command += ["-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(folder / name)]
            command += ["--training.batch-size", "4", *own]
            started.append(stack.enter_context(running(command, folder / f"{name}.log")))
        yield started


def losses(workspace: Path) -> list[float]:
    (history,) = workspace.glob("stages/train/*/history.jsonl")
    return [row["loss"] for row in read_json_lines(history) if "loss" in row]


def test_two_machines_of_two_ranks_compute_what_one_process_does(micro: Micro, tmp_path: Path) -> None:
    with cluster(micro, tmp_path / "c", [], []) as machines:
        codes = [machine.wait(DEADLINE_S) for machine in machines]
    assert codes == [0, 0], [(tmp_path / "c" / f"{name}.log").read_text() for name in MACHINES]
    assert not list((tmp_path / "c" / "second").glob("stages/train/*/model.tar.gz"))  # rank 0's machine has it
    alone = tmp_path / "alone"
    for stage in ("ingest", "transform"):
        shutil.copytree(micro.workspace / "stages" / stage, alone / "stages" / stage)
    command = [sys.executable, "-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(alone)]
    with running([*command, "--training.batch-size", "4"], tmp_path / "alone.log") as process:
        assert process.wait(DEADLINE_S) == 0
    assert losses(tmp_path / "c" / "first") == pytest.approx(losses(alone), rel=1e-5)


def test_machines_that_would_train_something_else_are_refused(micro: Micro, tmp_path: Path) -> None:
    with cluster(micro, tmp_path / "c", [], ["--training.learning-rate", "1"]) as machines:
        assert machines[1].wait(DEADLINE_S) != 0
        machines[0].terminate()
        machines[0].wait(DEADLINE_S)
    log = (tmp_path / "c" / "second.log").read_text()
    assert "roadseg train: the config and the data: process 2 of 4 would make the training " in log


def test_a_host_of_a_sagemaker_cluster_starts_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    resources = "roadseg.train.distributed.environment.sagemaker_hosts"
    monkeypatch.setattr(resources, lambda: (1, ["algo-1", "algo-2"]))
    monkeypatch.setattr("torch.distributed.run.main", started.append)  # the next test starts it
    command = ["train", "--config", str(MICRO), "--workspace", str(tmp_path)]
    assert cli(command) == 0
    (arguments,) = started
    assert arguments[arguments.index("--node-rank") + 1] == "1"
    assert arguments[arguments.index("--master-addr") + 1] == "algo-1"
    assert arguments[-len(command) - 2 :] == ["-m", "roadseg.cli", *command]


RUN_TORCHRUN = "import sys; from roadseg.train.distributed import launch; sys.exit(launch.run_torchrun(sys.argv[1:]))"


def test_torchrun_ends_with_the_exit_code_of_a_failed_rank_which_prints_its_own_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN_TORCHRUN, "--master-port", str(free_port()), "-m", "roadseg.cli", "train"]
    with running([*command, "--training.epochs", "none"], tmp_path / "log") as process:
        assert process.wait(DEADLINE_S) == 2
    log = (tmp_path / "log").read_text()
    assert log.count("training.epochs") == 1 and "Traceback" not in log and "bug in roadseg" not in log


def test_torchrun_ends_with_143_after_sigterm(tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    (tmp_path / "rank.py").write_text(program)
    command = [sys.executable, "-c", RUN_TORCHRUN, "--master-port", str(free_port()), str(tmp_path / "rank.py")]
    with running(command, tmp_path / "log") as process:
        until = time.monotonic() + DEADLINE_S
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(DEADLINE_S) == 143
    assert "Traceback" not in (tmp_path / "log").read_text()
