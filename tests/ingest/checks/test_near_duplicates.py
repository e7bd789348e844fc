"""Copies and near-copies are found and reported with split and sequence; other frames are not."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.ingest.checks import near_duplicates as module
from roadseg.ingest.checks.near_duplicates import NEAR, alike, duplicates, near_pairs
from roadseg.ingest.image_stats import ImageStats, image_stats
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources import camvid
from roadseg.ingest.sources.pairs import Pair
from roadseg.town import frame as town


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    """Twenty town frames of different scenes, uint8 [128, 256, 3]."""
    return [town.render(5, k, 256, 128).image for k in range(20)]


def measured(
    image: np.ndarray | ImageStats, path: str, sequence: str = "", digest: str = "", label: int = 7
) -> MeasuredPair:
    """A measured pair. digest: unique by default. label: the only id in the label."""
    stats = image if isinstance(image, ImageStats) else image_stats(image)
    split, _, name = path.partition("/")
    pair = Pair(split, name, sequence, path, f"{split}annot/{name}")
    histogram = tuple(int(k == label) * 100 for k in range(20))
    return MeasuredPair(
        pair, (), 256, 128, pixels_digest=digest or path, stats=stats, histogram=histogram, places=bytes([label] * 512)
    )


def by_code(findings):
    return {f.code: f for f in findings}


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)  # type: ignore[return-value]


def ahead(index: int, metres: float, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    draw = town.draw_camera  # type: ignore[attr-defined]

    def moved(*args):
        camera = draw(*args)
        return replace(camera, position=camera.position + np.array([0.0, 0.0, metres]))

    with monkeypatch.context() as patch:
        patch.setattr(town, "draw_camera", moved)
        return town.render(5, index, 256, 128).image


ALTERED = {
    "jpeg": lambda i: jpeg(i, 20),
    "half": lambda i: cv2.resize(i, (128, 64), interpolation=cv2.INTER_AREA),
    "double": lambda i: cv2.resize(i, (512, 256), interpolation=cv2.INTER_LINEAR),
    "brighter": lambda i: cv2.convertScaleAbs(i, alpha=1.2),
    "cropped": lambda i: np.ascontiguousarray(i[3:-3, 5:-5]),
    "cropped at one side": lambda i: np.ascontiguousarray(i[:-5, :-10]),
    "noisy": lambda i: np.clip(i + np.random.default_rng(0).normal(0, 6, i.shape), 0, 255).astype(np.uint8),
    "blurred": lambda i: cv2.GaussianBlur(i, (0, 0), 1.5),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_an_altered_copy_is_found_with_its_original(scenes, kind):
    train = [measured(i, f"train/{k:02}.png") for k, i in enumerate(scenes)]
    val = [measured(ALTERED[kind](i), f"val/{k:02}.png") for k, i in enumerate(scenes)]
    pairs = near_pairs(train + val)
    assert {(p.image_a, p.image_b) for p in pairs} == {(f"train/{k:02}.png", f"val/{k:02}.png") for k in range(20)}
    assert all(NEAR <= p.similarity <= 1 and not p.exact for p in pairs)


@pytest.mark.parametrize("metres,least", [(0.5, 20), (0.93, 19)])
def test_the_next_frames_of_a_drive_are_found(scenes, metres, least, monkeypatch):
    now = [measured(i, f"train/{k:02}.png", f"drive{k}") for k, i in enumerate(scenes)]
    then = [measured(ahead(k, metres, monkeypatch), f"train/{k:02}b.png", f"drive{k}") for k in range(20)]
    pairs = {(p.image_a, p.image_b) for p in near_pairs(now + then)}
    right = {(f"train/{k:02}.png", f"train/{k:02}b.png") for k in range(20)}
    assert len(pairs & right) >= least and not pairs - right


def test_different_scenes_are_not_near(scenes):
    assert near_pairs([measured(i, f"train/{k}.png") for k, i in enumerate(scenes)]) == []
    assert duplicates([measured(i, f"train/{k}.png") for k, i in enumerate(scenes)]) == []


def test_flat_images_match_nothing():
    black, white = np.zeros((64, 128, 3), np.uint8), np.full((64, 128, 3), 255, np.uint8)
    assert (
        near_pairs([measured(black, "train/a.png"), measured(black, "train/b.png"), measured(white, "val/c.png")]) == []
    )


def test_unreadable_frames_are_skipped(scenes):
    broken = MeasuredPair(Pair("val", "b", "", "val/b.png", "valannot/b.png"), ())
    assert duplicates([measured(scenes[0], "train/a.png"), broken, broken]) == []


def test_similarity_is_the_best_correlation_over_the_moves(scenes):
    small = [np.frombuffer(image_stats(i).descriptor, np.uint8).reshape(24, 48) for i in scenes[:6]]
    small[1] = np.frombuffer(image_stats(ALTERED["cropped"](scenes[0])).descriptor, np.uint8).reshape(24, 48)
    measured = {
        (a, b): s
        for i, j, similarity in alike(np.array(small), -2)
        for a, b, s in zip(i.tolist(), j.tolist(), similarity.tolist(), strict=True)
    }
    assert sorted(measured) == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    for (i, j), similarity in measured.items():
        moves = [(z, d) for z in (1, 1.05, 1 / 1.05) for d in (0, -0.02, 0.02)]
        best = max(correlation(moved(small[i], *move), moved(small[j], 1, 0)) for move in moves)
        assert similarity == pytest.approx(best, abs=0.01)


def moved(small: np.ndarray, zoom: float, shift: float) -> np.ndarray:
    """The image zoomed about (23.5, 10.8) and shifted (in widths), sampled bilinearly, at half its size."""
    y, x = np.mgrid[0:24, 0:48].astype(float)
    x, y = np.clip((x - 23.5 - 48 * shift) / zoom + 23.5, 0, 47), np.clip((y - 10.8) / zoom + 10.8, 0, 23)
    x0, y0 = np.minimum(x.astype(int), 46), np.minimum(y.astype(int), 22)
    u, v, p = x - x0, y - y0, small.astype(float)
    top, low = ((1 - u) * p[r, x0] + u * p[r, x0 + 1] for r in (y0, y0 + 1))
    return ((1 - v) * top + v * low).reshape(12, 2, 24, 2).mean(axis=(1, 3))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_block_size_does_not_change_the_result(scenes, monkeypatch):
    frames = [measured(i, f"train/{k:02}.png", f"s{k % 3}") for k, i in enumerate(scenes)]
    frames += [measured(jpeg(i, 50), f"val/{k:02}.png", f"s{k % 4}") for k, i in enumerate(scenes)]
    whole = near_pairs(frames)
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_AMONG", 5)
    assert near_pairs(frames) == whole and len(whole) == 20


def test_the_best_match_of_the_same_and_of_other_sequences_is_kept(scenes):
    image = scenes[0]
    frames = [
        measured(image, "train/a.png", "one"),
        measured(jpeg(image, 90), "train/b.png", "one"),
        measured(ALTERED["cropped"](image), "train/c.png", "one"),
        measured(jpeg(image, 30), "train/d.png", "two"),
    ]
    pairs = near_pairs(frames)
    assert [p.similarity for p in pairs] == sorted((p.similarity for p in pairs), reverse=True)
    found = {(p.image_a, p.image_b): p.same_sequence for p in pairs}
    assert found[("train/a.png", "train/b.png")] is True and found[("train/a.png", "train/d.png")] is False
    assert any("train/c.png" in pair and same_sequence for pair, same_sequence in found.items())


def test_the_earlier_split_comes_first(scenes):
    (pair,) = near_pairs([measured(scenes[0], "test/a.png", "x"), measured(jpeg(scenes[0], 50), "val/z.png", "y")])
    assert (pair.split_a, pair.image_a, pair.sequence_a) == ("val", "val/z.png", "y")
    assert (pair.split_b, pair.image_b, pair.sequence_b) == ("test", "test/a.png", "x")


def test_exact_copies_across_splits_are_an_error_not_near_duplicates(scenes):
    frames = [measured(scenes[0], "train/a.png", "one", "same"), measured(scenes[0], "val/b.png", "two", "same")]
    (finding,) = duplicates(frames)
    assert (finding.code, finding.severity, finding.split) == ("duplicate-across-splits", "error", "train and val")
    assert finding.files == ("val/b.png = train/a.png (sequences one and two)",)
    (pair,) = near_pairs(frames)
    assert pair.exact and pair.similarity == 1


def test_every_exact_copy_is_reported(scenes):
    frames = [measured(i, f"train/{k:02}.png", digest=str(k)) for k, i in enumerate(scenes)]
    frames += [measured(i, f"val/{k:02}.png", digest=str(k)) for k, i in enumerate(scenes)]
    found = by_code(duplicates(frames))
    assert found.keys() == {"duplicate-across-splits"} and found["duplicate-across-splits"].count == 20


def test_copies_in_a_split_with_one_label_and_with_two(scenes):
    frames = [
        measured(scenes[0], "train/a.png", digest="0", label=3),
        measured(scenes[0], "train/b.png", digest="0", label=3),
        measured(scenes[1], "train/c.png", digest="1", label=3),
        measured(scenes[1], "train/d.png", digest="1", label=4),
    ]
    found = by_code(duplicates(frames))
    assert found["duplicate-in-split"].files == ("train/a.png = train/b.png", "train/c.png = train/d.png")
    assert found["duplicate-in-split"].severity == "warning"
    wrong = found["contradicting-labels"]
    assert wrong.severity == "error" and wrong.count == 1
    assert wrong.files == ("train/c.png = train/d.png: trainannot/c.png, trainannot/d.png",)


def test_a_near_copy_across_splits_names_similarity_and_sequences(scenes):
    frames = [measured(i, f"train/{k}.png", "one") for k, i in enumerate(scenes)]
    (finding,) = duplicates([*frames, measured(jpeg(scenes[3], 50), "val/x.png", "two")])
    assert (finding.code, finding.severity, finding.split) == ("near-duplicate", "warning", "train and val")
    assert finding.files == ("val/x.png ~ train/3.png: 100 % alike (sequences two and one)",)
    assert finding.message == "1 image of val that looks almost like one of train"


def test_near_copies_in_a_split_list_other_sequences_first(scenes):
    frames = [measured(i, f"train/{k}.png", "one") for k, i in enumerate(scenes[:4])]
    frames += [measured(jpeg(scenes[k], 50), f"train/{k}b.png", "one") for k in (0, 1)]
    frames += [measured(jpeg(scenes[3], 50), "train/zz.png", "two")]
    (finding,) = duplicates(frames)
    assert (finding.code, finding.severity, finding.count) == ("near-duplicate-in-split", "warning", 6)
    assert finding.message == (
        "6 of 7 images of train look almost like another: "
        "4 only within their own sequence, 2 also like one of another"
    )  # fmt: skip
    other, own = finding.files
    assert other == "train/3.png ~ train/zz.png: 100 % alike (sequences one and two)"
    assert own.startswith("train/") and own.endswith("4 of the 6 images of one look almost like another of it")


def test_every_pair_is_listed_if_sequences_are_unknown(scenes):
    frames = [measured(i, f"train/{k}.png") for k, i in enumerate(scenes[:3])]
    frames += [measured(jpeg(i, 50), f"train/{k}b.png") for k, i in enumerate(scenes[:3])]
    (finding,) = duplicates(frames)
    assert len(finding.files) == 3 and "not known" in finding.message


def test_given_near_pairs_are_not_computed_again(scenes, monkeypatch):
    frames = [measured(scenes[0], "train/a.png"), measured(jpeg(scenes[0], 50), "val/b.png")]
    near = near_pairs(frames)
    monkeypatch.setattr(module, "alike", None)
    assert [f.code for f in duplicates(frames, near)] == ["near-duplicate"]


def test_camvid_neighbors_are_near_and_other_drives_are_not(real_data: Path):
    root = real_data / "camvid"
    pairs, _ = camvid.pairs(root)
    frames = [
        replace(measured(cv2.imread(str(root / p.image)), p.image), pair=p, pixels_digest=p.image)
        for p in pairs
        if p.split == "val" or not p.sequence.startswith("0016")
    ]
    found = near_pairs(frames)
    assert all(p.sequence_a == p.sequence_b for p in found)
    near_val = {i for p in found for i in (p.image_a, p.image_b) if p.split_a == "val"}
    assert len(near_val) == 101
