"""Match images and labels by name, never by order. Files without a match are findings."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from roadseg.errors import DataError
from roadseg.ingest.checks.findings import Finding, plural

# Files with these extensions are read; the format is detected from the content.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pair:
    """An image and its label: posix paths relative to the data root. instances: "" if there is no instance map.

    part: the source within a mix, "" if the data is not mixed.
    """

    split: str
    name: str
    sequence: str
    image: str
    label: str
    instances: str = ""
    part: str = ""


def split_order(splits: Iterable[str]) -> list[str]:
    """Sort splits: train, val, test, then others by name."""
    first = {"train": 0, "val": 1, "test": 2}
    return sorted(set(splits), key=lambda s: (first.get(s, 3), s))


def list_files(root: Path, folder: str, endings: tuple[str, ...] = IMAGE_SUFFIXES) -> tuple[list[str], list[str]]:
    """Sorted posix paths of the files with these endings below root/folder, relative to `root`; and unusable names.

    Follows links to folders, but visits each folder once. Skips hidden files. Raises DataError for a folder that
    cannot be listed.
    """
    found, unusable, visited = [], [], set()
    for here, folders, names in os.walk(root / folder, followlinks=True, onerror=_refuse):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(
            d for d in folders if not d.startswith(".")
        )  # sorted, so that of two links to one folder the first is followed
        for name in names:
            if name.startswith(".") or not name.lower().endswith(endings):
                continue
            path = Path(here, name).relative_to(root).as_posix()
            if path.isprintable():  # false for control characters and invalid UTF-8
                found.append(path)
            else:
                unusable.append(ascii(path))
    return sorted(found), sorted(unusable)


def _refuse(e: OSError) -> None:
    """Raise for a folder that cannot be listed, as its files would be silently missing."""
    if isinstance(e, FileNotFoundError | NotADirectoryError):
        return  # optional folders may be missing
    raise DataError(f"cannot be listed ({e.strerror})", where=str(e.filename), todo="make the folder readable")


def unusable_names(split: str, names: list[str]) -> list[Finding]:
    if not names:
        return []
    message = f"{plural(len(names), 'file name')} of {split} with control characters or bytes that are no UTF-8"
    return [Finding("bad-name", "error", split, tuple(names), len(names), message, "rename them")]


def by_key(paths: Iterable[str], key: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Group paths by key; paths with key None are left out."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        name = key(path)
        if name is not None:
            groups.setdefault(name, []).append(path)
    return groups


def match(
    split: str, images: dict[str, list[str]], labels: dict[str, list[str]]
) -> tuple[list[tuple[str, str, str]], list[Finding]]:
    """Sorted (key, image, label) of keys with exactly one image and one label; findings for all others."""
    doubled = [paths for group in (images, labels) for paths in group.values() if len(paths) > 1]
    findings = []
    if doubled:
        entries = tuple(sorted(" = ".join(paths) for paths in doubled))
        message = f"{plural(len(entries), 'name')} of {split} given to several files, so that a pair can't be told"
        findings.append(Finding("doubled-file", "error", split, entries, len(entries), message, "keep one of each"))
    findings += _unpaired("missing-label", split, images, labels)
    findings += _unpaired("missing-image", split, labels, images)
    findings += _case_clashes(split, images, labels)
    single = (k for k in sorted(images.keys() & labels.keys()) if len(images[k]) == len(labels[k]) == 1)
    return [(k, images[k][0], labels[k][0]) for k in single], findings


def _unpaired(code: str, split: str, these: dict[str, list[str]], others: dict[str, list[str]]) -> list[Finding]:
    """Finding of keys in `these` but not in `others`; names a counterpart that differs only in case."""
    has, lacks, article = ("image", "label", "a") if code == "missing-label" else ("label", "image", "an")
    single = sorted(these.keys() - others.keys())
    if not single:
        return []
    near = {_folded(key): paths for key, paths in others.items() if key not in these}
    entries = tuple(
        path + (f": but for upper and lower case, {near[_folded(key)][0]}" if _folded(key) in near else "")
        for key in single
        for path in these[key]
    )
    message = f"{plural(len(entries), has)} of {split} without {article} {lacks}"
    fix = f"add the missing {lacks}s under the same name, or take the {has}s out"
    if others and not these.keys() & others.keys():
        here, listing = these[single[0]][0], others[min(others)][0]
        fix = (
            f"no {has} of {split} has the name of any {lacks}, as in {here} and {listing}: rename them "
            "(source folder: say what names end with, by image_suffix and label_suffix)"
        )
    return [Finding(code, "error", split, tuple(sorted(entries)), len(entries), message, fix)]


def _case_clashes(split: str, *groups: dict[str, list[str]]) -> list[Finding]:
    """Finding of names that are equal on file systems that ignore case or normalize Unicode (macOS, Windows)."""
    entries = []
    for group in groups:
        folded: dict[str, list[str]] = {}
        for key, paths in group.items():
            folded.setdefault(_folded(key), []).append(paths[0])
        entries += [" ~ ".join(sorted(paths)) for paths in folded.values() if len(paths) > 1]
    if not entries:
        return []
    message = f"{plural(len(entries), 'name')} of {split} told apart by upper and lower case, or Unicode form, only"
    fix = "rename one of each: macOS and Windows keep only one of them"
    return [Finding("case-clash", "warning", split, tuple(sorted(entries)), len(entries), message, fix)]


def _folded(key: str) -> str:
    return unicodedata.normalize("NFC", key).casefold()


def empty_split(split: str, folders: str) -> Finding:
    return Finding(
        "empty-split", "error", split, (), 0, f"{split} has no pictures in {folders}", "fill or remove the folder"
    )


def missing_data_error(root: Path, looked_for: str) -> DataError:
    """The error for a root without the source's files: states what was expected and what the folder contains."""
    if not root.exists():
        return DataError("no such folder", expected=looked_for, where=str(root), todo="set data.root")
    if not root.is_dir():
        return DataError("is a file, not a folder", expected=looked_for, where=str(root), todo="set data.root")
    names = sorted(ascii(p.name)[1:-1] + ("/" if p.is_dir() else "") for p in root.iterdir())
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return DataError(
        f"the data was not found; the folder contains {listing or 'nothing'}",
        expected=looked_for,
        where=str(root),
        todo="point data.root at the folder that holds them",
    )
