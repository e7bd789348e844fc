"""The gate: a pure function that decides which of two evaluated releases should be champion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from roadseg.errors import GateRefused


@dataclass(frozen=True)
class ClassGain:
    """IoU of one class in 0..1; None where the class is absent from the data."""

    name: str
    champion: float | None
    candidate: float | None
    gain: float | None


@dataclass(frozen=True)
class Decision:
    """The gate's outcome and its reason. Digests are SHA-256 of archives; gains are in mIoU of 0..1."""

    outcome: Literal["promoted", "refused", "unchanged"]
    reason: str
    candidate: str
    champion: str | None
    candidate_miou: float | None
    champion_miou: float | None
    miou_gain: float | None
    min_gain: float
    data_fingerprint: str
    classes: tuple[ClassGain, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(candidate: dict[str, Any], champion: dict[str, Any] | None, min_gain: float) -> Decision:
    """Compare two Evaluations (contents of metrics.json); `champion` is None before the first one.

    Raises GateRefused when the two can't be compared (different data, classes or runtime), or when the
    candidate has no mIoU.
    """
    digest, miou = candidate["release"], candidate["miou"]
    if miou is None:
        raise GateRefused("the candidate has no mIoU: no valid pixel was scored", todo="evaluate on labelled data")
    if champion is None:
        reason = "there was no champion"
        return Decision("promoted", reason, digest, None, miou, None, None, min_gain, candidate["data_fingerprint"])
    for what, ours, theirs in (
        ("data", candidate["data_fingerprint"], champion["data_fingerprint"]),
        ("runtime", candidate["runtime"], champion["runtime"]),
        ("classes", list(candidate["class_iou"]), list(champion["class_iou"])),
    ):
        if ours != theirs:
            raise GateRefused(
                f"candidate and champion were evaluated on different {what} ({ours} and {theirs})",
                expected="the same on both sides",
                todo="evaluate both again on the same data",
            )
    gain = miou - champion["miou"]
    outcome: Literal["promoted", "refused", "unchanged"]
    if digest == champion["release"]:
        outcome, reason = "unchanged", "the candidate is the champion already"
    elif gain >= min_gain:
        outcome, reason = "promoted", f"mIoU {gain:+.4f}, at least {min_gain} was asked for"
    else:
        outcome, reason = "refused", f"mIoU {gain:+.4f}, at least {min_gain} was asked for"
    classes = tuple(_class_gain(name, champion["class_iou"][name], iou) for name, iou in candidate["class_iou"].items())
    return Decision(
        outcome,
        reason,
        digest,
        champion["release"],
        miou,
        champion["miou"],
        gain,
        min_gain,
        candidate["data_fingerprint"],
        classes,
    )


def _class_gain(name: str, champion: float | None, candidate: float | None) -> ClassGain:
    gain = None if champion is None or candidate is None else candidate - champion
    return ClassGain(name, champion, candidate, gain)


def table(decision: Decision) -> str:
    """The differences by class as text, largest loss first."""

    def cell(value: float | None, form: str = ".4f") -> str:
        return "absent" if value is None else format(value, form)

    rows = [("mIoU", decision.champion_miou, decision.candidate_miou, decision.miou_gain)]
    ordered = sorted(decision.classes, key=lambda c: (c.gain is None, c.gain or 0.0))
    rows += [(c.name, c.champion, c.candidate, c.gain) for c in ordered]
    lines = [f"{'':<16}{'champion':>10}{'candidate':>11}{'gain':>10}"]
    lines += [f"{n:<16}{cell(a):>10}{cell(b):>11}{cell(g, '+.4f'):>10}" for n, a, b, g in rows]
    return "\n".join(lines)
