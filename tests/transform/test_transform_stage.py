"""Transform: shards have the pixels of the originals."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from roadseg.config.sections import Transform
from roadseg.data.manifest import Manifest
from roadseg.data.masks.form import MaskForm
from roadseg.data.shards.index import Shards
from roadseg.errors import DataError, RoadsegError
from roadseg.files import content_digest
from roadseg.images.decode import Limits, encode_label_png
from roadseg.labels import IGNORE
from roadseg.pipeline.workspace import LEAVE_OUT
from roadseg.transform import stage
from roadseg.transform.stage import rebuild, transform
from tests.conftest import THREE, scene, write_frames

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


def digest(folder: Path) -> str:
    """As the workspace computes it."""
    return content_digest(folder, LEAVE_OUT)


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


def test_statistics_equal_numpys_over_train(tmp_path: Path) -> None:
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
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_the_digest_equals_the_workspaces(tmp_path: Path) -> None:
    made(tmp_path, train=5, val=3)
    assert Shards.load(tmp_path / "work").content == digest(tmp_path / "work")


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    colors = np.zeros((3, 256), np.int64)
    colors[:, 7] = 10
    assert stage._moments(colors) == ((7.0, 7.0, 7.0), (1.0, 1.0, 1.0))


def test_data_with_only_a_test_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        made(tmp_path, test=2)
    assert "test" in e.value.found and e.value.exit_code == 3


def test_a_file_that_changed_since_ingest(tmp_path: Path) -> None:
    manifest = frames(tmp_path / "data", train=3)
    (tmp_path / "data" / "train" / "1_ids.png").write_bytes(encode_label_png(np.zeros((4, 4), np.uint8)))
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError, match="train/1_ids.png"):
        transform(SETTINGS, manifest, tmp_path / "data", tmp_path / "work", Limits(), 1)
    (tmp_path / "data" / "train" / "1.png").unlink()
    with pytest.raises((OSError, RoadsegError), match="1.png"):
        transform(SETTINGS, manifest, tmp_path / "data", tmp_path / "work", Limits(), 1)


@pytest.mark.fault
def test_only_damaged_shards_are_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, shards = made(tmp_path, train=5, val=2)
    before = digest(tmp_path / "work")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    broken, gone = tmp_path / "work" / "train-00001.bin", tmp_path / "work" / "val-00000.bin"
    data = bytearray(broken.read_bytes())
    data[7] ^= 1
    broken.write_bytes(data)
    gone.unlink()
    damaged = shards.damaged()
    assert sorted(damaged) == [("train", 1), ("val", 0)]
    rebuild(damaged, SETTINGS, manifest, tmp_path / "data", shards, Limits())
    assert digest(tmp_path / "work") == before and "train-00001.bin is damaged" in caplog.text
    kept = {n for n, t in times.items() if (tmp_path / "work" / n).stat().st_mtime_ns == t}
    assert kept - {"log"} == {"train-00000.bin", "train-00002.bin", "shards.json"}


@pytest.mark.fault
def test_a_shard_that_can_not_be_rebuilt(tmp_path: Path) -> None:
    manifest, shards = made(tmp_path, train=2)
    (tmp_path / "work" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match="train-00000.bin"):
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


@pytest.mark.parametrize("form", ["jpeg", "lossless"])
def test_other_forms_of_the_images(tmp_path: Path, form: Any) -> None:
    settings = Transform(shard_frames=2, format=form, jpeg_quality=90)
    manifest = frames(tmp_path / "data", train=2, val=1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shards = transform(settings, manifest, tmp_path / "data", tmp_path / name, Limits(), 1)
    assert shards.form == form and Shards.load(tmp_path / "two") == shards
    image, label = scene(0, 40, 60)
    got, ids = shards.split("train").read(0)
    np.testing.assert_array_equal(ids, label)
    assert np.array_equal(got, image) == (form == "lossless")
    assert np.abs(got.astype(int) - image).mean() < 12  # noise of +-20 that no JPEG keeps
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_parts_weights_and_centroids_are_in_the_index(tmp_path: Path) -> None:
    manifest = frames(tmp_path / "data", train=2)
    samples = tuple(replace(s, part=p) for s, p in zip(manifest.samples, "ab", strict=True))
    form = MaskForm("ids", THREE)
    mixed = Manifest("mix", THREE, samples, {"a": form, "b": form}, {"a": 1.0, "b": 3.0})
    (tmp_path / "work").mkdir()
    shards = transform(SETTINGS, mixed, tmp_path / "data", tmp_path / "work", Limits(), 1)
    assert shards.part_weights == {"a": 1.0, "b": 3.0} and [f.part for f in shards.split("train").frames] == ["a", "b"]
    label = shards.split("train").read(0)[1]
    centroids = shards.split("train").frames[0].centroids
    assert {c for c, _, _ in centroids} == {0, 1, 2} and all(label[y, x] == c for c, y, x in centroids)


# ── resumed runs, a full disk ─────────────────────────────────────────────────────────────

SCRIPT = """
import sys
from pathlib import Path
from roadseg.config.sections import Transform
from roadseg.data.manifest import Manifest
from roadseg.images.decode import Limits
from roadseg.transform.stage import transform

if __name__ == "__main__":
    root, work = Path(sys.argv[1]), Path(sys.argv[2])
    transform(Transform(shard_frames=1), Manifest.load(root), root, work, Limits(), 2)
"""


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")}


@pytest.mark.fault
def test_a_killed_run_resumes_with_the_finished_shards(tmp_path: Path) -> None:
    splits = {"train": [scene(i, 300, 400) for i in range(40)], "val": [scene(99)]}
    manifest = write_frames(tmp_path / "data", THREE, splits)
    manifest.save(tmp_path / "data")
    manifest = Manifest.load(tmp_path / "data")
    (tmp_path / "script.py").write_text(SCRIPT)
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "data"), str(work)]
    path = {"PYTHONPATH": str(Path(stage.__file__).parents[2])}
    process = subprocess.Popen(command, env={**os.environ, **path}, start_new_session=True)
    while len(list((work / stage.DONE).glob("*.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = times(work)
    recorded = {p.stem for p in (work / stage.DONE).glob("*.json")}
    assert 4 <= len(recorded) < 41 and not (work / "shards.json").exists()
    (work / "train-00001.tmp").write_bytes(b"half")

    settings = Transform(shard_frames=1)
    transform(settings, manifest, tmp_path / "data", work, Limits(), 2)
    (tmp_path / "whole").mkdir()
    transform(settings, manifest, tmp_path / "data", tmp_path / "whole", Limits(), 2)
    assert digest(work) == digest(tmp_path / "whole")
    after = times(work)
    assert all(after[f"{stem}.bin"] == done[f"{stem}.bin"] for stem in recorded)


@pytest.mark.fault
def test_only_intact_shards_of_the_same_job_are_kept(tmp_path: Path) -> None:
    manifest, shards = made(tmp_path, train=7, val=1)
    work, before = tmp_path / "work", digest(tmp_path / "work")
    for file in ("train-00001.bin", "train-00003.bin"):
        data = bytearray((work / file).read_bytes())
        data[100] ^= 4
        (work / file).write_bytes(data)
    (work / stage.DONE / "train-00002.json").write_text('{"shard": {')
    (work / "shards.json").unlink()
    kept = times(work)
    transform(SETTINGS, manifest, tmp_path / "data", work, Limits(), 1)
    assert digest(work) == before and Shards.load(work) == shards
    assert {name for name, t in times(work).items() if kept[name] == t} == {"train-00000.bin", "val-00000.bin"}
    other = transform(Transform(shard_frames=2, format="lossless"), manifest, tmp_path / "data", work, Limits(), 1)
    assert other.damaged() == [] and not {*times(work).items()} & {*kept.items()}


@pytest.mark.fault
def test_a_full_disk_is_one_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """Simulated by a limit on file sizes: the second shard's frames are larger."""
    splits = {"train": [scene(0), scene(1), scene(2, 300, 400), scene(3)]}
    manifest = write_frames(tmp_path / "data", THREE, splits)
    work, settings = tmp_path / "work", Transform(shard_frames=2)
    work.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RoadsegError, match=r"train-00001.bin: .*File too large"):
            transform(settings, manifest, tmp_path / "data", work, Limits(), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in sorted(work.iterdir())] == ["log", "train-00000.bin"]
    kept = times(work)["train-00000.bin"]
    transform(settings, manifest, tmp_path / "data", work, Limits(), 1)
    assert times(work)["train-00000.bin"] == kept and Shards.load(work).damaged() == []
