"""Shards: boxes equal what was written, and every flipped bit is detected."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadseg.data.shards.files import VERIFIED, MappedFiles
from roadseg.data.shards.images import Format
from roadseg.data.shards.index import Frame, Shard, Shards, Split, write_frame
from roadseg.errors import DataError
from roadseg.files import sha256_file
from tests.conftest import THREE, scene

FORMS = get_args(Format)
SIZES = ((1, 1), (70, 131), (129, 300), (200, 530))


def smooth(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image, without the noise of `scene`, which JPEG does not keep."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return image, cv2.resize(coarse[..., 0] // 64, (width, height), interpolation=cv2.INTER_NEAREST)


def written(folder: Path, form: Format, frames: list[tuple[np.ndarray, np.ndarray]]) -> Shards:
    path = folder / "train-00000.bin"
    with open(path, "wb") as f:
        rows = tuple(write_frame(f, f"f{i}", "s", *x, form=form, centroids=((0, 1, 2),)) for i, x in enumerate(frames))
    shard = Shard(path.name, sha256_file(path), rows, path.stat().st_size)
    shards = Shards(
        folder=folder,
        source="test",
        label_set=THREE,
        mean=(1.0, 2.0, 3.5),
        std=(1.0, 1.0, 1.0),
        class_pixels={"train": [1, 2, 3, 4]},
        fingerprints={"train": "t" * 64},
        shards={"train": (shard,)},
        form=form,
        part_weights={"a": 2.0},
    )
    shards.save()
    return shards


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return written(tmp_path_factory.mktemp(request.param), request.param, [smooth(*size) for size in SIZES])


def test_frames_come_back_bit_for_bit(shards: Shards) -> None:
    loaded = Shards.load(shards.folder)
    assert loaded == shards and loaded.label_set == THREE
    split = loaded.split("train")
    assert len(split) == 6
    for i in range(6):
        image, label = split.read(i)
        expected_image, expected_label = scene(i)
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(label, expected_label)
        assert split.frames[i].name == f"train{i}"


def test_the_index_round_trips(made: Shards) -> None:
    loaded = Shards.load(str(made.folder))
    assert loaded == made and loaded.part_weights == {"a": 2.0}
    assert loaded.split("train").frames[0].centroids == ((0, 1, 2),)


def test_images_are_exact_or_as_good_as_their_jpeg(made: Shards) -> None:
    split = made.split("train")
    for i, size in enumerate(SIZES):
        image, label = split.read(i)
        expected, ids = smooth(*size)
        np.testing.assert_array_equal(label, ids)
        assert image.shape == expected.shape and image.dtype == np.uint8
        if made.form != "jpeg":
            np.testing.assert_array_equal(image, expected)
        else:  # no loss besides the encoder's
            options = [cv2.IMWRITE_JPEG_QUALITY, 95]
            reference = cv2.imdecode(cv2.imencode(".jpg", expected[..., ::-1], options)[1], cv2.IMREAD_COLOR)
            error, reference_error = (np.abs(x.astype(int) - expected).mean() for x in (image, reference[..., ::-1]))
            assert error <= reference_error + 0.05


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_is_that_part_of_the_frame(made: Shards, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(SIZES) - 1))
    height, width = (data.draw(st.integers(1, n)) for n in SIZES[i])
    top, left = (data.draw(st.integers(0, n - m)) for n, m in zip(SIZES[i], (height, width), strict=True))
    split = made.split("train")
    image, label = split.read(i)
    part_image, part_label = split.read_box(i, top, left, height, width)
    np.testing.assert_array_equal(part_image, image[top : top + height, left : left + width])
    np.testing.assert_array_equal(part_label, label[top : top + height, left : left + width])


@pytest.mark.parametrize("form", FORMS)
def test_a_box_reads_only_the_bands_that_it_touches(tmp_path: Path, form: Format) -> None:
    """Other bands may hold arbitrary bytes."""
    shards = written(tmp_path, form, [smooth(512, 256)])
    frame = shards.split("train").frames[0]
    expected = shards.split("train").read_box(0, 130, 0, 40, 256)
    data = bytearray((tmp_path / "train-00000.bin").read_bytes())
    data[-20:] = os.urandom(20)  # of the last band of the image
    data[frame.label_offset : frame.label_offset + 8] = os.urandom(8)  # of the first of the label
    (tmp_path / "train-00000.bin").write_bytes(data)
    for got, want in zip(shards.split("train").read_box(0, 130, 0, 40, 256), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(DataError) as e:
        shards.split("train").read(0)
    assert "f0" in e.value.found and e.value.where == str(tmp_path / "train-00000.bin")


def test_a_split_is_pickled_without_its_frames(made: Shards) -> None:
    split = made.split("train")
    before = split.read(3)
    data = pickle.dumps(split)
    assert len(data) < 3000
    for a, b in zip(pickle.loads(data).read(3), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_raw_image_is_a_view_of_the_file(tmp_path: Path) -> None:
    image, _ = written(tmp_path, "raw", [smooth(200, 300)]).split("train").read_box(0, 10, 20, 100, 100)
    assert not image.flags.owndata and not image.flags.writeable and image.strides == (900, 3, 1)


# ── flipped bits ────────────────────────────────────────────────────────────────────────────────


def flipped(data: bytes, position: int, bit: int) -> bytes:
    out = bytearray(data)
    out[position] ^= 1 << bit
    return bytes(out)


@pytest.mark.fault
def test_every_flipped_bit_of_a_shard_is_found(made: Shards) -> None:
    """By the whole file's digest, and by whoever reads the frame, unless it is padding."""
    path = made.folder / "train-00000.bin"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    frames = made.shards["train"][0].frames
    ends = [f.label_offset - f.table_bytes for f in frames[1:]] + [len(whole)]
    for position in rng.integers(0, len(whole), 150):
        path.write_bytes(flipped(whole, position, int(rng.integers(8))))
        assert made.damaged() == [("train", 0)]
        i = next(i for i, end in enumerate(ends) if position < end)
        if not frames[i].label_offset + frames[i].label_bytes <= position < frames[i].image_offset:
            with pytest.raises(DataError, match=rf"train-00000.bin: frame f{i} is damaged"):
                made.split("train").read(i)
    path.unlink()
    assert made.damaged() == [("train", 0)]
    path.write_bytes(whole)
    assert made.damaged() == []


@pytest.mark.fault
def test_every_flipped_bit_of_the_index_is_found(made: Shards, tmp_path: Path) -> None:
    whole, rng = (made.folder / "shards.json").read_bytes(), np.random.default_rng(1)
    positions = {*rng.integers(0, len(whole), 300).tolist(), *range(len(whole) - 80, len(whole))}
    for position in positions:
        (tmp_path / "shards.json").write_bytes(flipped(whole, position, int(rng.integers(8))))
        with pytest.raises(DataError, match="shards.json"):
            Shards.load(tmp_path)
    (tmp_path / "shards.json").write_bytes(whole)
    assert Shards.load(tmp_path).shards == made.shards


@pytest.mark.fault
def test_unchanged_files_are_not_read_again(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("roadseg.data.shards.files.sha256_file", lambda p: (read.append(p.name), sha256_file(p))[1])
    assert shards.damaged() == [] and sorted(read) == ["train-00000.bin", "val-00000.bin"]
    read.clear()
    assert shards.damaged() == [] and read == []
    path = shards.folder / "train-00000.bin"
    before = path.stat()
    path.write_bytes(flipped(path.read_bytes(), 77, 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert shards.damaged() == [("train", 0)] and read == ["train-00000.bin"]
    (shards.folder / VERIFIED).write_text("[broken")
    assert shards.damaged() == [("train", 0)]


@pytest.mark.fault
def test_damage_found_while_reading_is_found_by_the_next_check(shards: Shards) -> None:
    """A disk that loses a bit changes no time, so the recorded stamp is forged."""
    path = shards.folder / "train-00000.bin"
    frame = shards.split("train").frames[2]
    assert shards.damaged() == []
    path.write_bytes(flipped(path.read_bytes(), frame.image_offset + 5, 0))
    s = path.stat()
    stamps = json.loads((shards.folder / VERIFIED).read_bytes())
    stamps[path.name][1:] = [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    (shards.folder / VERIFIED).write_text(json.dumps(stamps))
    assert shards.damaged() == []
    split = shards.split("train")
    split.read(1)
    with pytest.raises(DataError, match="frame train2"):
        split.read_box(2, 0, 0, 10, 10)
    assert shards.damaged() == [("train", 0)]


def test_a_shard_that_is_too_short(shards: Shards) -> None:
    path = shards.folder / "train-00000.bin"
    for data in (path.read_bytes()[:-100], b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match="train-00000.bin"):
            shards.split("train").read(5)
    path.unlink()
    with pytest.raises(DataError, match="train-00000.bin"):
        shards.split("train").read(0)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema_version": 99}', '{"schema_version": 2}', "[]"])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(DataError, match="shards.json"):
        Shards.load(tmp_path)


@pytest.mark.parametrize("version", [1, 3])
def test_another_schema_version_is_refused(shards: Shards, version: int) -> None:
    path = shards.folder / "shards.json"
    path.write_bytes(path.read_bytes().replace(b'"schema_version":2', b'"schema_version":%d' % version))
    with pytest.raises(DataError) as e:
        Shards.load(shards.folder)
    assert e.value.where == str(path) and str(version) in e.value.found


def test_the_index_has_the_fields_of_frames(made: Shards) -> None:
    """Other readers rely on the names of Frame's fields in the file."""
    index = json.loads((made.folder / "shards.json").read_bytes())
    first = index["shards"]["train"][0]["frames"][0]
    assert first == json.loads(json.dumps(asdict(made.split("train").frames[0])))
    assert Frame(**{**first, "centroids": ((0, 1, 2),)}) == Split(MappedFiles(Path()), made.shards["train"]).frames[0]
