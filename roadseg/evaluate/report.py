"""One offline HTML page from an Evaluation: figures, charts, scenes, the gate's decision.

The page holds everything it shows, runs no script and forbids itself to load anything (content security policy);
names and reasons reach it escaped. The same input gives the same bytes: no clock, no host, no random ids.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from roadseg.errors import UsageError
from roadseg.evaluate import charts
from roadseg.images import encode_jpeg
from roadseg.labels import IGNORE

_CURVE_POINTS = 300  # a training of any length draws this many points at most
_CONFUSIONS = 8


@dataclass(frozen=True)
class Scene:
    """A scored image for the report; the four pictures are JPEG or PNG bytes. `miou` is its own, in 0..1."""

    name: str
    miou: float
    image: bytes
    truth: bytes
    prediction: bytes
    error: bytes


def panels(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, palette: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a scene shows: image, truth, prediction over the image, errors; each uint8 [H, W, 3] RGB.

    image: uint8 [H, W, 3] RGB. label, prediction: uint8 [H, W] train ids, 255 void. palette: uint8 [256, 3] RGB.
    Void is hatched black in the truth and in the errors. Errors are red on the darkened grey image; void is none.
    """
    height, width = label.shape
    void = label == IGNORE
    rows, columns = np.ogrid[:height, :width]
    period = max(6, width // 48)  # survives the shrinking of a large image
    stripes = np.where((rows + columns) % period < period // 3, 74, 14).astype(np.uint8)[..., None]
    truth = np.where(void[..., None], stripes, palette[label])
    overlay = cv2.addWeighted(image, 0.35, np.ascontiguousarray(palette[prediction]), 0.65, 0)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    dim = (grey * 0.45 + 18).astype(np.uint8)
    error = np.repeat(dim[..., None], 3, axis=2)
    error[(label != prediction) & ~void] = (255, 68, 51)
    return image, truth, overlay, np.where(void[..., None], stripes, error)


def picture(image: np.ndarray, max_width: int = 640, quality: int = 85) -> bytes:
    """uint8 [H, W, 3] RGB as JPEG, shrunk to `max_width` pixels if wider; the same bytes for the same image."""
    height, width = image.shape[:2]
    if width > max_width:
        size = (max_width, max(1, round(height * max_width / width)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return encode_jpeg(image, quality)


def scene(
    name: str,
    miou: float,
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    palette: np.ndarray,
    max_width: int = 640,
) -> Scene:
    """`panels`, shrunk and encoded: about 150 kB at the default width."""
    return Scene(name, miou, *(picture(p, max_width) for p in panels(image, label, prediction, palette)))


def render(
    evaluation: Mapping[str, Any],
    best: Sequence[Scene],
    worst: Sequence[Scene],
    history: Sequence[Mapping[str, Any]] = (),
    contact_sheet: bytes | None = None,
    decision: Mapping[str, Any] | None = None,
    title: str = "roadseg",
) -> str:
    """The report as HTML.

    evaluation: the content of metrics.json; whatever is missing is left out of the page. history: a row
    {step, loss, learning_rate} for a training step and {step, split, miou, pixel_accuracy} for a validation.
    contact_sheet: JPEG or PNG bytes. decision: of the gate, {outcome, reason, candidate, champion, miou_gain,
    min_gain, classes}. Raises UsageError for pictures in another format.
    """
    classes = _classes(evaluation)
    text = (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            evaluation=evaluation,
            tiles=_tiles(evaluation),
            facts=_facts(evaluation),
            classes=classes,
            categories=[
                {"name": n, "iou": v, "bar": charts.bar(_finite(v))}
                for n, v in (evaluation.get("category_iou") or {}).items()
            ],
            per_image=_quantiles(evaluation.get("per_image") or {}),
            heat=_heat(evaluation, classes),
            confusions=_confusions(evaluation, classes),
            curves=_curves(history),
            groups=[(n, s) for n, s in (("Worst scenes", worst), ("Best scenes", best)) if s],
            splits=_splits(evaluation),
            contact_sheet=contact_sheet,
            decision=_decision(decision) if decision else None,
        )
    )
    # A file name may hold bytes that are no text (lone surrogates), which no UTF-8 file can carry.
    return text.encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points, "data_uri": data_uri}
    return environment


def percent(value: object, digits: int = 1) -> str:
    """0..1 as a percentage, or a dash for None and what is not finite."""
    number = _finite(value)
    return "–" if number is None else f"{100 * number:.{digits}f}%"


def points(value: object) -> str:
    """A difference of scores in 0..1 with its sign, in percentage points."""
    number = _finite(value)
    return "–" if number is None else f"{100 * number:+.2f}".replace("-", "−")


def data_uri(picture: bytes) -> Markup:
    kind = "jpeg" if picture[:3] == b"\xff\xd8\xff" else "png" if picture[:8] == b"\x89PNG\r\n\x1a\n" else None
    if kind is None:
        raise UsageError(f"a picture for the report that begins with {picture[:8]!r}", expected="JPEG or PNG bytes")
    return Markup(f"data:image/{kind};base64,{base64.b64encode(picture).decode()}")


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: object) -> str:
    """1234 as 1,234; from a million on with three digits and M or G."""
    number = _finite(value)
    if number is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,.0f}"


def _tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the key figures."""
    iou = evaluation.get("class_iou") or {}
    present = sum(v is not None for v in iou.values())
    model = evaluation.get("model") or {}
    pixels = _finite(evaluation.get("pixels"))
    tiles = [
        ("mIoU", percent(evaluation.get("miou"), 2), f"mean of {present} of {len(iou)} classes" if iou else ""),
        ("Pixel accuracy", percent(evaluation.get("pixel_accuracy"), 2), "of all valid pixels"),
        ("Mean accuracy", percent(evaluation.get("mean_accuracy"), 2), "mean recall of the classes"),
        ("Images", _count(evaluation.get("images")), f"{_count(pixels)} valid pixels" if pixels is not None else ""),
    ]
    if "parameters" in model:
        tiles.append(("Parameters", _count(model["parameters"]), "of the network that ships"))
    return tiles


def _facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what was scored and on what."""
    names = {
        "release": "Release",
        "data_fingerprint": "Data fingerprint",
        "source": "Source",
        "split": "Split",
        "runtime": "Runtime",
        "schema_version": "Schema version",
    }
    rows = [(text, _written(evaluation[key])) for key, text in names.items() if evaluation.get(key) is not None]
    model = evaluation.get("model") or {}
    return rows + [
        (k.replace("_", " ").capitalize(), f"{v:,}" if k == "parameters" and isinstance(v, int) else _written(v))
        for k, v in model.items()
    ]


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _quantiles(per_image: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the mIoU of single images; the quantiles stand under "miou" or at the top."""
    quantiles = per_image.get("miou", per_image)
    if not isinstance(quantiles, Mapping):
        return []
    return [(k.replace("_", " "), percent(v)) for k, v in quantiles.items() if _finite(v) is not None]


def _classes(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a class, by train id; class_iou alone is enough, then by its order."""
    iou = evaluation.get("class_iou") or {}
    accuracy = evaluation.get("class_accuracy") or {}
    predicted = evaluation.get("absent_predicted") or {}
    rows = []
    for i, c in enumerate(evaluation.get("classes") or [{"name": n} for n in iou]):
        value, recall = _finite(iou.get(c["name"])), _finite(accuracy.get(c["name"]))
        rows.append(
            {
                "id": i,
                "name": str(c["name"]),
                "color": _css_color(c.get("color")),
                "iou": value,
                "accuracy": recall,
                "share": _finite(c.get("train_frequency")),
                "bar": charts.bar(value, recall),
                "predicted": _count(predicted.get(c["name"], 0)),
            }
        )
    return rows


def _css_color(rgb: Sequence[int] | None) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(min(255, max(0, int(v))) for v in rgb)) if rgb else "#8a8f98"


def _heat(evaluation: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> Markup | None:
    counts = evaluation.get("confusion")
    if not counts or len(counts) != len(classes):
        return None
    return charts.heat_map(counts, [c["name"] for c in classes], [c["color"] for c in classes])


def _confusions(evaluation: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest cells off the diagonal: what most of the wrong pixels are."""
    counts = evaluation.get("confusion") or []
    if len(counts) != len(classes):
        return []
    cells = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    wrong = sum(n for n, _, _ in cells)
    cells.sort(key=lambda c: (-c[0], c[1], c[2]))
    return [
        {"truth": classes[i], "predicted": classes[j], "of_wrong": n / wrong, "of_class": n / sum(counts[i])}
        for n, i, j in cells[:_CONFUSIONS]
    ]


def _curves(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """(caption, chart) of loss, validation scores and learning rate, as far as the history has them."""
    steps = sorted((r for r in history if "loss" in r and "split" not in r), key=lambda r: r["step"])
    checks = sorted((r for r in history if "split" in r), key=lambda r: r["step"])
    loss, rate = _binned(steps, "loss"), _binned(steps, "learning_rate")
    scores = []
    for key, text in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        for split in sorted({str(r["split"]) for r in checks}):
            rows = [(r["step"], r[key]) for r in checks if str(r["split"]) == split and _finite(r.get(key)) is not None]
            scores.append(charts.Line(f"{split} {text}", rows, marked=len(rows) <= 40))
    mean = f", means of up to {math.ceil(len(steps) / _CURVE_POINTS)} steps" if len(steps) > _CURVE_POINTS else ""
    drawn = [
        (f"Training loss{mean}", _one_line("Training loss", loss)),
        (
            "Validation during training",
            charts.lines(scores, label=_spoken("Validation", scores), x_label="step", percent=True),
        ),
        ("Learning rate", _one_line("Learning rate", rate)),
    ]
    return [(caption, chart) for caption, chart in drawn if chart]


def _one_line(name: str, rows: list[tuple[float, float]]) -> Markup:
    line = charts.Line(name, rows)
    return charts.lines([line], label=_spoken(name, [line]), x_label="step")


def _spoken(what: str, series: Sequence[charts.Line]) -> str:
    """A chart in words: where each line begins and ends."""
    ends = [
        f"{s.name} goes from {s.points[0][1]:.3g} at step {s.points[0][0]:,.0f}"
        f" to {s.points[-1][1]:.3g} at step {s.points[-1][0]:,.0f}"
        for s in series
        if s.points
    ]
    return f"{what} by step: " + "; ".join(ends)


def _binned(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values, as means of at most _CURVE_POINTS runs of neighbours."""
    finite = [(float(r["step"]), v) for r in rows if (v := _finite(r.get(key))) is not None]
    size = math.ceil(len(finite) / _CURVE_POINTS)
    bins = [finite[i : i + size] for i in range(0, len(finite), size)] if finite else []
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _splits(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table with the scored split first and the others beside it."""
    others = evaluation.get("other_splits") or {}
    if not others:
        return None
    columns = [(str(evaluation.get("split", "this split")), evaluation), *others.items()]
    tables = [t for _, t in columns]
    rows = [("Images", [_count(t.get("images")) for t in tables])]
    rows += [
        (n, [percent(t.get(k)) for t in tables]) for n, k in (("mIoU", "miou"), ("Pixel accuracy", "pixel_accuracy"))
    ]
    names = [c["name"] for c in _classes(evaluation)]
    rows += [(n, [percent((t.get("class_iou") or {}).get(n)) for t in tables]) for n in names]
    return {"names": [n for n, _ in columns], "rows": rows}


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    gains = {c["name"]: _finite(c.get("gain")) for c in decision.get("classes") or []}
    limit = max((abs(g) for g in gains.values() if g is not None), default=0.0) or 1.0
    outcome = str(decision.get("outcome", "undecided"))
    return {
        "outcome": outcome.capitalize(),
        "kind": outcome if outcome in ("promoted", "refused") else "unchanged",
        "reason": str(decision.get("reason", "")),
        "candidate": decision.get("candidate"),
        "champion": decision.get("champion"),
        "miou_gain": _finite(decision.get("miou_gain")),
        "min_gain": _finite(decision.get("min_gain")),
        "classes": [
            {**c, "bar": charts.difference_bar(g, limit) if (g := gains[c["name"]]) is not None else ""}
            for c in decision.get("classes") or []
        ],
    }
