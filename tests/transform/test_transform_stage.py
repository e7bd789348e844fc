"""Manifest to shards: what comes back is what the originals hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import THREE, scene, write_frames

from roadseg.config import Transform
from roadseg.data.manifest import Manifest
from roadseg.data.shards import Shards
from roadseg.errors import DataError, RoadsegError
from roadseg.files import content_digest
from roadseg.images import Limits, encode_label_png
from roadseg.labels import IGNORE
from roadseg.transform import stage
from roadseg.transform.stage import rebuild, transform

SETTINGS = Transform(shard_frames=2)


def frames(root: Path, **counts: int) -> Manifest:
    splits = {
        split: [scene(100 * s + i, 40 + s, 60 + i) for i in range(count)]
        for s, (split, count) in enumerate(sorted(counts.items()))
    }
    return write_frames(root, THREE, splits)


def made(tmp_path: Path, name: str = "work", workers: int = 1, **counts: int) -> tuple[Manifest, Shards]:
    manifest = frames(tmp_path / "data", **counts)
    (tmp_path / name).mkdir()
    return manifest, transform(SETTINGS, manifest, tmp_path / "data", tmp_path / name, Limits(), workers)


def test_shards_hold_the_originals_with_train_ids(tmp_path: Path) -> None:
    manifest, shards = made(tmp_path, train=5, val=2, test=2)
    assert Shards.load(tmp_path / "work") == shards and set(shards.shards) == {"train", "val"}
    assert [len(s.frames) for s in shards.shards["train"]] == [2, 2, 1] and shards.damaged() == []
    split = shards.split("train")
    for i, sample in enumerate(manifest.split("train")):
        image, label = split.read(i)
        expected_image, expected_label = scene(100 * 1 + i, 41, 60 + i)
        assert split.frames[i].name == sample.name
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(label, expected_label)
    assert set(np.unique(split.read(0)[1])) == {0, 1, 2, IGNORE}


def test_statistics_are_numpy_s_over_train_alone(tmp_path: Path) -> None:
    manifest, shards = made(tmp_path, train=3, val=2)
    split = shards.split("train")
    pixels = np.concatenate([split.read(i)[0].reshape(-1, 3) for i in range(3)]).astype(np.float64)
    np.testing.assert_allclose(shards.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(shards.std, pixels.std(0), rtol=1e-9)
    assert shards.class_pixels == {s: list(manifest.histogram(s)) for s in ("train", "val")}
    assert shards.fingerprints == {s: manifest.fingerprint(s) for s in ("train", "val")}


def test_the_bytes_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    made(tmp_path, "one", 1, train=5, val=3)
    made(tmp_path, "two", 2, train=5, val=3)
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    colours = np.zeros((3, 256), np.int64)
    colours[:, 7] = 10
    assert stage._moments(colours) == ((7.0, 7.0, 7.0), (1.0, 1.0, 1.0))


def test_only_test_is_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split but test"):
        made(tmp_path, test=2)


def test_a_file_that_changed_since_ingest(tmp_path: Path) -> None:
    manifest = frames(tmp_path / "data", train=3)
    (tmp_path / "data" / "train" / "1_ids.png").write_bytes(encode_label_png(np.zeros((4, 4), np.uint8)))
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError, match="train/1_ids.png: changed since ingest"):
        transform(SETTINGS, manifest, tmp_path / "data", tmp_path / "work", Limits(), 1)
    (tmp_path / "data" / "train" / "1.png").unlink()
    with pytest.raises((OSError, RoadsegError), match="1.png"):
        transform(SETTINGS, manifest, tmp_path / "data", tmp_path / "work", Limits(), 1)


@pytest.mark.fault
def test_damaged_shards_are_made_again_and_others_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, shards = made(tmp_path, train=5, val=2)
    before = content_digest(tmp_path / "work")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    broken, gone = tmp_path / "work" / "train-00001.bin", tmp_path / "work" / "val-00000.bin"
    data = bytearray(broken.read_bytes())
    data[7] ^= 1
    broken.write_bytes(data)
    gone.unlink()
    damaged = shards.damaged()
    assert sorted(damaged) == [("train", 1), ("val", 0)]
    rebuild(damaged, SETTINGS, manifest, tmp_path / "data", shards, Limits())
    assert content_digest(tmp_path / "work") == before and "train-00001.bin is damaged" in caplog.text
    kept = {n for n, t in times.items() if (tmp_path / "work" / n).stat().st_mtime_ns == t}
    assert kept == {"train-00000.bin", "train-00002.bin", "shards.json"}


@pytest.mark.fault
def test_a_shard_that_the_originals_no_longer_give(tmp_path: Path) -> None:
    manifest, shards = made(tmp_path, train=2)
    (tmp_path / "work" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no longer give this shard"):
        rebuild(shards.damaged(), Transform(shard_frames=1), manifest, tmp_path / "data", shards, Limits())
    image = np.full((40, 60, 3), 9, np.uint8)
    (tmp_path / "data" / manifest.samples[0].image).write_bytes(cv2.imencode(".png", image)[1].tobytes())
    with pytest.raises(DataError, match="changed since ingest"):
        rebuild(shards.damaged(), SETTINGS, manifest, tmp_path / "data", shards, Limits())


def test_limits_hold(tmp_path: Path) -> None:
    manifest = frames(tmp_path / "data", train=1)
    (tmp_path / "work").mkdir()
    with pytest.raises(RoadsegError, match="at most 100"):
        transform(SETTINGS, manifest, tmp_path / "data", tmp_path / "work", replace(Limits(), max_pixels=100), 1)
