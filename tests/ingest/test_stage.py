import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg import town
from roadseg.config.sections import Data, Town
from roadseg.data.manifest import Manifest
from roadseg.errors import ConfigError, DataError
from roadseg.images.decode import encode_label_png
from roadseg.ingest.stage import ingest, prepare, source_digest
from tests.ingest.images import write


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(coarse, (64, 32), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def mask(ids: int) -> bytes:
    return encode_label_png(np.repeat((np.arange(64) % ids).astype(np.uint8)[None], 32, 0))


@pytest.fixture
def root(tmp_path) -> Path:
    names = {"train": ["A_1", "A_2", "B_1"], "val": ["C_1"], "test": ["D_1"]}
    seed = 0
    for split, inner in names.items():
        for name in inner:
            write(tmp_path / "data" / split / f"{name}.png", picture(seed))
            write(tmp_path / "data" / f"{split}annot" / f"{name}.png", mask(12))
            seed += 1
    return tmp_path / "data"


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def camvid(**options: object) -> Data:
    return Data(source="camvid", workers=1, **options)  # type: ignore[arg-type]


def test_output_is_complete_deterministic_and_free_of_paths(root, work, tmp_path):
    manifest = ingest(camvid(), root, work)
    assert Manifest.load(work) == manifest and manifest.splits == ("test", "train", "val")
    assert sorted(p.name for p in work.iterdir()) == ["dataset.json", "findings.json", "log", "manifest.jsonl"]
    assert json.loads((work / "findings.json").read_text()) == []
    shutil.copytree(root, tmp_path / "moved")
    shutil.rmtree(root)
    (tmp_path / "again").mkdir()
    assert ingest(camvid(), tmp_path / "moved", tmp_path / "again").fingerprint("val") == manifest.fingerprint("val")
    for path in (p for p in work.rglob("*") if p.is_file()):
        data = path.read_bytes()
        assert data == (tmp_path / "again" / path.relative_to(work)).read_bytes() and str(tmp_path).encode() not in data


def test_held_out_sequences_become_a_split(root, work):
    manifest = ingest(camvid(holdout_sequences=("A",)), root, work)
    assert [s.name for s in manifest.split("holdout")] == ["A_1", "A_2"]
    assert [s.name for s in manifest.split("train")] == ["B_1"]
    with pytest.raises(DataError) as e:
        ingest(camvid(holdout_sequences=("A", "E")), root, work)
    assert e.value.where == "data.holdout_sequences" and "A, B" in e.value.expected
    with pytest.raises(DataError) as e:
        ingest(camvid(holdout_sequences=("A", "B")), root, work)
    assert e.value.where == "data.holdout_sequences"


def test_only_splits_reads_no_others(root, work):
    write(root / "train/A_1.png", b"")
    assert ingest(camvid(), root, work, ("val",)).splits == ("val",)
    shutil.rmtree(root / "train")
    assert ingest(camvid(holdout_sequences=("A",)), root, work, ("test", "val")).splits == ("test", "val")
    with pytest.raises(DataError) as e:
        ingest(camvid(), root, work, ("train",))
    assert e.value.where == str(root) and "test, val" in e.value.expected


def test_only_the_held_out_split(root, work):
    assert ingest(camvid(holdout_sequences=("A",)), root, work, ("holdout",)).splits == ("holdout",)


def test_errors_leave_only_findings_and_report(root, work):
    write(root / "train/A_1.png", b"")
    write(root / "valannot/C_1.png", mask(20))
    with pytest.raises(DataError) as caught:
        ingest(camvid(), root, work)
    assert "2 errors" in caught.value.found
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in work.iterdir()) == ["findings.json", "log"]
    found = json.loads((work / "findings.json").read_text())
    assert [(f["code"], f["severity"], f["count"]) for f in found] == [
        ("unreadable-image", "error", 1),
        ("unknown-id", "error", 1),
    ]


def test_the_report_is_copied_to_the_run_even_if_the_data_is_refused(root, work, tmp_path):
    ingest(camvid(), root, work, report_in=tmp_path)
    report = tmp_path / "data_report.html"
    assert report.read_bytes() == (work / "log" / "data_report.html").read_bytes()
    write(root / "train/A_1.png", b"")
    with pytest.raises(DataError) as e:
        ingest(camvid(), root, work, report_in=tmp_path)
    assert str(report) in e.value.found
    assert "unreadable-image" in report.read_text()


def test_codes_are_allowed_and_forbidden(root, work):
    write(root / "train/A_1.png", b"")
    assert len(ingest(camvid(allow=("unreadable-image",)), root, work).split("train")) == 2
    write(root / "train/A_1.png", (root / "train/A_2.png").read_bytes())
    with pytest.raises(DataError) as e:
        ingest(camvid(forbid=("duplicate-in-split",)), root, work)
    assert "duplicate-in-split" in e.value.found
    with pytest.raises(ConfigError) as e:
        ingest(camvid(allow=("duplicate",)), root, work)
    assert "'duplicate'" in e.value.found


def test_only_cityscapes_can_be_downloaded(root, work):
    with pytest.raises(ConfigError) as e:
        prepare(camvid(download=True, root=root), work)
    assert "camvid" in e.value.found


def test_warnings_are_logged_once_and_do_not_stop(root, work, caplog):
    write(root / "train/A_2.png", (root / "train/A_1.png").read_bytes())
    write(root / "valannot/C_1.png", mask(9))
    with caplog.at_level(logging.WARNING):
        assert len(ingest(camvid(), root, work).samples) == 5
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["class-missing", "duplicate-in-split"]
    assert "train/A_1.png = train/A_2.png" in caplog.text


def test_source_digest_covers_every_change_but_not_the_location(root, tmp_path):
    data = camvid()
    first = source_digest(data, root)
    assert source_digest(data, root) == first
    shutil.copytree(root, tmp_path / "moved")  # keeps modification times
    assert source_digest(data, tmp_path / "moved") == first
    measured = {first}
    os.utime(root / "valannot/C_1.png", ns=(0, 7))
    measured.add(source_digest(data, root))
    write(root / "train/A_1.png", b"")
    measured.add(source_digest(data, root))
    write(root / "train/unpaired.png", b"")
    measured.add(source_digest(data, root))
    (root / "test/D_1.png").rename(root / "test/D_2.png")
    measured.add(source_digest(data, root))
    assert len(measured) == 5
    write(root / "train.txt", b"not read")
    assert source_digest(data, root) in measured
    with pytest.raises(DataError) as e:
        source_digest(data, root / "nowhere")
    assert e.value.where == str(root / "nowhere")


def test_folder_source(root, work, tmp_path):
    description = tmp_path / "labels.yaml"
    classes = "\n".join(f"  - {{id: {i}, name: c{i}}}" for i in range(11))
    splits = "splits: {train: {images: train, labels: trainannot}, val: {images: val, labels: valannot}}"
    description.write_text(f"classes:\n{classes}\nignore: [11]\n{splits}\n")
    data = Data(source="folder", labels=description, workers=1)
    manifest = ingest(data, root, work)
    assert manifest.splits == ("train", "val") and manifest.label_set.names == tuple(f"c{i}" for i in range(11))
    first = source_digest(data, root)
    description.write_text(description.read_text() + "sequence: '^.'\n")
    assert source_digest(data, root) != first
    description.write_text("classes: 3")
    with pytest.raises(ConfigError) as e:
        ingest(data, root, work)
    assert e.value.where == str(description)


@pytest.fixture
def rendered(monkeypatch) -> list[dict[str, int]]:
    """Replace the renderer by eight cheap frames and record its calls."""
    asked: list[dict[str, int]] = []

    def write_tree(
        root: Path, splits: Mapping[str, int], seed: int, width_px: int, height_px: int, weather: str, workers: int,
        progress: Callable[[int], object] | None = None,
    ) -> None:  # fmt: skip
        asked.append(dict(splits))
        assert workers >= 1 and weather == "clear" and (width_px, height_px) == (64, 32)
        ids = encode_label_png(np.repeat((np.arange(64) % 34).astype(np.uint8)[None], 32, 0))
        for s, (split, count) in enumerate(splits.items()):
            for i in range(count):
                stem = f"{split}ville/{split}ville_{i:06d}_000019"
                write(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", picture(1000 * seed + 100 * s + i))
                write(root / f"gtFine/{split}/{stem}_gtFine_labelIds.png", ids)
                if progress:
                    progress(1)

    monkeypatch.setattr(town, "write_tree", write_tree, raising=False)
    return asked


def test_town_is_rendered_into_work_and_read_as_cityscapes(work, rendered, tmp_path):
    data = Data(town=Town(train=4, val=2, test=0, width_px=64, height_px=32), workers=1)
    manifest = ingest(data, work / "tree", work)
    assert rendered == [{"train": 4, "val": 2}]
    assert manifest.source == "town" and manifest.splits == ("train", "val")
    assert all((work / "tree" / s.image).is_file() for s in manifest.samples)
    assert "no third-party" in manifest.label_set.terms
    assert source_digest(data, work) == source_digest(data, tmp_path)


def test_one_split_of_the_town_is_the_same_as_in_the_whole_town(work, rendered):
    """If val were rendered alone, it would get the scenes of train."""
    data = Data(town=Town(train=4, val=2, test=1, width_px=64, height_px=32), workers=1)
    alone = ingest(data, work / "tree", work, ("val",))
    assert alone.splits == ("val",) and rendered == [{"train": 4, "val": 2, "test": 1}]
    assert alone.fingerprint("val") == ingest(data, work / "tree", work).fingerprint("val")


def test_real_camvid(work, real_data):
    root = real_data / "camvid"
    manifest = ingest(camvid(), root, work, ("train", "val"))
    assert (len(manifest.split("train")), len(manifest.split("val"))) == (367, 101)
    found = json.loads((work / "findings.json").read_text())
    assert {(f["code"], f["severity"], f["split"]) for f in found} == {
        ("same-sequence", "warning", "train and val"),
        ("near-duplicate-in-split", "warning", "train"),
        ("near-duplicate-in-split", "warning", "val"),
    }
    assert next(f["files"] for f in found if f["code"] == "same-sequence") == ["0016E5"]
    held = ingest(camvid(holdout_sequences=("0006R0",)), root, work, ("holdout",))
    assert len(held.split("holdout")) == 101


def test_real_cityscapes(work, real_data):
    manifest = ingest(Data(source="cityscapes", workers=1), real_data / "cityscapes-mini", work)
    assert (len(manifest.split("train")), len(manifest.split("val"))) == (3, 1)
    assert all((s.width, s.height) == (2048, 1024) and s.instances for s in manifest.samples)
    assert {f["code"] for f in json.loads((work / "findings.json").read_text())} == {"class-missing", "same-city"}


def test_dangling_links_and_all_images_broken_are_listed_with_a_report(root, work, tmp_path):
    for path in sorted((root / "train").iterdir()):
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    for path in [*(root / "val").iterdir(), *(root / "test").iterdir()]:
        write(path, b"")
    assert source_digest(camvid(), root)
    with pytest.raises(DataError) as e:
        ingest(camvid(), root, work, report_in=tmp_path)
    assert "unreadable-image" in e.value.found
    assert "unreadable-image" in (tmp_path / "data_report.html").read_text()


def test_if_no_pair_is_left_the_error_points_to_the_report(root, work, caplog):
    for path in root.glob("*annot/*"):
        write(path, b"")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as e:
        ingest(camvid(allow=("unreadable-label",)), root, work)
    assert e.value.where == str(root) and "data_report.html" in e.value.todo
    assert "unreadable-label" in caplog.text
