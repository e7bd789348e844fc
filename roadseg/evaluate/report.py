"""report.html: one offline page with an Evaluation's figures, charts, scenes and the gate's decision."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup

from roadseg.evaluate.training_curves import training_curves
from roadseg.labels import IGNORE
from roadseg.report import charts
from roadseg.report.matrix import confusion_matrix
from roadseg.report.page import count, css_color, fill, finite, percent, picture, stripes

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
    """The four pictures of a scene: image, truth, prediction over the image, errors; each uint8 [H, W, 3] RGB.

    image: uint8 [H, W, 3] RGB. label, prediction: uint8 [H, W] train ids, 255 void. palette: uint8 [256, 3] RGB.
    Void is hatched in the truth and in the errors. Errors are red on the darkened gray image; void is not an error.
    """
    height, width = label.shape
    void = label == IGNORE
    hatched = stripes(height, width)
    truth = np.where(void[..., None], hatched, palette[label])
    overlay = cv2.addWeighted(image, 0.35, np.ascontiguousarray(palette[prediction]), 0.65, 0)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    dim = (grey * 0.45 + 18).astype(np.uint8)
    error = np.repeat(dim[..., None], 3, axis=2)
    error[(label != prediction) & ~void] = (255, 68, 51)
    return image, truth, overlay, np.where(void[..., None], hatched, error)


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
    timing: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[tuple[str, bytes]] = (),
) -> str:
    """The report as HTML.

    evaluation: the content of metrics.json; missing parts are left out of the page. history: a row
    {step, loss, learning_rate} for a training step and {step, split, miou, pixel_accuracy} for a validation.
    contact_sheet: JPEG or PNG bytes. decision: of the gate, {outcome, reason, candidate, champion, miou_gain,
    min_gain, classes}. timing: rows {step, images_per_s, waiting_share} of log/timing.jsonl. pictures: captions with
    JPEG or PNG bytes, from report.progress_strip. Raises UsageError for pictures in another format.
    """
    classes = _classes(evaluation)
    return fill(
        Path(__file__).with_name("report.html"),
        title=title,
        evaluation=evaluation,
        tiles=_tiles(evaluation),
        facts=_facts(evaluation),
        classes=classes,
        categories=[
            {"name": n, "iou": v, "bar": charts.bar(finite(v))}
            for n, v in (evaluation.get("category_iou") or {}).items()
        ],
        per_image=_quantiles(evaluation.get("per_image") or {}),
        heat=_heat(evaluation, classes),
        confusions=_confusions(evaluation, classes),
        curves=training_curves(history, timing),
        progress_strip=pictures,
        groups=[(n, s) for n, s in (("Worst scenes", worst), ("Best scenes", best)) if s],
        splits=_splits(evaluation),
        contact_sheet=contact_sheet,
        decision=_decision(decision) if decision else None,
    )


def _tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of each key figure at the top of the page."""
    iou = evaluation.get("class_iou") or {}
    present = sum(v is not None for v in iou.values())
    model = evaluation.get("model") or {}
    pixels = finite(evaluation.get("pixels"))
    tiles = [
        ("mIoU", percent(evaluation.get("miou"), 2), f"mean of {present} of {len(iou)} classes" if iou else ""),
        ("Pixel accuracy", percent(evaluation.get("pixel_accuracy"), 2), "of all valid pixels"),
        ("Mean accuracy", percent(evaluation.get("mean_accuracy"), 2), "mean recall of the classes"),
        ("Images", count(evaluation.get("images")), f"{count(pixels)} valid pixels" if pixels is not None else ""),
    ]
    if "parameters" in model:
        tiles.append(("Parameters", count(model["parameters"]), "of the network that ships"))
    return tiles


def _facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) that identify the release, the data and the model."""
    names = {
        "release": "Release",
        "data_fingerprint": "Data fingerprint",
        "source": "Source",
        "split": "Split",
        "runtime": "Runtime",
        "schema_version": "Schema version",
    }
    rows = [(text, _format_value(evaluation[key])) for key, text in names.items() if evaluation.get(key) is not None]
    model = evaluation.get("model") or {}
    return rows + [
        (k.replace("_", " ").capitalize(), f"{v:,}" if k == "parameters" and isinstance(v, int) else _format_value(v))
        for k, v in model.items()
    ]


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _quantiles(per_image: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the mIoU of single images; the quantiles are under "miou" or at the top level."""
    quantiles = per_image.get("miou", per_image)
    if not isinstance(quantiles, Mapping):
        return []
    return [(k.replace("_", " "), percent(v)) for k, v in quantiles.items() if finite(v) is not None]


def _classes(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per class in train id order; without `classes`, in the order of class_iou."""
    iou = evaluation.get("class_iou") or {}
    accuracy = evaluation.get("class_accuracy") or {}
    predicted = evaluation.get("absent_predicted") or {}
    rows = []
    for i, c in enumerate(evaluation.get("classes") or [{"name": n} for n in iou]):
        value, recall = finite(iou.get(c["name"])), finite(accuracy.get(c["name"]))
        rows.append(
            {
                "id": i,
                "name": str(c["name"]),
                "color": css_color(c.get("color")),
                "iou": value,
                "accuracy": recall,
                "share": finite(c.get("train_frequency")),
                "bar": charts.bar(value, recall),
                "predicted": count(predicted.get(c["name"], 0)),
            }
        )
    return rows


def _heat(evaluation: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> Markup | None:
    counts = evaluation.get("confusion")
    if not counts or len(counts) != len(classes):
        return None
    return confusion_matrix(counts, [c["name"] for c in classes], [c["color"] for c in classes])


def _confusions(evaluation: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest cells off the diagonal, which hold most of the wrong pixels."""
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


def _splits(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table with the scored split first and the others beside it."""
    others = evaluation.get("other_splits") or {}
    if not others:
        return None
    columns = [(str(evaluation.get("split", "this split")), evaluation), *others.items()]
    tables = [t for _, t in columns]
    rows = [("Images", [count(t.get("images")) for t in tables])]
    rows += [
        (n, [percent(t.get(k)) for t in tables]) for n, k in (("mIoU", "miou"), ("Pixel accuracy", "pixel_accuracy"))
    ]
    names = [c["name"] for c in _classes(evaluation)]
    rows += [(n, [percent((t.get("class_iou") or {}).get(n)) for t in tables]) for n in names]
    return {"names": [n for n, _ in columns], "rows": rows}


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    gains = {c["name"]: finite(c.get("gain")) for c in decision.get("classes") or []}
    limit = max((abs(g) for g in gains.values() if g is not None), default=0.0) or 1.0
    outcome = str(decision.get("outcome", "undecided"))
    return {
        "outcome": outcome.capitalize(),
        "kind": outcome if outcome in ("promoted", "refused") else "unchanged",
        "reason": str(decision.get("reason", "")),
        "candidate": decision.get("candidate"),
        "champion": decision.get("champion"),
        "miou_gain": finite(decision.get("miou_gain")),
        "min_gain": finite(decision.get("min_gain")),
        "classes": [
            {**c, "bar": charts.difference_bar(g, limit) if (g := gains[c["name"]]) is not None else ""}
            for c in decision.get("classes") or []
        ],
    }
