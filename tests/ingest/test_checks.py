"""A planted fault for every check, each in an otherwise clean tree, and none found in the clean one."""

import io
import os
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from roadseg.errors import RoadsegError
from roadseg.images import Limits, encode_jpeg, encode_label_png
from roadseg.ingest import camvid, cityscapes, reading
from roadseg.ingest.checks import check, refusal
from roadseg.ingest.duplicates import NEAR_BITS, nearest
from roadseg.ingest.findings import Finding
from roadseg.labels import CAMVID, CITYSCAPES, LabelSet
from roadseg.processes import start_worker

WIDTH, HEIGHT = 96, 64


def scene(seed: int) -> np.ndarray:
    """uint8 [64, 96, 3]: smooth noise, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def stripes(ids: list[int]) -> np.ndarray:
    """uint8 [64, 96] in which each id has its columns."""
    return np.repeat(np.array(ids, np.uint8)[np.arange(WIDTH) * len(ids) // WIDTH][None], HEIGHT, 0)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def tree(tmp_path) -> Path:
    """CamVid's form: three pairs in train, two in val, all 12 ids, nothing to find."""
    for seed, (split, name) in enumerate(
        [("train", "A_1"), ("train", "A_2"), ("train", "B_1"), ("val", "C_1"), ("val", "C_2")]
    ):
        write(tmp_path / split / f"{name}.png", png(scene(seed)))
        write(tmp_path / f"{split}annot" / f"{name}.png", encode_label_png(stripes(list(range(12)))))
    return tmp_path


DEFAULT = Limits()


def findings_of(root: Path, limits: Limits = DEFAULT, label_set: LabelSet = CAMVID) -> list[Finding]:
    source = camvid if label_set is CAMVID else cityscapes
    pairs, found = source.pairs(root)
    unlabelled = "" if label_set is CAMVID else "test"
    return found + check(root, pairs, label_set, limits, 1, unlabelled)[1]


def only(root: Path, **options: object) -> Finding:
    findings = findings_of(root, **options)  # type: ignore[arg-type]
    assert len(findings) == 1, findings
    return findings[0]


def test_a_clean_tree_gives_samples_and_no_findings(tree):
    pairs, found = camvid.pairs(tree)
    samples, findings = check(tree, pairs, CAMVID, Limits(), 1)
    assert found + findings == []
    assert [(s.split, s.name) for s in samples] == [
        ("train", "A_1"), ("train", "A_2"), ("train", "B_1"), ("val", "C_1"), ("val", "C_2"),
    ]  # fmt: skip
    first = samples[0]
    assert (first.width, first.height) == (WIDTH, HEIGHT)
    assert first.histogram == (8 * HEIGHT,) * 12
    assert first.image_bytes == (tree / "train/A_1.png").stat().st_size


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"hello", "the content is something else; expected PNG"),
        (png(scene(9))[:-40], "the png is truncated"),
        (png(scene(9))[:2000] + b"x" + png(scene(9))[2001:], "checksum of its IDAT chunk is wrong"),
    ],
)
def test_an_unreadable_image(tree, data, says):
    write(tree / "train/A_2.png", data)
    f = only(tree)
    assert (f.code, f.severity, f.split, f.count) == ("unreadable-image", "error", "train", 1)
    assert f.files[0].startswith("train/A_2.png: ") and says in f.files[0]


def test_an_unreadable_label_an_absent_file_and_a_mask_of_colours(tree):
    write(tree / "trainannot/A_1.png", b"")
    write(tree / "trainannot/B_1.png", png(CAMVID.palette[stripes(list(range(11)))]))
    (tree / "trainannot/A_2.png").unlink()
    (tree / "trainannot/A_2.png").symlink_to("nowhere.png")
    f = only(tree)
    assert (f.code, f.severity, f.split, f.count) == ("unreadable-label", "error", "train", 3)
    assert [e.partition(": ")[2].partition(";")[0] for e in f.files] == [
        "the file is empty", "No such file or directory", "a mask of RGB colours",
    ]  # fmt: skip


def test_images_over_the_limits(tree):
    write(tree / "val/C_1.png", png(cv2.resize(scene(7), (400, 300))))
    f = only(tree, limits=Limits(max_pixels=10_000))
    assert f.code == "unreadable-image" and "400 x 300 = 120,000 pixels; expected at most 10,000" in f.files[0]
    f = only(tree, limits=Limits(max_bytes=(tree / "val/C_1.png").stat().st_size - 1))
    assert f.code == "unreadable-image" and "bytes" in f.files[0]


def test_size_of_image_and_label_differ(tree):
    write(tree / "trainannot/A_1.png", encode_label_png(stripes(list(range(12)))[:-1]))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("size-differs", "error", "train")
    assert f.files == ("train/A_1.png: 96x64, but trainannot/A_1.png 96x63",)


def test_a_sideways_photograph_is_compared_upright(tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(scene(8)))).save(out, "PNG", exif=exif)
    write(tree / "train/A_1.png", out.getvalue())
    assert findings_of(tree) == []


def test_unknown_ids_are_named_with_their_pixels(tree):
    label = stripes(list(range(12)))
    label[:2, :5] = 42
    label[5, 5] = 200
    write(tree / "valannot/C_2.png", encode_label_png(label))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("unknown-id", "error", "val")
    assert f.files == ("valannot/C_2.png: id 42 on 10 pixels, id 200 on 1 pixel",)
    assert "camvid has the ids 0..11" in f.fix


def test_instance_ids_as_labels_are_told(tree):
    deep = stripes(list(range(12))).astype(np.uint16)
    deep[0, :7] = 8001
    write(tree / "valannot/C_2.png", png(deep))
    f = only(tree)
    assert f.files == ("valannot/C_2.png: id 8001 on 7 pixels",) and "instance ids" in f.fix


def test_void_and_single_class_labels(tree):
    write(tree / "trainannot/A_1.png", encode_label_png(stripes([11])))
    write(tree / "trainannot/A_2.png", encode_label_png(stripes([11, 3])))
    void, single = findings_of(tree)
    assert (void.code, void.severity, void.files) == ("all-void", "error", ("trainannot/A_1.png",))
    assert (single.code, single.severity, single.files) == ("one-class", "warning", ("trainannot/A_2.png",))


def test_a_class_missing_from_a_split(tree):
    for name in ("C_1", "C_2"):
        write(tree / f"valannot/{name}.png", encode_label_png(stripes([0, 1, 2, 3, 4, 5, 6, 7, 10])))
    f = only(tree)
    assert (f.code, f.severity, f.split, f.count) == ("class-missing", "warning", "val", 2)
    assert f.message == "val has no pixel of 2 of 11 classes: car, pedestrian"


def test_exact_copies_inside_and_across_splits_also_in_another_format(tree):
    out = io.BytesIO()
    Image.fromarray(scene(0)).save(out, "WEBP", lossless=True)
    write(tree / "train/A_2.png", out.getvalue())
    write(tree / "val/C_2.png", png(scene(2)))
    inside, across = findings_of(tree)
    assert (inside.code, inside.severity, inside.split) == ("duplicate-in-split", "warning", "train")
    assert inside.files == ("train/A_1.png = train/A_2.png",)
    assert (across.code, across.severity, across.split) == ("duplicate-across-splits", "error", "train and val")
    assert across.files == ("val/C_2.png = train/B_1.png",)


def variants(image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    decode = [cv2.imdecode(np.frombuffer(encode_jpeg(image, q), np.uint8), cv2.IMREAD_COLOR_RGB) for q in (30, 80)]
    brighter = np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8)
    noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    smaller = cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    return [*decode, brighter, noisy, smaller, image[2:-2, 2:-2]]


def test_near_copies_are_caught_and_other_scenes_are_not():
    rng = np.random.default_rng(0)
    originals = [cv2.resize(scene(i), (240, 160), interpolation=cv2.INTER_CUBIC) for i in range(60)]
    hashes = np.array([reading.look(o) for o in originals], np.uint64)
    copies = [(i, v) for i, o in enumerate(originals) for v in variants(o, rng)]
    near = nearest(np.array([reading.look(v) for _, v in copies], np.uint64), hashes)
    caught = [row == i and bits <= NEAR_BITS for (i, _), (row, bits) in zip(copies, near, strict=True)]
    assert np.mean(caught) >= 0.95
    among_others = [nearest(hashes[i : i + 1], np.delete(hashes, i, 0))[0][1] for i in range(60)]
    assert min(among_others) > NEAR_BITS


def test_nearest_agrees_with_counting_bits_one_by_one(monkeypatch):
    monkeypatch.setattr("roadseg.ingest.duplicates._BLOCK_PAIRS", 30)
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**64, (n, 4), dtype=np.uint64) for n in (11, 13))
    for query, (row, bits) in zip(a, nearest(a, b), strict=True):
        plain = [sum(bin(int(x) ^ int(y)).count("1") for x, y in zip(query, other, strict=True)) for other in b]
        assert (row, bits) == (int(np.argmin(plain)), min(plain))


def test_a_near_copy_across_splits_is_a_warning(tree):
    write(tree / "val/C_1.png", png(np.clip(scene(1).astype(int) + 3, 0, 255).astype(np.uint8)))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("near-duplicate", "warning", "train and val")
    assert f.files[0].startswith("val/C_1.png ~ train/A_2.png: ")


def test_the_same_sequence_in_two_splits(tree):
    os.rename(tree / "val/C_1.png", tree / "val/A_9.png")
    os.rename(tree / "valannot/C_1.png", tree / "valannot/A_9.png")
    f = only(tree)
    assert (f.code, f.severity, f.split, f.files) == ("same-sequence", "warning", "train and val", ("A",))
    assert f.message == "1 sequence in both train and val (1 image of val)"


def test_image_and_label_exchanged(tree):
    image, label = tree / "train/A_1.png", tree / "trainannot/A_1.png"
    image_bytes, label_bytes = image.read_bytes(), label.read_bytes()
    image.write_bytes(label_bytes)
    label.write_bytes(image_bytes)
    found = {f.code: f for f in findings_of(tree)}
    assert set(found) == {"swapped", "unreadable-label"}
    assert found["swapped"].files == ("train/A_1.png: holds only ids of classes, while trainannot/A_1.png is no label",)


def cityscapes_tree(root: Path, split: str, names: list[str], label: np.ndarray, first_seed: int = 0) -> None:
    for seed, name in enumerate(names, first_seed):
        city = name.partition("_")[0]
        write(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", png(scene(seed)))
        write(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", encode_label_png(label))


ALL_CITYSCAPES = stripes(list(range(34)))


@pytest.mark.parametrize("void", [True, False])
def test_train_ids_in_place_of_label_ids(tmp_path, void):
    names = ["ulm_000000_000019", "ulm_000001_000019"]
    cityscapes_tree(tmp_path, "train", names, stripes([*range(19), *([255] if void else [])]))
    f = next(f for f in findings_of(tmp_path, label_set=CITYSCAPES) if f.severity == "error")
    assert (f.code, f.split, f.count) == ("train-ids", "train", 2)
    assert f.message == "the labels of train hold only 0..18 and 255: they are train ids" and "_labelIds.png" in f.fix


def test_few_low_ids_are_no_train_ids(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019"], stripes([1, 3, 4, 7, 8, 11, 17]))
    assert {f.code for f in findings_of(tmp_path, label_set=CITYSCAPES)} == {"class-missing"}


def test_placeholder_labels_are_a_warning_in_test_only(tmp_path):
    placeholder = stripes([0, 1, 3])
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019"], ALL_CITYSCAPES)
    cityscapes_tree(tmp_path, "test", ["bonn_000000_000019"], placeholder, first_seed=5)
    f = only(tmp_path, label_set=CITYSCAPES)
    assert (f.code, f.severity, f.split) == ("all-void", "warning", "test")
    cityscapes_tree(tmp_path, "val", ["kiel_000000_000019"], placeholder, first_seed=6)
    assert ("all-void", "error", "val") in [
        (f.code, f.severity, f.split) for f in findings_of(tmp_path, label_set=CITYSCAPES)
    ]


def test_instances_are_read_and_measured(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019", "ulm_000001_000019"], ALL_CITYSCAPES)
    ids = ALL_CITYSCAPES.astype(np.uint16) * 1000
    stem = "gtFine/train/ulm/ulm_00000{}_000019_gtFine_instanceIds.png"
    write(tmp_path / stem.format(0), png(ids))
    write(tmp_path / stem.format(1), png(ids))
    assert findings_of(tmp_path, label_set=CITYSCAPES) == []
    write(tmp_path / stem.format(0), png(ids[1:]))
    write(tmp_path / stem.format(1), b"")
    found = {f.code: f.files for f in findings_of(tmp_path, label_set=CITYSCAPES)}
    assert set(found) == {"size-differs", "unreadable-instances"}
    assert found["size-differs"][0].startswith(stem.format(0) + ": 96x63, but ")


def test_all_faults_are_listed_in_one_error_in_plain_words(tree):
    write(tree / "train/A_1.png", b"")
    write(tree / "val/C_2.png", png(scene(2)))
    write(tree / "train/Z.png", png(scene(30)))
    label = stripes(list(range(12)))
    label[0, 0] = 99
    write(tree / "valannot/C_1.png", encode_label_png(label))
    error = refusal(tree, findings_of(tree))
    assert error.exit_code == 3
    text = str(error)
    assert "4 errors in the data" in text
    for said in (
        "duplicate-across-splits: 1 image of val also in train, pixel for pixel the same\n"
        "      val/C_2.png = train/B_1.png",
        "missing-label: 1 image of train without a label\n      train/Z.png\n",
        "unknown-id: 1 label of val with ids that the label set lacks\n      valannot/C_1.png: id 99 on 1 pixel",
        "unreadable-image: 1 image of train that can't be read\n      train/A_1.png: the file is empty",
        "to repair: ",
    ):
        assert said in text
    many = replace(findings_of(tree)[0], files=tuple(f"{i}.png" for i in range(2000)), count=2000)
    assert "and 1,997 more" in str(refusal(tree, [many])) and len(str(refusal(tree, [many]))) < 1000


def test_processes_give_what_one_process_gives(tmp_path):
    for seed in range(reading.INLINE_PAIRS + 4):
        write(tmp_path / f"train/s{seed % 3}_{seed:02d}.png", png(scene(seed)) if seed != 7 else b"")
        write(tmp_path / f"trainannot/s{seed % 3}_{seed:02d}.png", encode_label_png(stripes([seed % 12, 3, 5])))
    pairs, _ = camvid.pairs(tmp_path)
    one = reading.read_all(tmp_path, pairs, CAMVID, Limits(), 1)
    assert reading.read_all(tmp_path, pairs, CAMVID, Limits(), 2) == one
    assert [s.pair for s in one] == pairs and [s.problems != () for s in one].count(True) == 1


def die(pair: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
def test_a_worker_that_dies_is_one_clear_error():
    with pytest.raises(RoadsegError, match="a process that checks images died.*lower data.workers"):
        list(reading._in_processes(die, [None] * 20, 2))  # type: ignore[arg-type,list-item]


def stand_by(ready: object) -> None:
    start_worker()
    ready.set()  # type: ignore[attr-defined]
    signal.pause()


def have_a_child(child_pid: object, ready: object) -> None:
    child = get_context("spawn").Process(target=stand_by, args=(ready,))
    child.start()
    child_pid.value = child.pid  # type: ignore[attr-defined]
    ready.wait(60)  # type: ignore[attr-defined]
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
def test_workers_end_with_a_killed_parent():
    spawn = get_context("spawn")
    child_pid, ready = spawn.Value("i", 0), spawn.Event()
    parent = spawn.Process(target=have_a_child, args=(child_pid, ready))
    parent.start()
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    deadline = 100
    while Path(f"/proc/{child_pid.value}/stat").exists() and deadline:
        if Path(f"/proc/{child_pid.value}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        deadline -= 1
        signal.sigtimedwait([], 0.1)
    assert deadline, "the worker outlived its parent by ten seconds"
