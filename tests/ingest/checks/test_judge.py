"""Every check finds its fault in an otherwise clean tree, and nothing in the clean one."""

import io
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from roadseg.data.manifest import Manifest
from roadseg.data.masks.form import MaskForm
from roadseg.errors import ConfigError
from roadseg.images.decode import Limits, encode_label_png
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.checks.judge import Checked, check, refusal
from roadseg.ingest.sources import camvid, cityscapes
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CAMVID, CITYSCAPES, LabelSet, in_cityscapes
from tests.ingest.images import HEIGHT, WIDTH, encode, scene, write


def stripes(ids: list[int]) -> np.ndarray:
    """uint8 [64, 96] with a vertical stripe per id."""
    return np.repeat(np.array(ids, np.uint8)[np.arange(WIDTH) * len(ids) // WIDTH][None], HEIGHT, 0)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A clean CamVid tree: three pairs in train, two in val, all 12 ids."""
    for seed, (split, name) in enumerate(
        [("train", "A_1"), ("train", "A_2"), ("train", "B_1"), ("val", "C_1"), ("val", "C_2")]
    ):
        write(tmp_path / split / f"{name}.png", encode(scene(seed)))
        write(tmp_path / f"{split}annot" / f"{name}.png", encode_label_png(stripes(list(range(12)))))
    return tmp_path


DEFAULT = Limits()


def checked(root: Path, limits: Limits = DEFAULT, label_set: LabelSet = CAMVID, **options: object) -> Checked:
    source = camvid if label_set is CAMVID else cityscapes
    pairs, found = source.pairs(root)
    unlabelled = () if label_set is CAMVID else {("test", "")}
    forms = {"": MaskForm("ids", label_set)}
    result = check(root, pairs, label_set, forms, limits, 1, unlabelled, **options)  # type: ignore[arg-type]
    return replace(result, findings=found + result.findings)


def findings_of(root: Path, limits: Limits = DEFAULT, label_set: LabelSet = CAMVID) -> list[Finding]:
    return checked(root, limits, label_set).findings


def only(root: Path, **options: object) -> Finding:
    findings = findings_of(root, **options)  # type: ignore[arg-type]
    assert len(findings) == 1, findings
    return findings[0]


def test_a_clean_tree_gives_samples_and_no_findings(tree):
    result = checked(tree)
    samples = result.samples
    assert result.findings == [] and result.near == [] and len(result.measured) == 5
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
        (encode(scene(9))[:-40], "the png is truncated"),
        (encode(scene(9))[:2000] + b"x" + encode(scene(9))[2001:], "checksum of its IDAT chunk is wrong"),
    ],
)
def test_an_unreadable_image(tree, data, says):
    write(tree / "train/A_2.png", data)
    f = only(tree)
    assert (f.code, f.severity, f.split, f.count) == ("unreadable-image", "error", "train", 1)
    assert f.files[0].startswith("train/A_2.png: ") and says in f.files[0]


def test_an_unreadable_label_a_missing_file_and_a_color_mask(tree):
    write(tree / "trainannot/A_1.png", b"")
    write(tree / "trainannot/B_1.png", encode(CAMVID.palette[stripes(list(range(11)))]))
    (tree / "trainannot/A_2.png").unlink()
    (tree / "trainannot/A_2.png").symlink_to("nowhere.png")
    colors, unreadable = findings_of(tree)
    assert (colors.code, colors.severity, colors.split, colors.count) == ("color-mask", "error", "train", 1)
    assert colors.files[0].startswith("trainannot/B_1.png: a mask of RGB") and "masks: colors" in colors.fix
    assert (unreadable.code, unreadable.severity, unreadable.split) == ("unreadable-label", "error", "train")
    assert [e.partition(": ")[2] for e in unreadable.files] == ["the file is empty", "No such file or directory"]


def test_images_over_the_limits(tree):
    write(tree / "val/C_1.png", encode(cv2.resize(scene(7), (400, 300))))
    f = only(tree, limits=Limits(max_pixels=10_000))
    assert f.code == "unreadable-image" and "400 x 300 = 120,000 pixels; expected at most 10,000" in f.files[0]
    f = only(tree, limits=Limits(max_bytes=(tree / "val/C_1.png").stat().st_size - 1))
    assert f.code == "unreadable-image" and "bytes" in f.files[0]


def test_size_of_image_and_label_differ(tree):
    write(tree / "trainannot/A_1.png", encode_label_png(stripes(list(range(12)))[:-1]))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("size-differs", "error", "train")
    assert f.files == ("train/A_1.png: 96x64, but trainannot/A_1.png 96x63",)


def sideways(image: np.ndarray) -> bytes:
    """Stored on its side, upright by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(out, "PNG", exif=exif)
    return out.getvalue()


def test_an_exif_rotated_image_is_compared_upright(tree):
    write(tree / "train/A_1.png", sideways(scene(8)))
    assert only(tree).code == "exif-rotated"


def test_a_label_of_an_exif_rotated_image_explains_its_size(tree):
    write(tree / "train/A_1.png", sideways(cv2.resize(scene(8), (HEIGHT, WIDTH))))
    write(tree / "val/C_1.png", encode(np.ascontiguousarray(np.rot90(scene(9)))))
    train, val = (f for f in findings_of(tree) if f.code == "size-differs")
    assert train.files == (
        "train/A_1.png: 64x96, but trainannot/A_1.png 96x64; "
        "the photograph is stored on its side, and upright by its EXIF orientation 6",
    )
    assert "turned as its EXIF data says" in train.fix
    assert val.files == ("val/C_1.png: 64x96, but valannot/C_1.png 96x64; a quarter turn apart",)


def test_unknown_ids_are_named_with_their_pixels(tree):
    label = stripes(list(range(12)))
    label[:2, :5] = 42
    label[5, 5] = 200
    write(tree / "valannot/C_2.png", encode_label_png(label))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("unknown-id", "error", "val")
    assert f.files == ("valannot/C_2.png: id 42 on 10 pixels, id 200 on 1 pixel",)
    assert "camvid has the ids 0..11" in f.fix


def test_instance_ids_as_labels_are_reported(tree):
    deep = stripes(list(range(12))).astype(np.uint16)
    deep[0, :7] = 8001
    write(tree / "valannot/C_2.png", encode(deep))
    f = only(tree)
    assert f.code == "instance-ids" and "not *_instanceIds" in f.fix
    assert f.files == ("valannot/C_2.png: ids 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1 more",)


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


def test_exact_copies_inside_and_across_splits_are_reported(tree):
    write(tree / "train/A_2.png", encode(scene(0)))
    write(tree / "val/C_2.png", encode(scene(2)))
    found = {f.code: (f.severity, f.split) for f in findings_of(tree)}
    assert found == {"duplicate-in-split": ("warning", "train"), "duplicate-across-splits": ("error", "train and val")}


def test_a_near_copy_across_splits_is_a_warning(tree):
    write(tree / "val/C_1.png", encode(np.clip(scene(1).astype(int) + 3, 0, 255).astype(np.uint8)))
    f = only(tree)
    assert (f.code, f.severity, f.split) == ("near-duplicate", "warning", "train and val")
    assert f.files[0].startswith("val/C_1.png ~ train/A_2.png: ")


def test_the_same_sequence_in_two_splits(tree):
    os.rename(tree / "val/C_1.png", tree / "val/A_9.png")
    os.rename(tree / "valannot/C_1.png", tree / "valannot/A_9.png")
    f = only(tree)
    assert (f.code, f.severity, f.split, f.files) == ("same-sequence", "warning", "train and val", ("A",))
    assert f.message == "1 sequence in both train and val (1 image of val)"


def exchange(a: Path, b: Path) -> None:
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


def test_image_and_label_swapped(tree):
    """One finding explains both files."""
    exchange(tree / "train/A_1.png", tree / "trainannot/A_1.png")
    f = only(tree)
    assert (f.code, f.severity) == ("swapped", "error") and f.message == "1 pair of train with image and label swapped"
    assert f.files[0].startswith("train/A_1.png: ") and "trainannot/A_1.png" in f.files[0]


def test_a_label_in_place_of_its_image(tree):
    write(tree / "train/A_1.png", (tree / "trainannot/A_1.png").read_bytes())
    result = checked(tree, allow={"same-file"})
    (f,) = (f for f in result.findings if f.code == "same-file")
    assert (f.files, f.message) == (("train/A_1.png = trainannot/A_1.png",), "1 image of train that is its own label")
    assert "A_1" not in names(result) and len(result.samples) == 4


def test_whole_folders_swapped(tree):
    for name in ("C_1", "C_2"):
        exchange(tree / f"val/{name}.png", tree / f"valannot/{name}.png")
    f = next(f for f in findings_of(tree) if f.severity == "error")
    assert f.message == "all 2 pairs of val with image and label swapped: the folders are" and "folders" in f.fix


def cityscapes_tree(root: Path, split: str, names: list[str], label: np.ndarray, first_seed: int = 0) -> None:
    for seed, name in enumerate(names, first_seed):
        city = name.partition("_")[0]
        write(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", encode(scene(seed)))
        write(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", encode_label_png(label))


ALL_CITYSCAPES = stripes(list(range(34)))


@pytest.mark.parametrize("void", [True, False])
def test_train_ids_in_place_of_label_ids(tmp_path, void):
    names = ["ulm_000000_000019", "ulm_000001_000019"]
    cityscapes_tree(tmp_path, "train", names, stripes([*range(19), *([255] if void else [])]))
    f = next(f for f in findings_of(tmp_path, label_set=CITYSCAPES) if f.severity == "error")
    assert (f.code, f.split, f.count) == ("train-ids", "train", 2)
    assert f.message == "all 2 labels of train hold only 0..18 and 255: they are train ids" and "_labelIds.png" in f.fix


def test_few_low_ids_are_not_train_ids(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019"], stripes([1, 3, 4, 7, 8, 11, 17]))
    assert {f.code for f in findings_of(tmp_path, label_set=CITYSCAPES)} == {"class-missing"}


def test_placeholder_labels_are_a_warning_in_test_only(tmp_path):
    placeholder = stripes([0, 1, 3])
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019"], ALL_CITYSCAPES)
    cityscapes_tree(tmp_path, "test", ["bonn_000000_000019"], placeholder, first_seed=5)
    f = only(tmp_path, label_set=CITYSCAPES)
    assert (f.code, f.severity, f.split) == ("no-labels", "warning", "test")
    cityscapes_tree(tmp_path, "val", ["kiel_000000_000019"], placeholder, first_seed=6)
    assert ("all-void", "error", "val") in [
        (f.code, f.severity, f.split) for f in findings_of(tmp_path, label_set=CITYSCAPES)
    ]


def test_instances_are_read_and_measured(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019", "ulm_000001_000019"], ALL_CITYSCAPES)
    ids = ALL_CITYSCAPES.astype(np.uint16) * 1000
    stem = "gtFine/train/ulm/ulm_00000{}_000019_gtFine_instanceIds.png"
    write(tmp_path / stem.format(0), encode(ids))
    write(tmp_path / stem.format(1), encode(ids))
    assert findings_of(tmp_path, label_set=CITYSCAPES) == []
    write(tmp_path / stem.format(0), encode(ids[1:]))
    write(tmp_path / stem.format(1), b"")
    found = {f.code: f.files for f in findings_of(tmp_path, label_set=CITYSCAPES)}
    assert set(found) == {"size-differs", "unreadable-instances"}
    assert found["size-differs"][0].startswith(stem.format(0) + ": 96x63, but ")


def test_a_city_in_two_splits(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019", "ulm_000001_000019"], ALL_CITYSCAPES)
    cityscapes_tree(tmp_path, "val", ["ulm_000002_000019", "bonn_000000_000019"], ALL_CITYSCAPES, first_seed=5)
    f = only(tmp_path, label_set=CITYSCAPES)
    assert (f.code, f.severity, f.split, f.files) == ("same-city", "warning", "train and val", ("ulm",))
    assert f.message == "1 city in both train and val (1 image of val)"
    cityscapes_tree(tmp_path, "val", ["ulm_000001_000020"], ALL_CITYSCAPES, first_seed=7)
    f = only(tmp_path, label_set=CITYSCAPES)
    assert (f.code, f.files) == ("same-sequence", ("ulm_000001",))  # more specific than same-city


def names(result: Checked) -> list[str]:
    return [s.name for s in result.samples]


def test_an_allowed_error_leaves_out_its_data(tree):
    write(tree / "train/A_1.png", b"")
    write(tree / "trainannot/A_2.png", encode_label_png(stripes([11])))
    write(tree / "valannot/C_1.png", encode_label_png(stripes([*range(12), 200])))
    write(tree / "valannot/C_2.png", encode_label_png(stripes([11])))
    codes = {"unreadable-image", "all-void", "unknown-id"}
    assert {f.code for f in findings_of(tree) if f.severity == "error"} == codes
    result = checked(tree, allow=codes)
    assert {f.code: f.severity for f in result.findings if f.code in codes} == dict.fromkeys(codes, "warning")
    assert names(result) == ["B_1", "C_1", "C_2"]  # without the void label of train
    with_unknown = result.samples[1]
    assert with_unknown.histogram[-1] == sum((stripes([*range(12), 200]) > 10).ravel().tolist())
    assert Manifest("test", CAMVID, result.samples).histogram("val") == tuple(
        a + b for a, b in zip(with_unknown.histogram, result.samples[2].histogram, strict=True)
    )


def test_a_pair_with_wrong_values_is_left_out(tree):
    write(tree / "trainannot/A_1.png", encode_label_png(stripes([0, 255])))
    write(tree / "trainannot/A_2.png", encode_label_png(stripes([*range(11), 255])))
    result = checked(tree, allow={"binary-mask", "undeclared-void"})
    assert [(f.code, f.severity) for f in result.findings] == [
        ("binary-mask", "warning"),
        ("undeclared-void", "warning"),
    ]
    assert names(result) == ["A_2", "B_1", "C_1", "C_2"]


def test_a_broken_instance_map_is_left_out_without_its_pair(tmp_path):
    cityscapes_tree(tmp_path, "train", ["ulm_000000_000019"], ALL_CITYSCAPES)
    stem = tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    write(stem, encode(ALL_CITYSCAPES[1:]))
    (sample,) = checked(tmp_path, label_set=CITYSCAPES, allow={"size-differs"}).samples
    assert sample.instances == ""


def test_a_forbidden_warning_is_an_error(tree):
    write(tree / "trainannot/A_2.png", encode_label_png(stripes([11, 3])))
    (f,) = checked(tree, forbid={"one-class"}).findings
    assert (f.code, f.severity) == ("one-class", "error")


def test_unknown_codes_are_refused_before_reading(tmp_path):
    pairs = [Pair("train", "a", "", "nowhere.png", "nowhere.png")]
    with pytest.raises(ConfigError) as e:
        check(tmp_path, pairs, CAMVID, {"": MaskForm("ids", CAMVID)}, Limits(), 1, allow={"unreadable-imge"})
    assert "unreadable-imge" in e.value.found


def test_parts_are_checked_with_their_own_masks(tree, tmp_path):
    """One part with CamVid ids, one with Cityscapes ids; the 19 classes of Cityscapes are learned."""
    forms = {part: MaskForm("ids", in_cityscapes(s)) for part, s in (("c", camvid.LABEL_SET), ("k", CITYSCAPES))}
    write(tmp_path / "k.png", encode(scene(40)))
    write(tmp_path / "k_ids.png", encode_label_png(ALL_CITYSCAPES))
    pairs = [replace(p, part="c") for p in camvid.pairs(tree)[0]]
    pairs.append(Pair("train", "k", "", "k.png", "k_ids.png", part="k"))
    result = check(tmp_path, pairs, CITYSCAPES, forms, Limits(), 1)
    assert {f.code for f in result.findings} == {"class-missing"}
    assert all(len(s.histogram) == 20 for s in result.samples) and len(result.samples) == 6
    write(tmp_path / "k_ids.png", encode_label_png(stripes([*range(19), 255])))
    f = next(f for f in check(tmp_path, pairs, CITYSCAPES, forms, Limits(), 1).findings if f.severity == "error")
    assert (f.code, f.message) == ("train-ids", "1 label of train of k holds only 0..18 and 255: they are train ids")


def test_all_errors_are_listed_in_one_message(tree):
    write(tree / "train/A_1.png", b"")
    write(tree / "val/C_2.png", encode(scene(2)))
    write(tree / "train/Z.png", encode(scene(30)))
    label = stripes(list(range(12)))
    label[0, 0] = 99
    write(tree / "valannot/C_1.png", encode_label_png(label))
    error = refusal(tree, findings_of(tree))
    assert error.exit_code == 3
    text = str(error)
    assert "4 errors in the data" in text
    for part in (
        "duplicate-across-splits: 1 image of val also in train, pixel for pixel the same\n"
        "      val/C_2.png = train/B_1.png",
        "missing-label: 1 image of train without a label\n      train/Z.png\n",
        "unknown-id: 1 label of val with ids that the label set lacks\n      valannot/C_1.png: id 99 on 1 pixel",
        "unreadable-image: 1 image of train that can't be read\n      train/A_1.png: the file is empty",
        "to repair: ",
    ):
        assert part in text
    many = replace(findings_of(tree)[0], files=tuple(f"{i}.png" for i in range(2000)), count=2000)
    assert "and 1,997 more" in str(refusal(tree, [many])) and len(str(refusal(tree, [many]))) < 1000
