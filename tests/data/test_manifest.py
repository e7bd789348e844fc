import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadseg.data.manifest import Manifest, Sample
from roadseg.errors import DataError
from roadseg.files import sha256_bytes
from roadseg.labels import CAMVID, CITYSCAPES


def sample(split: str, name: str, **changes: object) -> Sample:
    image, label = sha256_bytes(f"image {name}".encode()), sha256_bytes(f"label {name}".encode())
    histogram = (20, 5, *[0] * 9, 3)
    made = Sample(
        split=split,
        name=name,
        sequence="s",
        image=f"{split}/{name}.png",
        label=f"{split}annot/{name}.png",
        instances="",
        width=7,
        height=4,
        image_sha256=image,
        label_sha256=label,
        image_bytes=100,
        label_bytes=50,
        histogram=histogram,
    )
    return replace(made, **changes)


def manifest(*samples: Sample) -> Manifest:
    return Manifest("camvid", CAMVID, samples)


THREE = manifest(sample("train", "a"), sample("train", "b"), sample("val", "c"))


def test_saved_and_loaded_is_the_same_and_deterministic(tmp_path):
    (tmp_path / "x").mkdir()
    THREE.save(tmp_path)
    manifest(*reversed(THREE.samples)).save(tmp_path / "x")
    assert Manifest.load(tmp_path) == THREE
    for name in ("manifest.jsonl", "dataset.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "x" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(r["split"], r["name"]) for r in rows] == [("train", "a"), ("train", "b"), ("val", "c")]
    train = json.loads((tmp_path / "dataset.json").read_text())["splits"]["train"]
    assert train["images"] == 2 and train["sequences"] == 1
    assert train["histogram"]["sky"] == 40 and train["histogram"]["void"] == 6


def test_a_missing_split_lists_the_existing_ones():
    assert THREE.splits == ("train", "val")
    with pytest.raises(DataError) as e:
        THREE.split("test")
    assert "train, val" in e.value.expected and e.value.exit_code == 3


def test_fingerprint_depends_on_contents_alone():
    print_ = THREE.fingerprint("train")
    moved = [replace(s, name=f"z{s.name}", image=f"elsewhere/{s.image}", sequence="t") for s in THREE.split("train")]
    assert manifest(*reversed(moved)).fingerprint("train") == print_
    a, b = THREE.split("train")
    for changed in (
        manifest(a),
        manifest(a, replace(b, image_sha256="0" * 64)),
        manifest(a, replace(b, label_sha256="0" * 64)),
        manifest(replace(a, label_sha256=b.label_sha256), replace(b, label_sha256=a.label_sha256)),
        Manifest("camvid", CITYSCAPES, (a, b)),
    ):
        assert changed.fingerprint("train") != print_


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", "7", "width is not an integer"),
        ("width", 8, "does not have"),
        ("image_sha256", "zz", "image_sha256 is not a SHA-256"),
        ("image", "../../etc/passwd", "outside the data root"),
        ("label", "/etc/passwd", "outside the data root"),
        ("histogram", [28], "does not have"),
        ("histogram", "many", "not a list"),
        ("name", None, "name is not a string"),
        ("name", "a", "doubled or out of order"),
        ("colour", 1, "its keys are not"),
    ],
)
def test_a_broken_line_is_named(tmp_path, key, value, message):
    THREE.save(tmp_path)
    rows = lines(tmp_path)
    rows[1][key] = value
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=f"manifest.jsonl, line 2: .*{message}"):
        Manifest.load(tmp_path)


def test_a_changed_or_missing_file_is_named(tmp_path):
    with pytest.raises(DataError) as e:
        Manifest.load(tmp_path)
    assert e.value.where == str(tmp_path / "dataset.json")
    THREE.save(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines(tmp_path)[:2]))
    with pytest.raises(DataError) as e:
        Manifest.load(tmp_path)
    assert e.value.where == str(tmp_path / "manifest.jsonl")
    for text in ("", "[]", "{}", '{"schema": 7}', '{"schema": 1, "source": 1, "label_set": {}, "splits": {}}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(DataError) as e:
            Manifest.load(tmp_path)
        assert e.value.where == str(tmp_path / "dataset.json")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    THREE.save(folder)
    return folder


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(asdict(sample("a", "b")))), JSON)
def test_any_value_anywhere_is_loaded_or_a_data_error(saved, key, value):
    good = (saved / "manifest.jsonl").read_bytes()
    rows = lines(saved)
    rows[2][key] = value
    try:
        (saved / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        Manifest.load(saved)
    except DataError as e:
        assert "manifest.jsonl" in str(e)
    finally:
        (saved / "manifest.jsonl").write_bytes(good)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["manifest.jsonl", "dataset.json"]), st.binary(max_size=20), st.floats(0, 1))
def test_any_damage_is_a_data_error(saved, name, junk, where):
    good = (saved / name).read_bytes()
    at = round(where * len(good))
    try:
        (saved / name).write_bytes(good[:at] + junk + good[at + len(junk) // 2 :])
        Manifest.load(saved)
    except DataError as e:
        assert name in str(e) or "dataset.json" in str(e)
    finally:
        (saved / name).write_bytes(good)
