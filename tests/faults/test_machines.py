"""Several machines of a SageMaker cluster, each with several ranks; here all are this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import MICRO, Micro
from processes import DEADLINE_S, gone, running, when
from test_dead_ranks import ranks_of

from roadseg.files import read_json_lines

pytestmark = [pytest.mark.fault, pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 and /proc")]
HOSTS = ["127.0.0.1", "127.0.0.2"]
MACHINE = """
import os, sys
from dataclasses import replace
from pathlib import Path
from roadseg.cli import main
from roadseg.train import place

if __name__ == "__main__":
    resources, port = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    of_host = place._of_host
    place._of_host = lambda _: replace(of_host(resources), port=port)
    place.place.__defaults__ = (os.environ, resources)
    sys.exit(main())
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def cluster(micro: Micro, folder: Path, *flags: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`roadseg train` on each machine, in a workspace of its own in which nothing is left to do but train."""
    folder.mkdir(exist_ok=True)
    script, port = folder / "machine.py", str(free_port())
    script.write_text(MACHINE)
    with ExitStack() as stack:
        started = []
        for host, own in zip(HOSTS, flags, strict=True):
            resources, workspace = folder / f"{host}.json", folder / host
            resources.write_text(json.dumps({"current_host": host, "hosts": HOSTS}))
            for stage in ("ingest", "transform"):
                if not (workspace / "stages" / stage).exists():
                    shutil.copytree(micro.workspace / "stages" / stage, workspace / "stages" / stage)
            command = [sys.executable, str(script), str(resources), port, "train", "--config", str(MICRO)]
            command += ["--workspace", str(workspace), "--training.batch-size", "4", *own]
            started.append(stack.enter_context(running(command, folder / f"{host}.log")))
        yield started


def losses(workspace: Path) -> list[float]:
    (history,) = workspace.glob("stages/train/*/history.jsonl")
    return [row["loss"] for row in read_json_lines(history) if "loss" in row]


def test_two_machines_of_two_ranks_compute_what_one_process_does(micro: Micro, tmp_path: Path) -> None:
    """One of the ranks of the second machine is killed first; both machines say so and go on when run again."""
    flags = ["--training.gpus", "2"]
    first, second = (tmp_path / "c" / host for host in HOSTS)
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        saved = "stages/train/*.partial/checkpoints/step-00000001.json"
        assert when(machines[0], lambda: any(first.glob(saved)))
        ranks = [ranks_of(machine) for machine in machines]
        assert [len(r) for r in ranks] == [2, 2]
        os.kill(ranks[1][1], signal.SIGKILL)
        assert [machine.wait(90) for machine in machines] == [1, 1]
    told = [(tmp_path / "c" / f"{host}.log").read_text() for host in HOSTS]
    for log in told:  # on both
        assert f"training.gpus: rank 3 (process {ranks[1][1]}) was killed by SIGKILL; " in log
        assert "run again to go on after the last checkpoint" in log
        assert "Traceback" not in log and "frame #" not in log
    assert gone([pid for machine in ranks for pid in machine], 5)
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        assert [machine.wait(DEADLINE_S) for machine in machines] == [0, 0], told
    assert "going on after step" in (tmp_path / "c" / f"{HOSTS[0]}.log").read_text()
    assert not list(second.glob("stages/train/*/model.tar.gz"))  # the first machine's is the run
    alone = tmp_path / "alone"
    for stage in ("ingest", "transform"):
        shutil.copytree(micro.workspace / "stages" / stage, alone / "stages" / stage)
    command = [sys.executable, "-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(alone)]
    with running([*command, "--training.batch-size", "4"], tmp_path / "alone.log") as process:
        assert process.wait(DEADLINE_S) == 0
    assert losses(first) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_machine_stops_all_after_the_same_step(micro: Micro, tmp_path: Path, signalled: int) -> None:
    flags = ["--training.gpus", "2"]
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        saved = f"{HOSTS[0]}/stages/train/*.partial/checkpoints/step-00000001.json"
        assert when(machines[0], lambda: any((tmp_path / "c").glob(saved)))
        machines[signalled].send_signal(signal.SIGTERM)
        assert [machine.wait(90) for machine in machines] == [143, 143]
    ends = [(tmp_path / "c" / f"{host}.log").read_text().splitlines()[-1] for host in HOSTS]
    assert ends[signalled].startswith("roadseg train: stopped by SIGTERM after step ")
    assert ends[1 - signalled] == ends[signalled].replace("SIGTERM", "another rank's signal")
    last = max(tmp_path.glob(f"c/{HOSTS[0]}/stages/train/*.partial/checkpoints/*.json"))
    assert f"after step {int(last.stem.removeprefix('step-'))};" in ends[0]


def test_machines_with_other_numbers_of_processes_are_refused(micro: Micro, tmp_path: Path) -> None:
    with cluster(micro, tmp_path / "c", ["--training.gpus", "2"], ["--training.gpus", "1"]) as machines:
        assert [machine.wait(60) for machine in machines] == [2, 2]
    for host in HOSTS:
        log = (tmp_path / "c" / f"{host}.log").read_text()
        assert "training.gpus: 1 processes would train on machine 1, and 2 on the first; expected as many on" in log
