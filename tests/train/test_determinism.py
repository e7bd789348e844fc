"""Deterministic training: what it sets and puts back; a killed and resumed run on CUDA ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import roadseg
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError
from roadseg.files import read_json
from roadseg.train.determinism import CUBLAS, deterministic
from tests.conftest import MICRO


def settings() -> tuple[object, ...]:
    cudnn, filled = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*flags, cudnn.benchmark, cudnn.deterministic, filled, os.environ.get(CUBLAS))


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_all_is_set_inside_and_put_back_after(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    if given:
        monkeypatch.setenv(CUBLAS, given)
    before = settings()
    with deterministic(True):
        assert settings() == (True, False, False, True, False, given or ":4096:8")
    assert settings() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert settings() == before
    with deterministic(False):
        assert settings() == before


def test_what_has_no_deterministic_form_is_told_with_what_to_change() -> None:
    before = settings()
    told = "training.deterministic: .*put_ does not have a deterministic.*to false, or"
    with pytest.raises(ConfigError, match=told), deterministic(True):
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))
    assert settings() == before
    with pytest.raises(RuntimeError, match="shape"), deterministic(True):
        torch.zeros(3).view(2)


def start(workspace: Path, shards: Shards, flags: list[str]) -> subprocess.Popen[bytes]:
    """Of 30 steps: eager ones, and those of a CUDA graph, which a run begins with its twelfth."""
    command = [sys.executable, "-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(workspace)]
    command += ["--transform.shards", str(shards.folder), "--training.device", "cuda", "--training.steps", "30"]
    command += ["--training.checkpoint-every", "5", "--training.batch-size", "4", "--training.validate-every", "30"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(roadseg.__file__).parents[1]), *sys.path])}
    with open(workspace.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([*command, *flags], env=environment, stdout=log, stderr=log)


def last_digest(workspace: Path, process: subprocess.Popen[bytes]) -> str:
    assert process.wait(200) == 0, workspace.with_suffix(".log").read_text()
    (path,) = workspace.glob("stages/train/*/checkpoints/step-00000030.json")
    digest: str = read_json(path)["sha256"]
    return digest


LARGE = ["--model.backbone", "mobilenetv2_100", "--model.head", "dense", "--model.channels", "64"]
MORE = [f"--training.loss.{term}=1" for term in ("lovasz", "ohem", "rmi", "boundary")]


@pytest.mark.gpu
@pytest.mark.fault
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [LARGE, MORE], ids=["large", "losses"])
def test_killed_and_resumed_on_cuda_it_ends_bit_identical(shards: Shards, tmp_path: Path, flags: list[str]) -> None:
    flags = [*flags, "--training.deterministic", "True"]
    processes = [start(tmp_path / name, shards, flags) for name in ("whole", "cut")]
    until = time.monotonic() + 200
    while not list((tmp_path / "cut").glob("stages/train/*/checkpoints/step-00000015.json")):
        assert time.monotonic() < until and processes[1].poll() is None, (tmp_path / "cut.log").read_text()
        time.sleep(0.001)
    processes[1].kill()
    processes[1].wait()
    assert not list((tmp_path / "cut").glob("stages/train/*/checkpoints/step-00000030.json")), "it was through already"
    digest = last_digest(tmp_path / "whole", processes[0])
    assert last_digest(tmp_path / "cut", start(tmp_path / "cut", shards, flags)) == digest
    assert "going on after step" in (tmp_path / "cut.log").read_text()
