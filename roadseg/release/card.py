"""The model card of a release: training data, scores and weaknesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roadseg.release.archive import TERMS, Release


def card(release: Release, evaluation: dict[str, Any]) -> str:
    """Markdown, from model.json and an Evaluation of the release."""
    model, a = release.model, release.model["architecture"]
    trained = model["training"]
    rows = [
        f"| {_plain(c['name'])} | {_percent(evaluation['class_iou'][c['name']])} "
        f"| {100 * (c['train_frequency'] or 0):.2f} |"
        for c in evaluation["classes"]
    ]
    scored = sorted((iou, name) for name, iou in evaluation["class_iou"].items() if iou is not None)
    weakest = ", ".join(f"{_plain(name)} ({100 * iou:.1f} %)" for iou, name in scored[:3])
    lines = [
        f"# roadseg release {release.digest[:12]}",
        "",
        f"Semantic segmentation of road scenes into {len(evaluation['classes'])} classes: "
        f"DeepLabv3+ with a {a['backbone']} backbone at output stride {a['output_stride']}{_early_strides(a)}, "
        f"fusion {a['fusion']}, {model['parameters'] / 1e6:.2f} M parameters.",
        "",
        f"- SHA-256 of the archive: `{release.digest}`",
        f"- Trained on: {trained['source']}, {trained['steps']} steps, "
        f"data fingerprint `{trained['data_fingerprints'].get('train', '')}`",
        f"- Made by roadseg {model['package_version']}" + (f", commit `{c}`" if (c := model["code_commit"]) else ""),
        f"- Preprocessing: {model['preprocessing']['input']}; normalisation {model['preprocessing']['normalisation']}",
        *_offsets(trained),
        "",
        f"## Scores on {evaluation['source']} {evaluation['split']} ({evaluation['images']} images)",
        "",
        f"mIoU **{_percent(evaluation['miou'])} %**, pixel accuracy {_percent(evaluation['pixel_accuracy'])} %, "
        f"mean accuracy {_percent(evaluation['mean_accuracy'])} %; full resolution, void ignored, absent classes "
        f"excluded; {evaluation['runtime']}; data fingerprint `{evaluation['data_fingerprint']}`.",
        "",
        "| class | IoU % | share of training pixels % |",
        "|---|---|---|",
        *rows,
        "",
        "## Limits",
        "",
        f"Weakest classes here: {weakest}. The figures hold for scenes like those scored; other cameras, "
        "cities, weather and light were not measured and are likely worse.",
        "",
        "## Data terms",
        "",
        release.members[TERMS].decode(errors="replace").strip() or "none recorded",
        "",
    ]
    return "\n".join(lines)


def _offsets(trained: Mapping[str, Any]) -> list[str]:
    """One line that lists the class offsets, largest first; [] if there are none."""
    if not (offsets := trained.get("class_offsets")):
        return []
    listed = ", ".join(f"{_plain(name)} {x:+.2f}" for name, x in sorted(offsets.items(), key=lambda o: -abs(o[1])))
    return [
        f"- Added to the logits after training, for the best mIoU on frames of train (not in probabilities): {listed}"
    ]


def _early_strides(architecture: Mapping[str, Any]) -> str:
    """Mentions early strides that differ from the backbone's own."""
    usual = [2, 2]  # archives from before this option have no entry
    early = architecture.get("early_strides", usual)
    return "" if early == usual else f" (early strides {early[0]} and {early[1]})"


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"


def _plain(name: str) -> str:
    """Escape a class name for a Markdown table cell: label files are untrusted input."""
    return " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
