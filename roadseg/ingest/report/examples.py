"""Choose the frames that the data report shows for a finding, from the paths in its entries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roadseg.data.masks.form import MaskForm
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.report.thumbnails import ThumbnailFile
from roadseg.ingest.sources.pairs import IMAGE_SUFFIXES

_MAX_FRAMES_ERROR, _MAX_FRAMES_WARNING = 6, 3  # frames
_MAX_FRAMES = 48
_SHOWN_ELSEWHERE = {
    "near-duplicate",
    "near-duplicate-in-split",
    "duplicate-in-split",
    "too-dark",
    "too-bright",
    "blurred",
}
_SAME = re.compile(r" = | ~ ")  # separates the paths of an entry
_BETWEEN = re.compile(r": | = | ~ | \(")  # and ends a path


@dataclass(frozen=True)
class Frame:
    """An image and its label on the page; `image` and `label` are paths below the root, "" if absent.

    note: shown below the image. codes: of the findings that name the image.
    """

    name: str
    image: str
    label: str
    part: str
    note: str = ""
    codes: tuple[str, ...] = ()

    @property
    def image_file(self) -> ThumbnailFile | None:
        return ThumbnailFile(self.image) if self.image else None

    @property
    def label_file(self) -> ThumbnailFile | None:
        return ThumbnailFile(self.label, self.part) if self.label else None

    @property
    def wanted(self) -> list[ThumbnailFile]:
        return [w for w in (self.image_file, self.label_file) if w]


def frame_of(s: MeasuredPair, note: str = "", *, with_label: bool = True, codes: tuple[str, ...] = ()) -> Frame:
    p = s.pair
    return Frame(p.name, p.image, p.label if with_label else "", p.part, note, codes)


def index(measured: Sequence[MeasuredPair]) -> dict[str, MeasuredPair]:
    """Pairs by the paths of their files; a file with several pairs (COCO) maps to the first."""
    by_path: dict[str, MeasuredPair] = {}
    for s in measured:
        for path in (s.pair.image, s.pair.label, s.pair.instances):
            if path:
                by_path.setdefault(path, s)
    return by_path


def paths_of(entry: str, by_path: Mapping[str, MeasuredPair]) -> list[str]:
    """The paths named by an entry of Finding.files: files of pairs, else the text before ": ".

    File names may contain the separators, so the longest prefix that is a pair's file is tried first.
    """
    ends = [m.start() for m in _BETWEEN.finditer(entry)] + [len(entry)]
    for end in reversed(ends):
        if entry[:end] in by_path:
            return [entry[:end], *(p for p in _BETWEEN.split(entry[end:]) if p in by_path)]
    return _SAME.split(entry.partition(": ")[0])


def example_groups(
    findings: Sequence[Finding], by_path: Mapping[str, MeasuredPair], forms: Mapping[str, MaskForm]
) -> list[tuple[Finding, list[Frame], int]]:
    """(finding, frames to show, number of other entries) for the findings that name images, in their order."""
    concerned = [f for f in findings if f.files and not (f.severity == "warning" and f.code in _SHOWN_ELSEWHERE)]
    share = max(1, _MAX_FRAMES // max(1, len(concerned)))
    groups = []
    for f in concerned:
        most = min(share, _MAX_FRAMES_ERROR if f.severity == "error" else _MAX_FRAMES_WARNING)
        frames: dict[str, Frame] = {}
        taken = 0
        for entry in f.files:
            if len(frames) >= most:
                break
            for frame in _frames(f, entry, by_path, forms):
                frames.setdefault(frame.image or frame.label, frame)
            taken += 1
        if frames:
            groups.append((f, list(frames.values()), len(f.files) - taken))
    return groups


def _frames(f: Finding, entry: str, by_path: Mapping[str, MeasuredPair], forms: Mapping[str, MaskForm]) -> list[Frame]:
    """No frames for an entry that names a sequence or a city."""
    paths = paths_of(entry, by_path)[:2]
    if paths[0] in by_path:
        note = entry[len(paths[0]) :].removeprefix(": ").strip() if len(paths) == 1 else ""
        return [frame_of(by_path[p], note) for p in paths]
    note = entry.partition(": ")[2]
    frames = []
    for path in paths:
        part = path.partition("/")[0]
        part = part if part in forms else ""
        if path.lower().endswith(IMAGE_SUFFIXES):
            is_label = f.code == "missing-image" and part in forms
            image, label = ("", path) if is_label else (path, "")
            frames.append(Frame(path.rpartition("/")[2], image, label, part, note))
    return frames
