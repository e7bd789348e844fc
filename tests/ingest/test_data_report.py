import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from roadseg.data.masks.form import MaskForm
from roadseg.images.decode import Limits, encode_label_png
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.checks.near_duplicates import NearPair
from roadseg.ingest.measure import INLINE_PAIRS, Task, measure_pairs, worker_pool
from roadseg.ingest.report.examples import example_groups, index, paths_of
from roadseg.ingest.report.page import render
from roadseg.ingest.report.thumbnails import SIDE_PX, ThumbnailFile, colorize, thumbnails
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CITYSCAPES
from tests.conftest import THREE
from tests.html_page import Page, assert_accessible, assert_inert

EVIL = "<img src=x onerror=alert(1)>"
FORMS = {"": MaskForm("ids", THREE)}
ROAD, SKY, CAR, VOID = 7, 23, 26, 0


def scene(number, width=64, height=32):
    """Sky above road, void at the right edge, and a car in every second frame."""
    image = np.random.default_rng(number).integers(0, 40, (height, width, 3), dtype=np.uint8) + np.uint8(20 * number)
    label = np.full((height, width), ROAD, np.uint8)
    label[: height // 4] = SKY
    label[:, -8:] = VOID
    if number % 2:
        label[-8:-4, 10:14] = CAR
    return image, label


def write(root, split, name, image, label):
    for folder, data in (
        (split, cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()),
        (f"{split}annot", encode_label_png(label)),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{name}.png").write_bytes(data)
    return Pair(split, name, f"drive{split}", f"{split}/{name}.png", f"{split}annot/{name}.png")


def see(root, pairs, forms=FORMS):
    return measure_pairs(root, pairs, forms, Limits(), 1)


@pytest.fixture
def tree(tmp_path):
    """Seven train frames and three val frames; one train frame has markup as its name."""
    names = [("train", f"t{i}" if i else EVIL, i) for i in range(7)] + [("val", f"v{i}", 8 + 2 * i) for i in range(2)]
    return tmp_path, [write(tmp_path, split, name, *scene(number)) for split, name, number in names]


def error(code="unknown-id", files=("trainannot/t1.png: id 99 on 3 pixels",), split="train", severity="error"):
    return Finding(code, severity, split, tuple(files), len(files), f"message of {code}", f"repair {code}")


def page_of(tree, findings=(), near=(), label_set=THREE, title="camvid"):
    root, pairs = tree
    return render(title, root, label_set, FORMS, see(root, pairs), findings, near)


def all_findings():
    return [
        error("same-sequence", ("drive1",), "train and val", "warning"),
        error(),
        error("missing-label", (f"train/{EVIL}.png", "train/nowhere.png")),
        error("duplicate-across-splits", ("val/v0.png = train/t2.png",), "train and val"),
    ]


def alike(a, b, similarity=0.99, exact=False):
    split = [p.partition("/")[0] for p in (a, b)]
    return NearPair(a, b, *split, "drive1", "drive2", exact, similarity)  # type: ignore[call-arg]


def everything(tree):
    return page_of(tree, all_findings(), [alike("train/t1.png", "train/t3.png"), alike("train/t2.png", "val/v0.png")])


def test_the_report_is_one_inert_accessible_page(tree):
    page = assert_inert(everything(tree))
    assert_accessible(page)
    for section in ("findings", "files", "splits", "sheets", "classes", "places", "looks", "alike"):
        assert section in {a.get("id") for a in page.named("section")}


def test_hostile_names_texts_and_classes_are_inert(tree):
    root, pairs = tree
    pairs = [replace(p, split=EVIL, sequence=EVIL) if p.split == "val" else p for p in pairs]
    classes = (replace(THREE.classes[0], name=EVIL), *THREE.classes[1:])
    findings = [Finding(EVIL, "error", EVIL, (f"train/{EVIL}.png: {EVIL}", EVIL), 2, EVIL, EVIL)]
    near = [NearPair("train/t1.png", f"{EVIL}.png", EVIL, EVIL, EVIL, EVIL, False, 0.9)]
    html = render(EVIL, root, replace(THREE, classes=classes), FORMS, see(root, pairs), findings, near)
    page = assert_inert(html)
    assert "<img src=x" not in html and page.text.count(EVIL) >= 20
    assert all(image["src"].startswith("data:image/") for image in page.named("img"))


def test_the_same_data_gives_the_same_bytes_in_any_order(tree):
    root, pairs = tree
    first = render("a", root, THREE, FORMS, see(root, pairs), all_findings(), [])
    assert first == render("a", root, THREE, FORMS, see(root, pairs[::-1]), all_findings()[::-1], [])


def test_the_report_says_refused_and_lists_errors_first(tree):
    text = Page(everything(tree)).text
    assert "Refused. 3 errors and 1 warning." in text
    html = everything(tree)
    rows = re.findall(r'<th scope="row"><span class="severity (\w+)">.*?<code[^>]*>([\w-]+)</code>', html)
    assert rows == [
        ("error", "duplicate-across-splits"),
        ("error", "missing-label"),
        ("error", "unknown-id"),
        ("warning", "same-sequence"),
    ]
    for f in all_findings():
        assert f.message in text and f.fix.capitalize() in text and all(e in text for e in f.files)


def test_the_report_says_fine_or_counts_warnings(tree):
    assert "Fine. Every check passed." in Page(page_of(tree)).text
    html = page_of(tree, [error("same-sequence", (), "", "warning")])
    assert "No errors. 1 warning" in Page(html).text and 'class="verdict promoted"' in html


def test_long_lists_are_folded_and_capped(tree):
    files = [f"train/gone{i:04}.txt: odd" for i in range(1234)]
    html = page_of(tree, [error("bad-name", files)])
    table = html[html.index('id="findings"') : html.index('id="splits"')]
    before, folded = table.split("<details>")
    assert "gone0002" in before and "gone0003" not in before and "1,231 more" in folded
    assert "gone0199" in folded and "gone0200" not in folded and "and 1,034 more, in findings.json" in folded


def test_counts_are_those_of_the_masks(tree):
    root, pairs = tree
    text = re.sub(r"(<[^>]*>|\s)+", " ", page_of(tree))
    labels = [cv2.imread(str(root / p.label), cv2.IMREAD_UNCHANGED) for p in pairs if p.split == "train"]
    for name, k in (("road", ROAD), ("sky", SKY), ("car", CAR)):
        share = sum((m == k).sum() for m in labels) / sum((m != VOID).sum() for m in labels)
        images = sum((m == k).any() for m in labels)
        digits = 1 if share >= 0.0995 else 2 if share >= 0.00995 else 3
        assert f"{name} {100 * share:.{digits}f}% {images}" in text
    assert "✖ missing" in text and text.count("✖ missing") == 1  # no car in val
    assert "train 7 0 1 64 × 32 png grey" in text and "2 of 3" not in text and "3 of 3" in text
    assert f"{100 * 7 / 8:.1f}% of all pixels" in text


def test_place_maps_show_where_a_class_is(tree):
    html = page_of(tree)
    part = html[html.index('id="places"') : html.index('id="looks"')]
    sky = re.search(r'aria-label="Where sky.*?</svg>', part)[0]
    assert re.findall(r"M(\d+) (\d+)h(\d+)v1", sky) == [("0", str(y), "28") for y in range(4)]
    assert re.findall(r"<span>(\d+%)</span>", part)[:2] == ["100%", "100%"]


def test_an_unreadable_file_is_a_gray_tile_with_the_reason(tree):
    root, pairs = tree
    (root / "train/t1.png").write_bytes(b"")
    (root / "trainannot/t2.png").write_bytes((root / "trainannot/t2.png").read_bytes()[:40])
    measured = see(root, pairs)
    findings = [
        error("unreadable-image", ("train/t1.png: the file is empty",)),
        error("unreadable-label", ("trainannot/t2.png: the png is truncated",)),
    ]
    html = render("a", root, THREE, FORMS, measured, findings, [])
    gaps = re.findall(r'<span class="gap"[^>]*>(.*?)</span>', html)
    assert len(gaps) == 2 and "empty" in gaps[0] and gaps[0].startswith("image") and gaps[1].startswith("label")
    for path in [p for pair in pairs for p in (pair.image, pair.label)]:
        (root / path).unlink()
    gone = render("a", root, THREE, FORMS, measured, findings, [alike("train/t3.png", "val/v0.png")])
    assert gone.count("No such file") > 20 and Page(gone).named("img") == []


def test_data_without_pairs_still_makes_a_report(tmp_path):
    page = assert_inert(render("a", tmp_path, THREE, FORMS, [], [error("empty-split", ())], []))
    assert "Refused. 1 error and 0 warnings" in page.text and "repair empty-split".capitalize() in page.text
    assert {a["href"] for a in page.named("a")} == {"#findings"}


def test_every_image_broken_still_makes_a_report(tree):
    root, pairs = tree
    for p in pairs:
        (root / p.image).write_bytes(b"\x89PNG broken")
        (root / p.label).write_bytes(b"")
    page = assert_inert(render("a", root, THREE, FORMS, see(root, pairs), [error()], []))
    assert "0 of 3" in page.text and "unreadable" in page.text and "NaN" not in page.text


def test_worker_processes_make_the_same_thumbnails(tree):
    root, pairs = tree
    (root / "train/t2.png").write_bytes(b"broken")
    wanted = [w for p in pairs for w in (ThumbnailFile(p.image), ThumbnailFile(p.label, p.part))] + [
        ThumbnailFile("gone.png")
    ]
    here = thumbnails(root, wanted, FORMS, THREE.palette, Limits())
    with worker_pool(Task(root, FORMS, Limits(), 3), INLINE_PAIRS, 2) as pool:
        assert pool is not None and thumbnails(root, wanted, FORMS, THREE.palette, Limits(), pool) == here
    assert list(here) == wanted and [bool(t.reason) for t in here.values()].count(True) == 2


def test_a_color_mask_among_id_masks_is_shown_as_stored(tree):
    root, pairs = tree
    colours = np.zeros((32, 64, 3), np.uint8)
    colours[:, :32] = (0, 0, 250)  # BGR: red
    cv2.imwrite(str(root / "trainannot/t1.png"), colours)
    examples = thumbnails(root, [ThumbnailFile("trainannot/t1.png", "")], FORMS, THREE.palette, Limits())
    (one,) = examples.values()
    small = cv2.imdecode(np.frombuffer(one.picture, np.uint8), cv2.IMREAD_COLOR)
    assert "RGB" in one.reason and small[10, 10, 2] > 200 > 60 > small[10, 50].max()


def test_near_pairs_are_shown_those_across_splits_first(tree):
    near = [alike("train/t1.png", f"train/t{i}.png", 1, True) for i in range(2, 7)] * 2
    near += [alike("train/t1.png", "val/v0.png", 0.97), alike("train/t2.png", "val/v1.png", 0.96)]
    html = page_of(tree, [], near)
    part = html[html.index('id="alike"') :]
    heads = [re.sub(r"<[^>]+>", "", h) for h in re.findall(r"<h4>(.*?)</h4>", part)]
    assert heads[:2] == ["train and val: 97.0% alike", "train and val: 96.0% alike"]
    assert heads[2:] == ["both in train: the same, pixel for pixel"] * 6
    assert re.findall(r'alt="image of ([^"]+)"', part)[:4] == ["t1", "v0", "t2", "v1"]


def test_extremes_show_the_darkest_with_their_codes(tree):
    html = page_of(tree, [error("too-dark", ("train/t4.png: mean luma 3",), "train", "warning")])
    part = html[html.index("<h4>Darkest</h4>") : html.index("<h4>Brightest</h4>")]
    assert re.findall(r'alt="image of ([^"]+)"', part)[0] == "t4"  # named by a finding, so shown before darker ones
    assert re.findall(r"<code>([\w-]+)</code>", part) == ["too-dark"]
    assert len(re.findall(r"<figure>", part)) == 4 and "&lt;img src=x" in part and "of t1" in part and "of v0" in part


@pytest.mark.parametrize("a, b", [("x/a.png", "y/b.png"), ("x/a = b.png", "x/a.png"), ("x/a: b ~ c.png", "x/a")])
def test_paths_are_parsed_from_entries_with_any_names(a, b):
    pair = Pair("train", "n", "", a, b)
    (known,) = unmeasured_pairs([pair])
    by_path = index([known])
    assert paths_of(a, by_path) == [a] == paths_of(f"{a}: odd = thing", by_path)
    assert paths_of(f"{a} = {b}", by_path)[0] == a
    assert paths_of(f"{a} ~ {b}: 3 bits differ", by_path)[0] == a
    assert paths_of(f"{a} (sequence x)", by_path) == [a]
    assert paths_of("x/other.png = x/other.jpg", by_path) == ["x/other.png", "x/other.jpg"]


def unmeasured_pairs(pairs):
    from roadseg.ingest.measure import MeasuredPair

    return [MeasuredPair(p, ()) for p in pairs]


def test_examples_of_findings():
    measured = unmeasured_pairs([Pair("train", f"n{i}", "", f"i{i}.png", f"l{i}.png") for i in range(30)])
    findings = [
        error("unknown-id", [f"l{i}.png: id 9" for i in range(20)]),
        error("contradicting-labels", ["i1.png = i2.png (sequences a and b)"]),
        error("missing-image", ["labels/x.png"]),
        error("one-class", [f"l{i}.png" for i in range(9)], severity="warning"),
        error("near-duplicate", ["i1.png ~ i2.png: 97 %"], severity="warning"),
        error("same-city", ["aachen"], severity="warning"),
    ]
    groups = {f.code: (frames, rest) for f, frames, rest in example_groups(findings, index(measured), FORMS)}
    assert list(groups) == ["unknown-id", "contradicting-labels", "missing-image", "one-class"]
    frames, rest = groups["unknown-id"]
    assert [f.name for f in frames] == [f"n{i}" for i in range(6)] and rest == 14 and frames[0].note == "id 9"
    assert [f.name for f in groups["contradicting-labels"][0]] == ["n1", "n2"]
    assert (groups["missing-image"][0][0].label_file, groups["missing-image"][0][0].image_file) == (
        ThumbnailFile("labels/x.png", ""),
        None,
    )
    assert len(groups["one-class"][0]) == 3 and groups["one-class"][1] == 6


def test_labels_are_colored_and_one_unknown_pixel_is_visible():
    ids = np.full((1024, 2048), ROAD, np.uint16)
    ids[:, 1024:] = VOID
    ids[300, 500] = 40_000
    small = colorize(ids, FORMS[""], THREE.palette)
    assert small.shape == (SIDE_PX // 2, SIDE_PX, 3) and small.dtype == np.uint8
    assert (small[-1, 10] == THREE.classes[0].color).all()
    assert set(np.unique(small[:, SIDE_PX // 2 + 2 :])) == {14, 74}
    stray = (small == (255, 230, 0)).all(axis=2)
    rows, columns = np.nonzero(stray)
    assert 4 <= stray.sum() <= 25
    assert abs(rows.mean() - 300 * 240 / 2048) < 2 and abs(columns.mean() - 500 * 240 / 2048) < 2


def test_thumbnails_fit_their_box_are_small_and_stay_below_the_root(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2000, 700, 3), dtype=np.uint8)
    pair = write(tmp_path / "data", "train", "tall", noise, np.zeros((2000, 700), np.uint8))
    (tmp_path / "secret.png").write_bytes((tmp_path / "data" / pair.image).read_bytes())
    wanted = [
        ThumbnailFile(pair.image),
        ThumbnailFile(pair.label, ""),
        ThumbnailFile("../secret.png"),
        ThumbnailFile(str(tmp_path / "secret.png")),
    ]
    examples = thumbnails(tmp_path / "data", wanted, FORMS, THREE.palette, Limits())
    for w in wanted[:2]:
        assert (examples[w].width, examples[w].height) == (84, 240) and 0 < len(examples[w].picture) < 14_000
    assert all(examples[w].picture == b"" and "outside" in examples[w].reason for w in wanted[2:])
    over = thumbnails(tmp_path / "data", wanted[:1], FORMS, THREE.palette, Limits(max_pixels=1000))
    assert over[wanted[0]].picture == b"" and "pixels" in over[wanted[0]].reason


def test_three_thousand_frames_stay_below_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    form = {"": MaskForm("ids", CITYSCAPES)}
    real = []
    for i in range(6):
        image = cv2.GaussianBlur(rng.integers(0, 256, (256, 512, 3), dtype=np.uint8), (0, 0), 1.2)  # busy
        label = cv2.resize(rng.integers(7, 34, (16, 32), dtype=np.uint8), (512, 256), interpolation=cv2.INTER_NEAREST)
        real.append(write(tmp_path, "train", f"frame{i}", image, label))
    measured = []
    for split in ("train", "val", "test"):
        for i, s in enumerate(see(tmp_path, real, form) * 170):
            path = f"{s.pair.image.rpartition('/')[2]}"
            pair = replace(s.pair, split=split, name=f"city/city_{i:06}_000019", sequence="")
            measured.append(replace(s, pair=replace(pair, image=f"train/{path}")))
    codes = ["unknown-id", "size-differs", "all-void", "unreadable-label", "missing-image", "one-class", "blurred"]
    findings = [
        error(code, [f"trainannot/frame{i % 6}.png: a reason of usual length, number {i}" for i in range(1000)], split)
        for code in codes
        for split in ("train", "val", "test")
    ]
    near = [alike(f"train/frame{i % 6}.png", f"val/frame{i % 5}.png") for i in range(50)]
    html = render("a", tmp_path, CITYSCAPES, form, measured, findings, near)
    assert 500_000 < len(html.encode()) < 3_000_000
    assert Page(html).balanced
