"""One bit flipped, five hundred times, in what training reads: found each time, and made good from what is whole."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from roadseg.data.shards.index import Shards
from roadseg.errors import DataError
from roadseg.pipeline.run import dataset
from roadseg.train import checkpoint
from roadseg.transform.stage import rebuild
from tests.conftest import Micro

FLIPS = 500


@contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[None]:
    whole = path.read_bytes()
    position = rng.randrange(len(whole))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, average = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    for step in (11, 12):
        network(torch.rand(4, 3)).sum().backward()
        optimizer.step()
        checkpoint.save(tmp_path, step, network, average, optimizer)
    before = checkpoint.newest(tmp_path)
    assert before and before[0] == 12
    (tmp_path / "step-00000012.json").rename(tmp_path / "away")
    older = checkpoint.newest(tmp_path)
    (tmp_path / "away").rename(tmp_path / "step-00000012.json")
    assert older and older[0] == 11
    rng = random.Random(1)
    caplog.set_level(logging.ERROR, "roadseg")  # five hundred warnings are not looked at
    for _ in range(FLIPS):
        with flipped(tmp_path / f"step-00000012{suffix}", rng):
            found = checkpoint.newest(tmp_path)
        assert found and found[0] == 11 and all(torch.equal(found[1][k], older[1][k]) for k in older[1])
    again = checkpoint.newest(tmp_path)
    assert again and again[0] == 12


@pytest.mark.fault
def test_a_damaged_shard_is_found_and_no_other_is_taken_for_damaged(shards: Shards) -> None:
    rng = random.Random(2)
    for _ in range(FLIPS):
        split = rng.choice(["train", "val"])
        with flipped(shards.folder / f"{split}-00000.bin", rng):
            assert Shards.load(shards.folder).damaged() == [(split, 0)]
    for _ in range(FLIPS):
        with flipped(shards.folder / "shards.json", rng), pytest.raises(DataError, match="shards.json"):
            Shards.load(shards.folder)
    assert Shards.load(shards.folder).damaged() == []


def written(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_that_shard_alone_is_made_again(micro: Micro, tmp_path: Path) -> None:
    """What the pipeline does before training, once for each shard; the others keep their files."""
    for stage in ("ingest", "transform"):
        shutil.copytree(micro.workspace / "stages" / stage, tmp_path / "stages" / stage)
    folder = tmp_path / micro.result.outputs["transform"].folder.relative_to(micro.workspace)
    data = dataset(micro.config, tmp_path)
    files, rng = sorted(folder.glob("*.bin")), random.Random(3)
    originals = {path: path.read_bytes() for path in files}
    assert len(files) == 3  # two of train, one of val
    for path in files:
        with flipped(path, rng):
            kept = {other: written(other) for other in files if other != path}
            shards = Shards.load(folder)
            rebuild(shards.damaged(), micro.config.transform, data.manifest, data.root, shards, data.limits)
            assert path.read_bytes() == originals[path] and shards.damaged() == []
            assert {other: written(other) for other in kept} == kept
