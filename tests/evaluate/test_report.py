import json
import re

import cv2
import numpy as np
import pytest

from roadseg.errors import UsageError
from roadseg.evaluate.report import Scene, panels, render, scene
from roadseg.labels import CAMVID, CITYSCAPES, IGNORE
from roadseg.metrics.iou import scores
from roadseg.report.page import percent, picture
from tests.html_page import Page, assert_accessible, assert_inert

HOSTILE = "<img src=x onerror=alert(1)>\"'&</title><script>alert(1)</script>"


def evaluation(label_set=CITYSCAPES, absent=16, seed=0):
    k = label_set.num_classes
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3000, (k, k)) + np.diag(rng.integers(10_000, 900_000, k))
    if absent is not None:
        table[absent] = 0
    return {
        "schema_version": 1,
        "release": "ab12" * 16,
        "runtime": "onnxruntime",
        "source": "town",
        "split": "val",
        "images": 40,
        "data_fingerprint": "cd34" * 16,
        **scores(table, label_set),
        "confusion": table.tolist(),
        "classes": [{"name": c.name, "color": list(c.color), "train_frequency": 1 / k} for c in label_set.trained],
        "model": {"backbone": "mobilenetv2_100", "fusion": "dense", "parameters": 3_583_412},
    }


def history(steps=15_000):
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 1 / step, "learning_rate": 1e-3 * (1 - step / steps)})
        if step % 1000 == 0:
            rows.append({"step": step, "split": "val", "miou": step / 30_000, "pixel_accuracy": 0.9})
    return rows


def scenes(name, count=2):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    label, prediction = rng.integers(0, 19, (2, 24, 40), dtype=np.uint8)
    return [scene(f"{name}{i}", 0.5, image, label, prediction, CITYSCAPES.palette) for i in range(count)]


def decision(outcome="refused"):
    rows = [{"name": "road", "champion": 0.9, "candidate": 0.85, "gain": -0.05}]
    rows.append({"name": "train", "champion": None, "candidate": None, "gain": None})
    reason = "gains 0.1 points where 0.2 are asked for"
    figures = {"candidate": "ab12" * 16, "champion": "ef56" * 16, "miou_gain": 0.001, "min_gain": 0.002}
    return {"outcome": outcome, "reason": reason, "classes": rows, **figures}


def everything(name="town/val/a", title="roadseg"):
    other = {"train": {"images": 300, "miou": 0.7, "pixel_accuracy": 0.9, "class_iou": {"road": 0.99, "train": None}}}
    whole = {**evaluation(), "per_image": {"median": 0.61, "p10": 0.4}, "other_splits": other}
    sheet = picture(np.zeros((8, 8, 3), np.uint8))
    return render(whole, scenes(name), scenes(name), history(), sheet, decision(), title)


def test_is_one_balanced_page_that_loads_and_runs_nothing():
    assert_inert(everything())


def test_links_headings_and_pictures_are_accessible():
    page = Page(everything())
    assert_accessible(page)
    assert len(page.named("img")) == 4 * 4 + 1


def test_shows_the_figures():
    whole = evaluation()
    text = Page(render(whole, [], [])).text
    for shown in (percent(whole["miou"], 2), "3.58 M", "mean of 18 of 19 classes", whole["release"], "mobilenetv2_100"):
        assert shown in text
    for name, value in whole["class_iou"].items():
        assert name in text and (value is None or percent(value) in text)
    assert "absent, though predicted at" in text and "vehicle" in text
    matrix = np.array(whole["confusion"])
    assert f"road: {100 * matrix[0, 0] / matrix[0].sum():.2f}% ({matrix[0, 0]:,} pixels)" in text


def test_the_largest_confusion_comes_first():
    whole = evaluation()
    whole["confusion"][13][14] = 50_000_000
    html = render(whole, [], [])
    row = re.findall(r"<tr>.*?</tr>", html[html.index("The largest confusions") :], re.DOTALL)[1]
    assert re.findall(r"<bdi>(.*?)</bdi>", row) == ["car", "truck"]


@pytest.mark.parametrize("outcome", ["promoted", "refused", "unchanged"])
def test_the_decision_has_a_table_of_classes(outcome):
    html = render(evaluation(), [], [], decision=decision(outcome))
    text = Page(html).text
    assert f"{outcome.capitalize()}. gains 0.1 points" in text and f'class="verdict {outcome}"' in html
    assert "−5.00" in text and "+0.10 points" in text and "ef56" * 16 in text


def test_hostile_names_are_inert():
    whole = evaluation()
    whole["classes"][3]["name"] = HOSTILE
    whole["class_iou"][HOSTILE] = whole["class_iou"]["wall"]
    whole["category_iou"][HOSTILE] = 0.5
    whole |= {"source": HOSTILE, "split": HOSTILE, "runtime": HOSTILE, "release": HOSTILE}
    whole |= {"per_image": {HOSTILE: 0.5}, "other_splits": {HOSTILE: {"images": 1, "miou": 0.1}}}
    whole["model"] = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    rows = [{"step": s, "split": HOSTILE, "miou": 0.1} for s in (1, 2)]
    told = {**decision(), "outcome": HOSTILE, "reason": HOSTILE, "candidate": HOSTILE, "champion": HOSTILE}
    told["classes"][0]["name"] = HOSTILE
    html = render(whole, scenes(HOSTILE), scenes(HOSTILE), rows, None, told, HOSTILE)
    page = Page(html)
    assert page.balanced and not page.open and not page.named("script")
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.named("img"))
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert "<img src=x" not in html and page.text.count("<img src=x onerror=alert(1)>") >= 10


def test_undecodable_names_can_be_written():
    html = render(evaluation(), scenes(b"caf\xe9.png".decode("utf-8", "surrogateescape")), [])
    assert "caf?.png" in html and html.encode()


def test_the_same_input_gives_the_same_bytes():
    assert everything() == everything()


def test_whatever_is_missing_is_left_out():
    whole = evaluation(CAMVID, absent=None)
    for key in whole:
        page = Page(render({k: v for k, v in whole.items() if k != key}, [], []))
        assert page.balanced and not page.open, key
    bare = Page(render({}, [], []))
    assert bare.balanced and {a["href"] for a in bare.named("a")} == set() and "None" not in bare.text
    nothing = {**whole, "miou": None, "pixel_accuracy": float("nan"), "per_image": None, "other_splits": None}
    nothing |= {"class_iou": dict.fromkeys(whole["class_iou"]), "category_iou": {}, "model": None}
    nothing["confusion"] = np.zeros((11, 11), int).tolist()
    text = Page(render(nothing, [], [])).text
    assert "nan" not in text.lower().split() and "no pixel of it in the truth" in text
    assert "Category" not in text


def test_survives_a_round_trip_through_json_with_sorted_keys():
    whole = evaluation()
    names = re.findall(
        r'<tr><th scope="row">.*?<bdi>(.*?)</bdi>', render(json.loads(json.dumps(whole, sort_keys=True)), [], [])
    )
    assert names[:19] == list(CITYSCAPES.names)  # by train id, not by letter


def test_size_without_pictures_is_bounded():
    whole = {**evaluation(), "other_splits": {"train": evaluation(seed=1)}}
    assert len(render(whole, [], [], history(), None, decision()).encode()) < 200_000


def test_seventy_classes():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(70)]
    table = (rng.integers(0, 900, (70, 70)) + np.diag(rng.integers(0, 9000, 70))).tolist()
    classes = [{"name": n, "color": [i, 2 * i, 3 * i]} for i, n in enumerate(names)]
    html = render({"confusion": table, "classes": classes, "class_iou": dict.fromkeys(names, 0.5)}, [], [])
    assert Page(html).balanced and len(html) < 1_000_000
    assert html.count("<title>class ") == sum(n / sum(row) >= 0.0005 for row in table for n in row)


def test_long_histories_are_binned_by_mean():
    rows = [{"step": s, "loss": float(s % 2), "learning_rate": 0.1} for s in range(1, 14_001)]
    html = render({}, [], [], rows)
    raw, smooth = (drawn_line(html, f'class="line {kind}"') for kind in ("thin", 's0" stroke-dasharray="'))
    assert len(raw) < 300 and len({y for _, y in raw}) < 8  # around 0.5, no longer between 0 and 1
    assert len({y for _, y in smooth[5:]}) < 8 and len(smooth) == len(raw)
    assert "means of up to 47 steps" in html


def drawn_line(html, tag):
    """[(x, y)] of the first chart's longest line with this tag."""
    chart = html[html.index('<svg class="lines"') :].split("</svg>")[0]
    path = max(re.findall(rf'<path {tag} d="M([^"]*)"', chart), key=len)
    return [tuple(map(float, point.split(" "))) for point in path.split("L")]


def test_the_smoothed_loss_is_the_decaying_mean():
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, 100)
    rows = [{"step": s, "loss": float(v), "learning_rate": 0.1} for s, v in enumerate(losses, 1)]
    raw, smooth = (
        drawn_line(render({}, [], [], rows), f'class="line {k}"') for k in ("thin", 's0" stroke-dasharray="')
    )
    slope, start = np.polyfit([y for _, y in raw], losses, 1)  # pixels to values
    ages = np.arange(100)
    for at in (0, 1, 50, 99):
        weights = 0.5 ** (ages[: at + 1][::-1] / 4)  # a half-life of 4 % of the run
        assert slope * smooth[at][1] + start == pytest.approx(
            (weights * losses[: at + 1]).sum() / weights.sum(), abs=2e-3
        )


def timing(steps):
    return [{"step": s, "images_per_s": 40.0 + s / 100, "waiting_share": 0.02} for s in steps]


def test_speed_is_drawn_and_steps_taken_again_count_once():
    rows = timing([100, 200, 300]) + timing([150, 250])  # killed, and gone on with after 100
    html = render({}, [], [], timing=rows)
    assert "Images a second" in html and "Share of the time waiting for data" in html
    assert "Images a second goes from 41 at step 100 to 42.5 at step 250" in html
    assert len(drawn_line(html, 's0" stroke-dasharray="'.join(('class="line ', '"')))) == 3
    assert "Images a second" not in render({}, [], [], history(10))


def test_predictions_over_time_are_a_strip():
    shown = [(name, picture(np.zeros((8, 8, 3), np.uint8))) for name in ("Frame", "Truth", "Step 100", HOSTILE)]
    html = render({}, [], [], pictures=shown)
    assert_accessible(assert_inert(html.replace(HOSTILE, "")))
    page = Page(html)
    assert [image["alt"] for image in page.named("img")] == ["Frame", "Truth", "Step 100", HOSTILE]
    assert not page.named("script") and "Predictions over time" in page.text


def test_values_that_are_not_finite_draw_nothing():
    rows = [{"step": 1, "loss": float("nan"), "learning_rate": None}, {"step": 2, "split": "val", "miou": None}]
    assert "<h2>Training</h2>" not in render({}, [], [], rows)
    assert Page(render({}, [], [], [*rows, {"step": 3, "loss": 2.0, "learning_rate": 0.0}])).balanced  # type: ignore[list-item]


def test_other_pictures_are_refused():
    with pytest.raises(UsageError, match="JPEG or PNG"):
        render({}, [Scene("a", 0.1, b"<svg/>", b"", b"", b"")], [])


def test_png_pictures_are_shown_as_such():
    png = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
    assert render({}, [Scene("a", 0.1, png, png, png, png)], []).count('src="data:image/png;base64,') == 4


def test_panels():
    image = np.full((32, 64, 3), 200, np.uint8)
    label = np.zeros((32, 64), np.uint8)
    label[:, 32:] = IGNORE
    prediction = np.zeros_like(label)
    prediction[:16, :] = 13
    same, truth, overlay, error = panels(image, label, prediction, CITYSCAPES.palette)
    assert same is image and all(p.shape == image.shape and p.dtype == np.uint8 for p in (truth, overlay, error))
    assert (truth[:, :32] == CITYSCAPES.palette[0]).all()
    assert set(np.unique(truth[:, 32:])) == {14, 74} and (error[:, 32:] == truth[:, 32:]).all()  # hatched, no error
    assert (error[:16, :32] == (255, 68, 51)).all()
    assert (error[16:, :32] == 108).all()
    want = np.rint(0.35 * 200 + 0.65 * CITYSCAPES.palette[13].astype(float))
    assert np.abs(overlay[:16].astype(float) - want).max() <= 1
