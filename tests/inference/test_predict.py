"""Folders of odd and of hostile files through the tiny release, whose brightest channel wins."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from roadseg.errors import UsageError
from roadseg.images.decode import Limits, read_image
from roadseg.inference.predict import blend, predict
from roadseg.inference.predictor import Predictor
from roadseg.labels import IGNORE
from roadseg.release.archive import load_release
from tests.conftest import RGB


@pytest.fixture(scope="module")
def predictor(release_path: Path) -> Predictor:
    return Predictor(load_release(release_path), threads=1)


def photo(height: int, width: int) -> np.ndarray:
    """Red at the left, blue at the right, in blocks of 2 px so that the label is known."""
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[:, : width // 2, 0] = 220
    pixels[:, width // 2 :, 2] = 220
    return pixels


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def odd_images(folder: Path) -> list[Path]:
    whole = Image.fromarray(photo(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    grey16 = Image.fromarray(np.tile(np.linspace(0, 65535, 31, dtype=np.uint16), (20, 1)))
    return [
        save(folder / "plain.png", whole),
        save(folder / "odd.jpg", Image.fromarray(photo(37, 53)), quality=95),
        save(folder / "one.png", Image.fromarray(photo(1, 1))),
        save(folder / "line.png", Image.fromarray(photo(1, 99))),
        save(folder / "a" / "grey.png", whole.convert("L")),
        save(folder / "a" / "palette.png", whole.convert("P")),
        save(folder / "a" / "alpha.png", whole.convert("RGBA")),
        save(folder / "a" / "bits.png", whole.convert("1")),
        save(folder / "b" / "sixteen.png", grey16),
        save(folder / "b" / "cmyk.jpg", whole.convert("CMYK")),
        save(folder / "b" / "turned.jpg", whole, exif=exif),
        save(folder / "b" / "c" / "scan.tif", whole),
        save(folder / "b" / "c" / "web.webp", whole, lossless=True),
        save(folder / "b" / "c" / "windows.bmp", whole),
        save(folder / "UPPER.PNG", whole),
        save(folder / "name with spaces, ümlaut.png", whole),
    ]


def header_bomb() -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 400_000, 400_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))


def bad_images(folder: Path) -> dict[str, bytes]:
    """Written into `folder`, and given back by name."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    noise.save(png, "png")
    noise.save(jpeg, "jpeg")
    flipped = bytearray(png.getvalue())
    flipped[len(flipped) // 2] ^= 1
    files = {
        "cut.png": png.getvalue()[:-300],
        "half.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "flipped.png": bytes(flipped),
        "bomb.png": header_bomb(),
        "empty.png": b"",
        "text.png": b"not a picture",
        "page.jpg": b"<svg onload='x'>",
        "zip.webp": b"PK\x03\x04" + bytes(50),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def test_every_odd_image_gets_a_label_of_its_size_under_its_relative_path(predictor: Predictor, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    images = odd_images(folder)
    done = predict(predictor, [folder], out)
    assert done.failed == [] and len(done.written) == 2 * len(images)
    for path in images:
        stem = out / path.relative_to(folder).with_suffix("")
        with Image.open(f"{stem}_labelTrainIds.png") as label_file, Image.open(f"{stem}_overlay.jpg") as overlay:
            pixels, label = read_image(path), np.array(label_file)
            assert label_file.mode == "L" and overlay.size == label_file.size
        assert label.shape == pixels.shape[:2]
        assert np.array_equal(label, predictor(pixels))
    turned = np.array(Image.open(out / "b" / "turned_labelTrainIds.png"))
    assert turned.shape == (60, 40) and (turned[:25] == 0).all() and (turned[-25:] == 2).all()


def test_bad_files_are_named_and_skipped_and_the_others_done(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    bad = bad_images(folder)
    good = save(folder / "good.png", Image.fromarray(photo(8, 8)))
    done = predict(predictor, [folder], out)
    assert {path.name for path, _ in done.failed} == set(bad)
    for path, reason in done.failed:
        assert str(path) in reason and f"skipped {reason}" in caplog.text
    assert [p.name for p in done.written] == ["good_labelTrainIds.png", "good_overlay.jpg"]
    assert len(list(out.iterdir())) == 2 and good.exists()


def test_a_file_that_disappears_is_skipped(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "in" / "a.png", Image.fromarray(photo(8, 8)))
    monkeypatch.setattr("roadseg.inference.predict._refuse_clashes", lambda jobs: path.unlink())
    assert predict(predictor, [path], tmp_path / "out").failed == [
        (path, f"{path}: can't be read (No such file or directory)")
    ]


def test_label_ids_and_no_overlay(predictor: Predictor, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(photo(10, 20)))
    done = predict(predictor, [path], tmp_path / "out", ids="labelIds", overlay=False)
    assert done.written == [tmp_path / "out" / "x_labelIds.png"]
    label = np.array(Image.open(done.written[0]))
    assert set(np.unique(label)) == {7, 26} and np.array_equal(label, RGB.train_to_id[predictor(photo(10, 20))])


def test_limits_hold(predictor: Predictor, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(photo(20, 20)))
    for limits, said in ((Limits(max_pixels=399), "400 pixels"), (Limits(max_bytes=10), "at most 10")):
        done = predict(predictor, [path], tmp_path / "out", limits=limits)
        assert not done.written and said in done.failed[0][1]


def test_unusable_inputs_are_usage_errors(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = save(tmp_path / "a" / "x.png", Image.fromarray(photo(4, 4)))
    other = save(tmp_path / "b" / "x.jpg", Image.fromarray(photo(4, 4)))
    for inputs, said in (
        ([tmp_path / "absent"], "no such file or folder"),
        ([tmp_path / "empty"], "no image in this folder"),
        ([one, other], "would write the same file"),
        ([one, one], "would write the same file"),
    ):
        with pytest.raises(UsageError, match=said):
            predict(predictor, inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_of_an_earlier_run_are_not_inputs(predictor: Predictor, tmp_path: Path) -> None:
    save(tmp_path / "x.png", Image.fromarray(photo(4, 4)))
    first = predict(predictor, [tmp_path], tmp_path)
    again = predict(predictor, [tmp_path], tmp_path)
    assert again == first and len(list(tmp_path.iterdir())) == 3


def test_the_overlay_is_half_image_half_colour() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    label = np.array([[0, 1], [2, IGNORE]], np.uint8)
    assert blend(image, label, RGB)[..., 0].tolist() == [[150, 50], [50, 50]]
    assert np.array_equal(blend(image, label, RGB, opacity=0), image)
