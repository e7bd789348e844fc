from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from tqdm import tqdm

from roadseg.errors import UsageError
from roadseg.labels import CITYSCAPES, IGNORE
from roadseg.town import WEATHERS, Frame, frame, render, write_tree
from roadseg.town.camera import Camera
from roadseg.town.scene import draw_scene
from roadseg.town.tree import places

IDS = {c.name: c.id for c in CITYSCAPES.classes}


def digest(f: Frame) -> str:
    parts = (f.image.tobytes(), f.label_ids.tobytes(), f.instance_ids.tobytes(), json.dumps(f.polygons).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [render(5, i, 256, 128) for i in range(12)]


def test_the_same_arguments_give_the_same_bytes_in_another_process_and_order() -> None:
    here = [hashlib.sha256(render(3, i, 160, 80).image.tobytes()).hexdigest() for i in (0, 1, 2)]
    script = (
        "import cv2, hashlib\n"
        "from roadseg.town import render\n"
        "cv2.setNumThreads(0)\n"
        "print(*[hashlib.sha256(render(3, i, 160, 80).image.tobytes()).hexdigest() for i in (2, 1, 0)])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == here[::-1]


def test_seed_and_index_both_change_the_frame() -> None:
    digests = {digest(render(s, i, 64, 32)) for s in (0, 1) for i in range(4)}
    assert len(digests) == 8


@pytest.mark.parametrize("size", [(192, 96), (201, 97), (64, 128), (33, 32), (1024, 512)])
def test_any_size_gives_arrays_of_that_size(size: tuple[int, int]) -> None:
    w, h = size
    f = render(1, 2, w, h)
    assert f.image.shape == (h, w, 3) and f.image.dtype == np.uint8
    assert f.label_ids.shape == (h, w) and f.label_ids.dtype == np.uint8
    assert f.instance_ids.shape == (h, w) and f.instance_ids.dtype == np.uint16


def test_the_scene_does_not_depend_on_the_size() -> None:
    small, large = render(2, 4, 256, 128), render(2, 4, 512, 256)
    assert np.mean(small.label_ids == large.label_ids[::2, ::2]) > 0.94


def test_unknown_weather_and_tiny_frames_are_refused() -> None:
    with pytest.raises(UsageError) as e:
        render(0, 0, 128, 64, "hail")  # type: ignore[arg-type]
    assert "hail" in e.value.found
    with pytest.raises(UsageError) as e:
        render(0, 0, 16, 128)
    assert "16x128" in e.value.found


def test_labels_are_known_and_nothing_is_left_unpainted(frames: list[Frame]) -> None:
    for f in frames:
        ids = set(np.unique(f.label_ids).tolist())
        assert ids <= CITYSCAPES.known_ids and 0 not in ids


def test_instances_follow_the_cityscapes_convention(frames: list[Frame]) -> None:
    has = np.zeros(256, bool)
    has[[c.id for c in CITYSCAPES.classes if c.has_instances]] = True
    several = 0
    for f in frames:
        of_things = has[f.label_ids]
        assert np.array_equal(f.instance_ids[of_things] // 1000, f.label_ids[of_things])
        assert np.array_equal(f.instance_ids[~of_things], f.label_ids[~of_things])
        several += len(np.unique(f.instance_ids[f.label_ids == IDS["car"]])) > 1
    assert several > 0


def test_all_classes_occur_in_any_twelve_frames_in_a_row() -> None:
    most = []
    for index in range(30):
        labels = CITYSCAPES.id_to_train[render(9, index, 128, 64).label_ids]
        most.append(np.bincount(labels[labels != IGNORE], minlength=19))
    for first in range(19):
        best = np.max(most[first : first + 12], axis=0)
        assert best.min() >= 30, f"frames {first}.. show too little of {CITYSCAPES.names[int(best.argmin())]}"


def test_some_pixels_are_void(frames: list[Frame]) -> None:
    seen = set(np.unique(np.stack([f.label_ids for f in frames])).tolist())
    assert IDS["ego vehicle"] in seen and seen & {IDS["static"], IDS["dynamic"]}


@pytest.mark.parametrize("weather", [w for w in WEATHERS if w != "clear"])
def test_weather_changes_the_image_and_not_the_labels(weather: str) -> None:
    for index in (0, 3):
        clear, other = render(4, index, 256, 128), render(4, index, 256, 128, weather)  # type: ignore[arg-type]
        assert np.array_equal(clear.label_ids, other.label_ids)
        assert np.array_equal(clear.instance_ids, other.instance_ids)
        assert clear.polygons == other.polygons
        assert np.abs(clear.image.astype(int) - other.image).mean() > 8
    if weather == "night":
        assert other.image.mean() < 0.7 * clear.image.mean()


def test_label_borders_lie_on_image_edges(frames: list[Frame]) -> None:
    """Labels and image agree worse when shifted by two pixels in any direction."""
    scores = {}
    for dx, dy in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)):
        total = 0.0
        for f in frames:
            grey = cv2.cvtColor(f.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            edges = np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1))
            edges /= edges.mean()
            borders = cv2.morphologyEx(f.label_ids, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
            total += float(edges[4:-4, 4:-4][np.roll(borders, (dy, dx), (0, 1))[4:-4, 4:-4]].mean())
        scores[dx, dy] = total
    best = scores.pop((0, 0))
    assert all(best > 1.2 * other for other in scores.values()), (best, scores)


def test_signs_have_an_edge_in_the_image_where_their_label_ends() -> None:
    """Within one pixel, since a sign's plate contrasts with nearly everything."""
    hits = []
    for index in range(8):
        f = render(6, index, 512, 256)
        grey = cv2.GaussianBlur(cv2.cvtColor(f.image, cv2.COLOR_RGB2GRAY), (3, 3), 0).astype(np.float32)
        edges = cv2.dilate(np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)), np.ones((3, 3)))
        mask = (f.label_ids == IDS["traffic sign"]).astype(np.uint8)
        border = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        if border.sum() > 100:
            hits.append(float((edges[border] > np.median(edges)).mean()))
    assert len(hits) >= 3 and np.mean(hits) > 0.8


def test_painting_the_polygons_in_order_gives_the_labels(frames: list[Frame]) -> None:
    for f in frames:
        painted = np.zeros_like(f.label_ids)
        for shape in f.polygons:
            assert set(shape) == {"label", "polygon"} and len(shape["polygon"]) >= 3
            cv2.fillPoly(painted, [np.array(shape["polygon"], np.int32)], IDS[shape["label"]])
        assert np.mean(painted == f.label_ids) > 0.97


@pytest.mark.parametrize("weather", ["clear", "night"])
def test_culling_does_not_change_the_frame(monkeypatch: pytest.MonkeyPatch, weather: str) -> None:
    culled = [render(3, i, 256, 128, weather) for i in range(10, 18)]  # type: ignore[arg-type]
    monkeypatch.setattr(frame, "visible", lambda camera, scene: list(scene.items))
    for index, f in enumerate(culled, 10):
        whole = render(3, index, 256, 128, weather)  # type: ignore[arg-type]
        assert np.array_equal(f.label_ids, whole.label_ids) and np.array_equal(f.image, whole.image)


def test_long_vehicles_hide_who_walks_behind_them() -> None:
    """A sidewalk item next to a tram is painted before it, although its center is nearer."""
    checked = 0
    for index in range(40):
        items = draw_scene(1, index).items
        order = {id(item): k for k, item in enumerate(items)}
        for tram in (i for i in items if i.kind == "train"):
            x0, x1, z0, z1 = tram.extent
            for item in (i for i in items if i.kind == "person" and z0 < i.along_m < z1):
                a, b = item.extent[:2]
                if (x0 > 0 and a > x1) or (x1 < 0 and b < x0):
                    assert order[id(item)] < order[id(tram)]
                    checked += 1
    assert checked > 0


def test_ground_homography_and_projection_agree() -> None:
    turned = np.array([[300.0, 5, 128], [4, -300, 64], [0.01, 0.02, 1]])
    camera = Camera(256, 128, 300.0, np.array([0.2, 1.5, 0.0]), turned)
    points = np.array([[1.0, 0, 9], [-4, 0, 20], [0.5, 0, 60]])
    uv, depth = camera.project(points)
    back = np.column_stack([uv, np.ones(3)]) @ camera.pixel_to_ground.T
    np.testing.assert_allclose(back[:, :2] / back[:, 2:], points[:, [0, 2]], rtol=1e-9)
    np.testing.assert_allclose(1 / back[:, 2], depth, rtol=1e-9)


def test_polygons_are_cut_at_the_near_plane() -> None:
    camera = Camera(100, 100, 100.0, np.zeros(3), np.array([[100.0, 0, 50], [0, -100, 50], [0, 0, 1]]))
    ahead = np.array([[-1.0, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]])
    np.testing.assert_allclose(camera.outline(ahead), [[0, 100], [100, 100], [100, 0], [0, 0]])
    across = np.array([[-1.0, -1, -3], [1, -1, -3], [1, -1, 5], [-1, -1, 5]])
    cut = camera.outline(across)
    np.testing.assert_allclose(sorted(cut[:, 1].tolist()), [70, 70, 250, 250])
    assert len(camera.outline(ahead - (0, 0, 9))) == 0


def tree_digests(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.*")}


def test_tree_is_the_official_layout_and_the_workers_do_not_matter(tmp_path: Path) -> None:
    splits = {"train": 5, "val": 4}
    for name, workers in (("one", 1), ("two", 2)):
        with tqdm(total=9, file=io.StringIO()) as bar:
            write_tree(tmp_path / name, splits, 7, 96, 48, "clear", workers, bar.update)
            assert bar.n == 9
    one = tree_digests(tmp_path / "one")
    assert one == tree_digests(tmp_path / "two")
    images = [n for n in one if n.startswith("leftImg8bit/")]
    assert len(images) == 9 and len(one) == 45
    for name in images:
        stem = name.removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png")
        split, town, rest = stem.split("/")
        parts = rest.split("_")
        assert split in splits and parts[0] == town and [len(p) for p in parts[1:]] == [6, 6]
        for ending in ("labelIds.png", "instanceIds.png", "color.png", "polygons.json"):
            assert f"gtFine/{stem}_gtFine_{ending}" in one


def test_tree_files_hold_the_frames(tmp_path: Path) -> None:
    write_tree(tmp_path, {"val": 1}, 7, 96, 48, "rain", workers=1)
    place = next(iter(places({"val": 1})))
    f = render(7, place.index, 96, 48, "rain")
    truth = str(tmp_path / "gtFine/val" / place.town / f"{place.stem}_gtFine_")
    photo = cv2.imread(str(tmp_path / "leftImg8bit/val" / place.town / f"{place.stem}_leftImg8bit.png"))
    assert np.array_equal(photo[..., ::-1], f.image)
    assert np.array_equal(cv2.imread(truth + "labelIds.png", cv2.IMREAD_UNCHANGED), f.label_ids)
    assert np.array_equal(cv2.imread(truth + "instanceIds.png", cv2.IMREAD_UNCHANGED), f.instance_ids)
    colour = cv2.imread(truth + "color.png")[..., ::-1]
    for c in CITYSCAPES.classes:
        assert (colour[f.label_ids == c.id] == c.color).all()
    outlines = json.loads(Path(truth + "polygons.json").read_text())
    assert outlines == {"imgHeight": 48, "imgWidth": 96, "objects": f.polygons}


def test_splits_share_neither_scenes_nor_towns() -> None:
    todo = list(places({"train": 40, "val": 15, "test": 15}))
    assert len({p.index for p in todo}) == len({p.stem for p in todo}) == 70
    towns: dict[str, set[str]] = {}
    for p in todo:
        towns.setdefault(p.split, set()).add(p.town)
    assert all(len(t) > 1 for t in towns.values())
    assert len(set.union(*towns.values())) == sum(len(t) for t in towns.values())
    smaller = list(places({"val": 5, "train": 7}))
    assert set(smaller) <= set(todo)
    hashes = {digest(render(2, p.index, 64, 32)) for p in todo}
    assert len(hashes) == 70


def test_invalid_splits_are_refused() -> None:
    with pytest.raises(UsageError) as e:
        list(places({"train": -1}))
    assert e.value.exit_code == 2
    with pytest.raises(UsageError) as e:
        list(places({str(n): 1 for n in range(9)}))
    assert e.value.exit_code == 2
