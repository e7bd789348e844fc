"""Measurements of a pair, each compared with an independent computation."""

import hashlib
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from roadseg.data.masks.form import MaskForm
from roadseg.images.decode import Limits, encode_jpeg, encode_label_png
from roadseg.ingest.count_ids import count_ids
from roadseg.ingest.measure import MAX_IDS, MeasuredPair, Task, measure_pair, measure_pairs
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CITYSCAPES, IGNORE, LabelClass, LabelSet
from tests.ingest.images import HEIGHT, WIDTH, encode, scene

THREE = LabelSet(
    "three",
    (
        LabelClass("void", 0, IGNORE, (0, 0, 0)),
        LabelClass("road", 7, 0, (128, 64, 128)),
        LabelClass("sky", 23, 1, (70, 130, 180)),
        LabelClass("car", 26, 2, (0, 0, 142)),
    ),
)
IDS, COLORS = MaskForm("ids", THREE), MaskForm("colors", THREE)
PAIR = Pair("train", "a", "s", "a.jpg", "a.png")


def mask(seed: int, ids: tuple[int, ...] = (0, 7, 23, 26)) -> np.ndarray:
    """uint8 [64, 96] of patches."""
    coarse = np.random.default_rng(seed).choice(np.array(ids, np.uint8), (8, 12))
    return np.kron(coarse, np.ones((8, 8), np.uint8))


def colored(ids: np.ndarray) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    for c in THREE.classes:
        table[c.id] = c.color
    return table[ids]


def measured(
    root: Path, image: bytes | None, label: bytes | None, form: MaskForm = IDS, classes: int = 3
) -> MeasuredPair:
    for path, data in ((PAIR.image, image), (PAIR.label, label)):
        (root / path).unlink(missing_ok=True)
        if data is not None:
            (root / path).write_bytes(data)
    return measure_pair(Task(root, {"": form}, Limits(), classes), PAIR)


@pytest.mark.parametrize(
    "ids",
    [
        mask(0),
        np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8),
        np.random.default_rng(0).integers(0, 40_000, (70, 90), dtype=np.uint16),
        mask(1).astype(np.uint16) * 1000,
        np.array([[7]], np.uint8),
        np.array([[3, 3, 3, 65_535]], np.uint16),
        np.repeat(mask(2)[:, ::-1], 3, 1)[:, 1:],
        np.kron(mask(3), np.ones((5, 5), np.uint8))[:-3, :-7],
        np.kron(mask(4), np.ones((5, 5), np.uint16))[:, 2:].astype(np.uint16) * 2000,
    ],
)
def test_id_counts_match_numpy(ids):
    values, pixels = np.unique(ids, return_counts=True)
    expected = sorted(zip(values.tolist(), pixels.tolist(), strict=True), key=lambda c: (-c[1], c[0]))
    assert count_ids(ids) == expected


def test_counts_beyond_what_float32_holds_are_exact():
    half = (1 << 24) + 1
    ids = np.tile(np.array([5, 9], np.uint8), half).reshape(2, -1)
    assert count_ids(ids) == [(5, half), (9, half)]


def test_measurements_of_a_pair(tmp_path):
    ids, exif = mask(0), Image.Exif()
    exif[0x0112] = 3
    image = encode(scene(0)[::-1, ::-1], "JPEG", quality=95, exif=exif)
    label = encode_label_png(ids)
    s = measured(tmp_path, image, label)
    assert s.problems == () and s.pair == PAIR
    assert (s.width, s.height, s.image_format, s.orientation, s.mask_mode) == (WIDTH, HEIGHT, "jpeg", 3, "grey")
    assert (s.image_bytes, s.label_bytes) == (len(image), len(label))
    assert s.image_sha256 == hashlib.sha256(image).hexdigest()
    assert s.label_sha256 == hashlib.sha256(label).hexdigest()
    pixels = {i: int((ids == i).sum()) for i in (0, 7, 23, 26)}
    assert s.histogram == (pixels[7], pixels[23], pixels[26], pixels[0])
    assert s.id_pixels == tuple(sorted(pixels.items(), key=lambda p: -p[1]))
    train = {0: IGNORE, 7: 0, 23: 1, 26: 2}
    # The centres of 16 x 32 cells of 4 x 3 pixels.
    assert s.places == bytes(train[int(ids[4 * y + 2, 3 * x + 1])] for y in range(16) for x in range(32))
    assert s.stats is not None and abs(s.stats.mean_rgb[0] - scene(0)[..., 0].mean()) < 3


def test_the_histogram_has_the_learned_classes(tmp_path):
    s = measured(tmp_path, encode(scene(0)), encode_label_png(mask(0)), classes=19)
    assert len(s.histogram) == 20 and sum(s.histogram) == WIDTH * HEIGHT and not any(s.histogram[3:19])
    gaps = replace(THREE, classes=tuple(replace(c, train_id=13) if c.name == "car" else c for c in THREE.classes))
    pair = [PAIR]
    assert len(measure_pairs(tmp_path, pair, {"": MaskForm("ids", gaps)}, Limits(), 1)[0].histogram) == 15


def test_colors_are_mapped_to_ids(tmp_path):
    ids = mask(0)
    s = measured(tmp_path, encode(scene(0)), encode(colored(ids)), COLORS)
    as_ids = measured(tmp_path, encode(scene(0)), encode_label_png(ids))
    assert s.problems == () and s.mask_mode == "rgb"
    assert (s.id_pixels, s.histogram, s.places) == (as_ids.id_pixels, as_ids.histogram, as_ids.places)


def test_unknown_ids_and_colors_are_reported_with_pixel_counts(tmp_path):
    ids = mask(0)
    ids[0, :5] = 99
    ids[1, :3] = 250
    [(code, path, what)] = measured(tmp_path, encode(scene(0)), encode_label_png(ids)).problems
    assert (code, path, what) == ("unknown-id", "a.png", "id 99 on 5 pixels, id 250 on 3 pixels")
    colors = colored(mask(0))
    colors[0, :5] = (1, 2, 3)
    colors[1, 0] = (255, 0, 16)
    s = measured(tmp_path, encode(scene(0)), encode(colors), COLORS)
    assert s.problems == (("unknown-color", "a.png", "#010203 on 5 pixels, #ff0010 on 1 pixel"),)
    assert sum(s.histogram) == WIDTH * HEIGHT


def test_at_most_max_ids_are_kept_of_a_noisy_label(tmp_path):
    noise = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) // 2
    s = measured(tmp_path, encode(scene(0)), cv2.imencode(".png", noise)[1].tobytes())
    assert s.mask_mode == "grey16" and len(s.id_pixels) == MAX_IDS and sum(s.histogram) == WIDTH * HEIGHT
    assert s.problems[0][2].endswith(" more ids")
    assert len(pickle.dumps(s)) < 10_000


@pytest.mark.parametrize("form", [IDS, COLORS], ids=["ids", "colors"])
def test_swapped_files(tmp_path, form):
    label = encode_label_png(mask(0)) if form is IDS else encode(colored(mask(0)))
    grey = encode(cv2.cvtColor(scene(0), cv2.COLOR_RGB2GRAY))
    for photo in (encode(scene(0)), encode_jpeg(scene(0)), grey):
        codes = [code for code, _, _ in measured(tmp_path, label, photo, form).problems]
        assert "swapped" in codes
    assert measured(tmp_path, encode(scene(0)), label, form).problems == ()


def test_unreadable_files_are_problems_and_the_rest_is_measured(tmp_path):
    image, label = encode(scene(0)), encode_label_png(mask(0))
    s = measured(tmp_path, image[:-20], label)
    assert s.problems == (("unreadable-image", "a.jpg", "the png is truncated; expected a whole file"),)
    assert (s.width, s.pixels_digest, s.stats) == (0, "", None) and sum(s.histogram) == WIDTH * HEIGHT
    s = measured(tmp_path, image, encode(scene(1)))
    assert [code for code, _, _ in s.problems] == ["unreadable-label"] and s.mask_mode == "rgb"
    assert (s.histogram, s.id_pixels, s.places) == ((), (), b"") and s.width == WIDTH
    s = measured(tmp_path, None, None)
    assert [(code, what) for code, _, what in s.problems] == [
        ("unreadable-image", "No such file or directory"),
        ("unreadable-label", "No such file or directory"),
    ]


def test_sizes_are_compared_with_the_label(tmp_path):
    instances = np.zeros((HEIGHT, WIDTH // 2), np.uint16)
    pair = replace(PAIR, instances="i.png")
    (tmp_path / "i.png").write_bytes(cv2.imencode(".png", instances)[1].tobytes())
    (tmp_path / pair.image).write_bytes(encode(scene(0)[:32]))
    (tmp_path / pair.label).write_bytes(encode_label_png(mask(0)))
    task = Task(tmp_path, {"": IDS}, Limits(), 3)
    assert measure_pair(task, pair).problems == (
        ("size-differs", "a.jpg", "96x32, but a.png 96x64"),
        ("size-differs", "i.png", "48x64, but a.png 96x64"),
    )
    (tmp_path / "i.png").write_bytes(b"")
    assert [code for code, _, _ in measure_pair(task, pair).problems] == ["unreadable-instances", "size-differs"]


def test_workers_give_the_same_results_in_order(tmp_path):
    pairs = []
    for i in range(19):
        pairs.append(Pair("train", str(i), "", f"{i}.png", f"{i}_label.png", part="ab"[i % 2]))
        (tmp_path / f"{i}.png").write_bytes(encode(scene(i)) if i != 5 else b"broken")
        ids = mask(i)
        (tmp_path / f"{i}_label.png").write_bytes(encode(colored(ids)) if i % 2 else encode_label_png(ids))
    forms = {"a": IDS, "b": COLORS}
    alone = measure_pairs(tmp_path, pairs, forms, Limits(), 1)
    assert [s.pair for s in alone] == pairs
    assert [s.pair.name for s in alone if s.problems] == ["5"]
    assert measure_pairs(tmp_path, pairs, forms, Limits(), 2) == alone


def test_workers_start_without_the_slow_imports_and_results_stay_small(tmp_path):
    script = "import sys, roadseg.ingest.measure; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "torchvision", "pydantic", "tyro", "jinja2"}.isdisjoint(done.stdout.split())
    cityscapes = mask(0, tuple(c.id for c in CITYSCAPES.classes if c.id >= 0))
    s = measured(tmp_path, encode(scene(0)), encode_label_png(cityscapes), MaskForm("ids", CITYSCAPES), 19)
    assert s.problems == () and len(pickle.dumps(s)) < 4096


def test_unknown_polygon_names_are_reported(tmp_path):
    def outline(label: str, left: int) -> dict[str, object]:
        return {"label": label, "polygon": [[left, 0], [left + 9, 0], [left + 9, 20], [left, 20]]}

    shapes = [outline("road", 0), outline("tram", 20), outline("tram", 40), outline("car", 60)]
    label = json.dumps({"imgWidth": WIDTH, "imgHeight": HEIGHT, "objects": shapes}).encode()
    s = measured(tmp_path, encode(scene(0)), label, MaskForm("polygons", THREE))
    assert s.problems == (("unknown-id", "a.png", "the class 'tram' of 2 shapes"),)
    assert s.mask_mode == "json" and s.histogram[0] == s.histogram[2] > 0 == s.histogram[1]
    assert s.label_sha256 == hashlib.sha256(label).hexdigest()


def test_each_image_uses_its_own_part_of_a_coco_file(tmp_path):
    square = [0.0, 0.0, 30.0, 0.0, 30.0, 20.0, 0.0, 20.0]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": 5, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "segmentation": [square], "iscrowd": 0, "area": 600}
        ],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "a.jpg").write_bytes(encode(scene(0)))
    task = Task(tmp_path, {"": MaskForm("coco", THREE)}, Limits(), 3)
    first, second = (measure_pair(task, replace(PAIR, label=f"all.json#{key}")) for key in (1, 2))
    assert first.problems == second.problems == ()
    assert first.histogram[2] >= 600 and second.histogram[:3] == (0, 0, 0)
    assert first.label_sha256 != second.label_sha256
