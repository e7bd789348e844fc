"""Copies are found by their pixels, and only possible copies are decoded twice."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.data.masks.form import MaskForm
from roadseg.images.decode import Limits, encode_label_png, read_image
from roadseg.ingest.checks import exact_copies as copies
from roadseg.ingest.checks.exact_copies import with_pixel_digests
from roadseg.ingest.checks.near_duplicates import near_pairs
from roadseg.ingest.measure import MeasuredPair, Task, measure_all, measure_pair, worker_pool
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CITYSCAPES
from tests.ingest.images import HEIGHT, WIDTH, encode, scene


def measured_files(root: Path, files: dict[str, bytes]) -> tuple[Task, list[MeasuredPair]]:
    (root / "label.png").write_bytes(encode_label_png(np.full((HEIGHT, WIDTH), 7, np.uint8)))
    for name, data in files.items():
        (root / name).write_bytes(data)
    task = Task(root, {"": MaskForm("ids", CITYSCAPES)}, Limits(), 19)
    return task, [measure_pair(task, Pair("train", name, "", name, "label.png")) for name in files]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files decoded a second time."""
    data: list[bytes] = []
    monkeypatch.setattr(copies, "read_image", lambda d, limits: data.append(d) or read_image(d, limits))
    return data


def test_equal_pixels_in_any_format_have_equal_digests(tmp_path, decoded):
    changed = scene(0)
    changed[HEIGHT // 2, WIDTH // 2, 1] ^= 1
    files = {
        "a.png": encode(scene(0)),
        "b.webp": encode(scene(0), "WEBP", lossless=True),
        "c.bmp": encode(scene(0), "BMP"),
        "d.png": encode(scene(0), compress_level=1),
        "e.png": encode(scene(0)),
        "one-bit.png": encode(changed),
        "other.png": encode(scene(1)),
        "turned.png": encode(scene(0).reshape(WIDTH, HEIGHT, 3)),
        "broken.png": encode(scene(0))[:-20],
    }
    task, measured = measured_files(tmp_path, files)
    digests = {s.pair.image: s.pixels_digest for s in with_pixel_digests(tmp_path, task.limits, measured, None)}
    assert len({digests[name] for name in ("a.png", "b.webp", "c.bmp", "d.png", "e.png")}) == 1
    assert len({digests[name] for name in ("a.png", "one-bit.png", "other.png", "turned.png")}) == 4
    assert digests["broken.png"] == ""
    assert decoded.count(files["a.png"]) == 1 and files["other.png"] not in decoded


def test_similar_images_have_different_digests(tmp_path, decoded):
    """Change a pixel in a row that the statistics of a large image do not sample."""
    image = cv2.resize(scene(0), (2048, 1024))
    changed = image.copy()
    changed[501, 700] ^= 255
    task, measured = measured_files(tmp_path, {"a.png": encode(image), "b.png": encode(changed)})
    assert measured[0].stats == measured[1].stats
    a, b = (s.pixels_digest for s in with_pixel_digests(tmp_path, task.limits, measured, None))
    assert a != b and len(decoded) == 2


def test_equal_files_are_not_decoded_again(tmp_path, decoded):
    task, measured = measured_files(
        tmp_path, {"a.png": encode(scene(0)), "b.png": encode(scene(0)), "c.png": encode(scene(1))}
    )
    assert with_pixel_digests(tmp_path, task.limits, measured, None) == measured and not decoded
    assert [(p.image_a, p.image_b) for p in near_pairs(measured) if p.exact] == [("a.png", "b.png")]


def test_a_deleted_file_is_no_copy(tmp_path):
    task, measured = measured_files(tmp_path, {"a.png": encode(scene(0)), "b.bmp": encode(scene(0), "BMP")})
    (tmp_path / "b.bmp").unlink()
    a, b = with_pixel_digests(tmp_path, task.limits, measured, None)
    assert a.pixels_digest != b.pixels_digest


def test_workers_compute_the_same_digests(tmp_path):
    files = {f"{i}.{end}": encode(scene(i), form) for i in range(9) for end, form in (("png", "PNG"), ("bmp", "BMP"))}
    task, measured = measured_files(tmp_path, files)
    alone = with_pixel_digests(tmp_path, task.limits, measured, None)
    assert len({s.pixels_digest for s in alone}) == 9
    with worker_pool(task, len(measured), 2) as pool:
        assert pool is not None and measure_all(task, [s.pair for s in measured], pool) == measured
        assert with_pixel_digests(tmp_path, task.limits, measured, pool) == alone
