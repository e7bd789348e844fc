"""Build a split from image folders and label folders; shared by the sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.sources.pairs import IMAGE_SUFFIXES, Pair, by_key, empty_split, list_files, match, unusable_names

Paths = dict[str, list[str]]


@dataclass(frozen=True)
class Folders:
    """One image folder and its label folder, relative to the data root, "" if absent.

    Suffixes are the end of a file name before its extension, compared without case; other files are left out.
    prefix: put before the names, to keep the names of several folders apart.
    """

    images: str
    labels: str = ""
    image_suffix: str = ""
    label_suffix: str = ""
    instance_suffix: str = ""
    label_endings: tuple[str, ...] = IMAGE_SUFFIXES
    prefix: str = ""


@dataclass(frozen=True)
class Files:
    """Paths by name. unusable: file names that cannot be used."""

    images: Paths = field(default_factory=dict)
    labels: Paths = field(default_factory=dict)
    instances: Paths = field(default_factory=dict)
    unusable: tuple[str, ...] = ()

    def where(self, keep: Callable[[str], bool]) -> Files:
        """The files whose name is kept, without `unusable`."""
        images, labels, instances = ({k: paths for k, paths in g.items() if keep(k)} for g in self._groups)
        return Files(images, labels, instances)

    @property
    def names(self) -> set[str]:
        return set().union(*self._groups)

    @property
    def _groups(self) -> tuple[Paths, Paths, Paths]:
        return self.images, self.labels, self.instances


def gather(root: Path, folders: Sequence[Folders]) -> Files:
    """The files of all `folders`, by prefix + path below the folder without suffix and extension."""
    files, unusable = Files(), []
    for f in folders:
        image_paths, bad_images = list_files(root, f.images)
        label_paths, bad_labels = list_files(root, f.labels, f.label_endings) if f.labels else ([], [])
        unusable += bad_images + bad_labels
        _add(files.images, image_paths, _named(f.images, f.image_suffix, f.prefix))
        _add(files.labels, label_paths, _named(f.labels, f.label_suffix, f.prefix))
        if f.instance_suffix:
            _add(files.instances, label_paths, _named(f.labels, f.instance_suffix, f.prefix))
    return Files(files.images, files.labels, files.instances, tuple(unusable))


def _add(to: Paths, paths: list[str], name: Callable[[str], str | None]) -> None:
    for key, group in by_key(paths, name).items():
        to.setdefault(key, []).extend(group)


def _named(folder: str, suffix: str, prefix: str) -> Callable[[str], str | None]:
    def name(path: str) -> str | None:
        stem = path.removeprefix(folder + "/").rpartition(".")[0]
        if not stem.lower().endswith(suffix.lower()):
            return None
        return prefix + stem[: len(stem) - len(suffix)]

    return name


def pair_up(
    split: str, files: Files, sequence: Callable[[str], str], looked_for: str, *, private_test: bool = True
) -> tuple[list[Pair], list[Finding]]:
    """The pairs of one split and the findings about it. looked_for: expected paths, for the message without images.

    private_test: a test split without any label is left out with a warning, because the test labels of most
    benchmarks are not public.
    """
    findings = unusable_names(split, list(files.unusable))
    if not files.images:
        return [], [*findings, empty_split(split, looked_for)]
    if not files.labels and split == "test" and private_test:
        message = f"{plural(len(files.images), 'image')} of test, and no labels; test is left out"
        fix = "nothing, if its labels are not public; its scores come from the benchmark's server"
        return [], [*findings, Finding("no-labels", "warning", split, (), len(files.images), message, fix)]
    matched, wrong = match(split, files.images, files.labels)
    found = [Pair(split, k, sequence(k), image, label, files.instances.get(k, [""])[0]) for k, image, label in matched]
    without = tuple(p.label for p in found if not p.instances)
    if files.instances and without:
        message = f"{plural(len(without), 'label')} of {split} without an instance map, while others have one"
        fix = "add the missing instance maps; instance scores leave these images out"
        wrong.append(Finding("missing-instances", "warning", split, without, len(without), message, fix))
    return found, [*findings, *wrong]


def note(split: str, message: str, fix: str, files: tuple[str, ...] = ()) -> Finding:
    """A finding about a choice that the source made, such as files it left out."""
    return Finding("source-note", "warning", split, files, max(1, len(files)), message, fix)
