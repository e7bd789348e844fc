"""The manifest: the samples that ingest found, with their checksums.

Its folder has `manifest.jsonl` (one sample per line, sorted by split and name) and `dataset.json` (source, label set,
and per split: counts, class histogram, data fingerprint). Neither has times or absolute paths, so equal data gives
equal bytes on every machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from roadseg.data.masks.form import MaskForm
from roadseg.errors import DataError
from roadseg.files import json_bytes, sha256_bytes, write_atomic, write_json
from roadseg.labels import LabelSet

SCHEMA = 2
HOLDOUT = "holdout"  # the split of sequences held out of train
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its label.

    Paths are posix, relative to the data root; `instances` is "" if absent. `name` is unique in its split; `sequence`
    is "" if unknown. `width`, `height`: pixels of the upright image. `histogram`: pixels by train id, void last.
    `part`: its part of a mixed data set, else "".
    """

    split: str
    name: str
    sequence: str
    image: str
    label: str
    instances: str
    width: int
    height: int
    image_sha256: str
    label_sha256: str
    image_bytes: int
    label_bytes: int
    histogram: tuple[int, ...]
    part: str = ""


@dataclass(frozen=True)
class Manifest:
    """All samples of a data set, sorted by (split, name).

    label_set: the classes to learn and score. forms: {part: form of its masks}; by default masks hold the label set's
    own ids. part_weights: for a mixed data set, {part: sampling weight}.
    """

    source: str
    label_set: LabelSet
    samples: tuple[Sample, ...]
    forms: dict[str, MaskForm] = field(default_factory=dict)
    part_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.forms:
            object.__setattr__(self, "forms", {"": MaskForm("ids", self.label_set)})

    @cached_property
    def _by_split(self) -> dict[str, tuple[Sample, ...]]:
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.split, []).append(sample)
        return {split: tuple(groups[split]) for split in sorted(groups)}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._by_split)

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of a split. Raises DataError, listing the existing splits, if there is no such split."""
        if name not in self._by_split:
            raise DataError(
                f"the data has no split {name!r}",
                expected=f"one of {', '.join(self.splits) or 'none, it is empty'}",
                todo="set data.split, or add the split to the data",
            )
        return self._by_split[name]

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the split's sorted (image SHA-256, label SHA-256) and of the meaning of its mask values.

        Independent of file names and locations; changes with any byte of any image or label.
        """
        pairs = sorted((s.image_sha256, s.label_sha256) for s in self.split(split))
        parts = {s.part for s in self.split(split)}
        meaning = {part: self.forms[part].digest for part in sorted(parts)}
        return sha256_bytes(json_bytes([pairs, meaning.get("", meaning)]))

    def histogram(self, split: str) -> tuple[int, ...]:
        """Pixels of the split by train id, void last."""
        return tuple(sum(column) for column in zip(*(s.histogram for s in self.split(split)), strict=True))

    def summary(self) -> dict[str, Any]:
        """The content of dataset.json."""
        names = (*self.label_set.names, "void")
        splits = {
            split: {
                "images": len(samples),
                "sequences": len({s.sequence for s in samples} - {""}),
                "fingerprint": self.fingerprint(split),
                "histogram": dict(zip(names, self.histogram(split), strict=True)),
            }
            for split, samples in self._by_split.items()
        }
        return {
            "schema": SCHEMA,
            "source": self.source,
            "label_set": self.label_set.to_json(),
            "forms": {part: form.to_json() for part, form in self.forms.items()},
            "part_weights": self.part_weights,
            "splits": splits,
        }

    def save(self, folder: Path) -> None:
        ordered = sorted(self.samples, key=lambda s: (s.split, s.name))
        write_atomic(folder / "manifest.jsonl", b"".join(json_bytes(asdict(s)) + b"\n" for s in ordered))
        write_json(folder / "dataset.json", self.summary())

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Raises DataError with file and line for anything that `save` does not write."""
        empty, splits = _read_dataset(folder / "dataset.json")
        samples = _read_samples(folder / "manifest.jsonl", empty.label_set.num_classes + 1, set(empty.forms))
        manifest = replace(empty, samples=samples)
        if json_bytes(manifest.summary()["splits"]) != json_bytes(splits):
            raise _broken("its samples do not match the summary in dataset.json", folder / "manifest.jsonl")
        return manifest


def _broken(found: str, path: Path, line: int = 0) -> DataError:
    where = f"{path}, line {line}" if line else str(path)
    todo = "remove this folder and run again"
    return DataError(found, expected="the manifest as ingest wrote it", where=where, todo=todo)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _broken("no such file", path) from None


def _read_dataset(path: Path) -> tuple[Manifest, Any]:
    try:
        data = json.loads(_read(path))
        if data["schema"] != SCHEMA:
            raise _broken(f"has schema {data['schema']!r}, not {SCHEMA}", path)
        label_set = LabelSet.from_json(data["label_set"])
        if not all(isinstance(c.id, int) and isinstance(c.train_id, int) for c in label_set.classes):
            raise TypeError("class ids are not integers")
        label_set.mapping_digest, label_set.trained  # noqa: B018 (raises here if train ids are not 0..n-1)
        forms = {str(part): MaskForm.from_json(form) for part, form in data["forms"].items()}
        weights = {str(part): float(weight) for part, weight in data["part_weights"].items()}
        return Manifest(str(data["source"]), label_set, (), forms, weights), data["splits"]
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as e:
        raise _broken(f"is not a valid dataset.json ({type(e).__name__}: {e})", path) from None


def _read_samples(path: Path, bins: int, parts: set[str]) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        if not line:
            continue
        try:
            samples.append(_sample(json.loads(line), bins, parts))
        except (ValueError, TypeError, RecursionError) as e:
            raise _broken(f"is not a valid sample ({e})", path, number) from None
        if len(samples) > 1 and (samples[-1].split, samples[-1].name) <= (samples[-2].split, samples[-2].name):
            raise _broken("the sample is doubled or out of order", path, number)
    return tuple(samples)


def _sample(row: Any, bins: int, parts: set[str]) -> Sample:
    kinds = {f.name: f.type for f in fields(Sample)}
    if not isinstance(row, dict) or set(row) != set(kinds):
        raise ValueError(f"its keys are not {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = row[name]
        if kind == "str" and not isinstance(value, str):
            raise ValueError(f"{name} is not a string")
        if kind == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{name} is not an integer of at least 0")
        if name.endswith("sha256") and (len(value) != 64 or not _HEX.issuperset(value)):
            raise ValueError(f"{name} is not a SHA-256")
        if name in ("image", "label", "instances") and (value.startswith("/") or ".." in value.split("/")):
            raise ValueError(f"{name} is outside the data root")
    if row["part"] not in parts:
        raise ValueError(f"the data set has no part {row['part']!r}")
    histogram = row["histogram"]
    if not isinstance(histogram, list) or any(type(n) is not int or n < 0 for n in histogram):
        raise ValueError("histogram is not a list of integers of at least 0")
    if len(histogram) != bins or sum(histogram) != row["width"] * row["height"]:
        raise ValueError(f"histogram does not have width x height pixels in {bins} bins")
    return Sample(**{**row, "histogram": tuple(histogram)})
