"""A mix of sources: one taxonomy, one root, each part with its own form of masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.config.sections import Data, Transform
from roadseg.data.frames import read_frame
from roadseg.data.manifest import Manifest
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError, DataError
from roadseg.images.decode import Limits
from roadseg.ingest.sources.select import find, mixed_root
from roadseg.ingest.stage import ingest, source_digest
from roadseg.labels import CITYSCAPES
from roadseg.transform.stage import transform

HEIGHT, WIDTH = 48, 96
ROAD, CAR, SKY = (CITYSCAPES.names.index(n) for n in ("road", "car", "sky"))
YAML = """
name: mine
masks: colors
classes:
  - {id: 1, name: asphalt, color: [10, 20, 30], cityscapes: road}
  - {id: 2, name: car, color: [200, 0, 0]}
  - {id: 3, name: drone, color: [0, 200, 0]}
splits:
  train: {images: pictures, labels: masks}
"""


def image(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 12, 3)).astype(np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels if pixels.ndim == 2 else pixels[..., ::-1])


def regions(values: tuple, seed: int) -> np.ndarray:
    """[H, W] or [H, W, 3]: three bands of random heights in the given ids or colors."""
    a, b = sorted(np.random.default_rng(seed).choice(np.arange(8, 40), 2, replace=False))
    which = np.repeat((np.arange(HEIGHT) >= a).astype(int) + (np.arange(HEIGHT) >= b), WIDTH).reshape(HEIGHT, WIDTH)
    return np.array(values, np.uint8)[which]


@pytest.fixture
def mix(tmp_path: Path) -> Data:
    for split, first, count in (("train", 0, 3), ("val", 10, 2)):
        for i in range(first, first + count):
            name = f"{split}/town{i}/town{i}_000000_{i:06d}"
            write(tmp_path / f"cs/leftImg8bit/{name}_leftImg8bit.png", image(i))
            write(tmp_path / f"cs/gtFine/{name}_gtFine_labelIds.png", regions((23, 26, 7), i))
    for i in range(20, 24):
        write(tmp_path / f"mine/pictures/{i}.png", image(i))
        write(tmp_path / f"mine/masks/{i}.png", regions(((0, 200, 0), (200, 0, 0), (10, 20, 30)), i))
    (tmp_path / "mine.yaml").write_text(YAML)
    return Data.model_validate(
        {
            "source": "mix",
            "mix": {
                "cs": {"source": "cityscapes", "root": tmp_path / "cs", "weight": 3},
                "own": {"source": "folder", "root": tmp_path / "mine", "labels": tmp_path / "mine.yaml"},
            },
        }
    )


def ingested(data: Data, tmp_path: Path) -> tuple[Manifest, Path]:
    root, work = mixed_root(data, tmp_path / "links"), tmp_path / "work"
    work.mkdir()
    ingest(data, root, work)
    return Manifest.load(work), root


def test_parts_map_to_the_nineteen_classes(mix: Data, tmp_path: Path) -> None:
    manifest, root = ingested(mix, tmp_path)
    assert manifest.label_set.names == CITYSCAPES.names and manifest.part_weights == {"cs": 3.0, "own": 1.0}
    assert [s.part for s in manifest.split("train")] == ["cs"] * 3 + ["own"] * 4
    assert {s.part for s in manifest.split("val")} == {"cs"}
    for sample, top in ((manifest.split("train")[0], SKY), (manifest.split("train")[-1], 255)):
        _, label = read_frame(root, sample, manifest.forms[sample.part], Limits())
        assert label[0, 0] == top and label[-1, 0] == ROAD and CAR in label  # a drone is not a Cityscapes class
        assert sample.histogram[ROAD] == int((label == ROAD).sum())


def test_shards_carry_parts_and_weights(mix: Data, tmp_path: Path) -> None:
    manifest, root = ingested(mix, tmp_path)
    out = tmp_path / "shards"
    out.mkdir()
    transform(Transform(), manifest, root, out, Limits(), workers=1)
    shards = Shards.load(out)
    assert shards.part_weights == {"cs": 3.0, "own": 1.0}
    assert [f.part for f in shards.split("train").frames] == ["cs"] * 3 + ["own"] * 4


def test_the_fingerprint_covers_label_meaning_not_location(mix: Data, tmp_path: Path) -> None:
    before, _ = ingested(mix, tmp_path / "a")
    (tmp_path / "mine").rename(tmp_path / "moved")
    own = mix.mix["own"].model_copy(update={"root": tmp_path / "moved"})
    moved = mix.model_copy(update={"mix": {**mix.mix, "own": own}})
    after, _ = ingested(moved, tmp_path / "b")
    assert after.fingerprint("train") == before.fingerprint("train")
    assert mix.key_fields() == moved.key_fields()
    (tmp_path / "mine.yaml").write_text(YAML.replace("name: car", "name: truck"))
    other, _ = ingested(moved, tmp_path / "c")
    assert other.fingerprint("train") != before.fingerprint("train")
    assert other.fingerprint("val") == before.fingerprint("val")


def test_only_the_chosen_splits_of_a_part_are_used(mix: Data, tmp_path: Path) -> None:
    part = mix.mix["cs"].model_copy(update={"splits": ("val",)})
    manifest, _ = ingested(mix.model_copy(update={"mix": {**mix.mix, "cs": part}}), tmp_path)
    assert {s.part for s in manifest.split("train")} == {"own"} and {s.part for s in manifest.split("val")} == {"cs"}


def test_a_missing_split_of_a_part_is_refused(mix: Data, tmp_path: Path) -> None:
    part = mix.mix["cs"].model_copy(update={"splits": ("trian",)})
    with pytest.raises(ConfigError) as e:
        ingested(mix.model_copy(update={"mix": {**mix.mix, "cs": part}}), tmp_path)
    assert e.value.where == "data.mix.cs.splits" and "trian" in e.value.found


def test_terms_of_all_parts_are_kept(mix: Data, tmp_path: Path) -> None:
    twice = {"a": mix.mix["cs"], "b": mix.mix["cs"].model_copy(update={"splits": ("train",)})}
    data = mix.model_copy(update={"taxonomy": "native", "mix": twice})
    assert find(data, mixed_root(data, tmp_path / "links")).label_set.terms.count("Cityscapes") >= 2


def test_native_classes_of_different_sets_cannot_be_mixed(mix: Data, tmp_path: Path) -> None:
    root = mixed_root(mix, tmp_path / "links")
    with pytest.raises(ConfigError) as e:
        find(mix.model_copy(update={"taxonomy": "native"}), root)
    assert e.value.where == "data.mix" and e.value.found.startswith("own ")


def test_a_part_without_any_of_the_classes_is_refused(mix: Data, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(YAML.replace(", cityscapes: road", "").replace("name: car", "name: blimp"))
    with pytest.raises(ConfigError) as e:
        find(mix, mixed_root(mix, tmp_path / "links"))
    assert e.value.where == "data.taxonomy" and "own" in e.value.found


def test_a_missing_part_is_named(mix: Data, tmp_path: Path) -> None:
    part = mix.mix["cs"].model_copy(update={"root": tmp_path / "nowhere"})
    with pytest.raises(DataError) as e:
        mixed_root(mix.model_copy(update={"mix": {**mix.mix, "cs": part}}), tmp_path / "links")
    assert "data.mix.cs.root" in e.value.todo


def test_findings_name_the_part(mix: Data, tmp_path: Path) -> None:
    next((tmp_path / "cs/gtFine/train").rglob("*_labelIds.png")).unlink()
    (tmp_path / "mine/masks/20.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        ingested(mix, tmp_path)
    assert "cs/leftImg8bit/train/" in str(caught.value) and "own/masks/20.png" in str(caught.value)


def test_a_changed_file_of_any_part_changes_the_source_digest(mix: Data, tmp_path: Path) -> None:
    root = mixed_root(mix, tmp_path / "links")
    before = source_digest(mix, root)
    assert source_digest(mix, root) == before
    write(tmp_path / "mine/masks/21.png", regions(((0, 200, 0), (200, 0, 0), (10, 20, 30)), 99))
    assert source_digest(mix, root) != before


def test_one_source_in_the_common_taxonomy(mix: Data, tmp_path: Path) -> None:
    data = Data(source="folder", labels=tmp_path / "mine.yaml", root=tmp_path / "mine", taxonomy="cityscapes")
    found = find(data, tmp_path / "mine")
    assert found.label_set.names == CITYSCAPES.names
    assert found.forms[""].id_to_train[[1, 2, 3]].tolist() == [ROAD, CAR, 255]


def test_placeholder_labels_of_the_official_test_split_do_not_refuse_a_mix(mix: Data, tmp_path: Path) -> None:
    write(tmp_path / "cs/leftImg8bit/test/bonn/bonn_000000_000001_leftImg8bit.png", image(50))
    placeholder = regions((0, 1, 3), 50)
    write(tmp_path / "cs/gtFine/test/bonn/bonn_000000_000001_gtFine_labelIds.png", placeholder)
    manifest, _ = ingested(mix, tmp_path)
    assert len(manifest.split("test")) == 1
