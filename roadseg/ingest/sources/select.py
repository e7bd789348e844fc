"""Choose the source that a config names, or combine several sources into a mix."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from roadseg.config.sections import Data
from roadseg.data.masks.form import MaskForm
from roadseg.errors import ConfigError, DataError
from roadseg.files import json_bytes, sha256_bytes
from roadseg.images.decode import Limits
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources import (
    acdc,
    bdd100k,
    camvid,
    camvid_colors,
    cityscapes,
    comma10k,
    folder,
    idd,
    kitti,
    mapillary,
)
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CITYSCAPES, IGNORE, TOWN, LabelSet, in_cityscapes

Paired = tuple[list[Pair], list[Finding]]

# Sources with one fixed form of masks.
_FIXED: dict[str, tuple[Callable[[Path], Paired], MaskForm]] = {
    "town": (cityscapes.pairs, MaskForm("ids", TOWN)),
    "cityscapes": (cityscapes.pairs, MaskForm(cityscapes.FORM_KIND, cityscapes.LABEL_SET)),
    "cityscapes-coarse": (cityscapes.coarse_pairs, MaskForm(cityscapes.FORM_KIND, cityscapes.LABEL_SET)),
    "camvid": (camvid.pairs, MaskForm(camvid.FORM_KIND, camvid.LABEL_SET)),
    "camvid-32": (camvid_colors.pairs, MaskForm(camvid_colors.FORM_KIND, camvid_colors.LABEL_SET)),
    "bdd100k": (bdd100k.pairs, MaskForm(bdd100k.FORM_KIND, bdd100k.LABEL_SET)),
    "kitti": (kitti.pairs, MaskForm(kitti.FORM_KIND, kitti.LABEL_SET)),
    "acdc": (acdc.pairs, MaskForm(acdc.FORM_KIND, acdc.LABEL_SET)),
    "comma10k": (comma10k.pairs, MaskForm(comma10k.FORM_KIND, comma10k.LABEL_SET)),
    "mapillary-v1.2": (mapillary.pairs_v1_2, MaskForm(mapillary.FORM_KIND, mapillary.LABEL_SET_V1_2)),
    "mapillary-v2": (mapillary.pairs, MaskForm(mapillary.FORM_KIND, mapillary.LABEL_SET)),
}


@dataclass(frozen=True)
class Found:
    """Pairs of all splits, before any file is read. label_set: the learned classes; forms: of masks, by part."""

    pairs: list[Pair]
    findings: list[Finding]
    label_set: LabelSet
    forms: dict[str, MaskForm]
    part_weights: dict[str, float] = field(default_factory=dict)


def find(data: Data, root: Path) -> Found:
    """Pair the files below `root`; for a mix, `root` is the folder of links from `mixed_root`.

    Raises DataError if the root does not contain the source, ConfigError if the classes do not fit together.
    """
    if data.source == "mix":
        return _mixed(data, root)
    pairs, findings, form = _one(data.source, root, data.labels, limits_of(data))
    if data.taxonomy == "cityscapes":
        mapped = in_cityscapes(form.label_set)
        _require_overlap(mapped, data.source)
        common = replace(CITYSCAPES, terms=mapped.terms)
        return Found(pairs, findings, common, {"": replace(form, label_set=mapped)})
    return Found(pairs, findings, form.label_set, {"": form})


def label_set_of(data: Data) -> LabelSet:
    """The classes to learn, without reading the data; for idd those of level 3."""
    if data.taxonomy == "cityscapes" or (data.source == "mix" and data.taxonomy == "auto"):
        return CITYSCAPES
    source, labels = data.source, data.labels
    if source == "mix":  # taxonomy native: all parts have the same classes
        first = next(iter(data.mix.values()))
        source, labels = first.source, first.labels
    if labels is not None:
        return folder.read_description(labels).label_set
    return idd.LABEL_SET if source == "idd" else _FIXED[source][1].label_set


def limits_of(data: Data) -> Limits:
    return Limits(data.max_file_bytes, data.max_image_pixels)


def _one(source: str, root: Path, labels: Path | None, limits: Limits) -> tuple[list[Pair], list[Finding], MaskForm]:
    if source == "folder":
        if labels is None:
            raise ConfigError("source 'folder' without data.labels", expected="a YAML of its classes and folders")
        description = folder.read_description(labels)
        return *folder.pairs(root, description, limits), description.form
    if source == "idd":
        return *idd.pairs(root), idd.form(root)
    pairs, form = _FIXED[source]
    return *pairs(root), form


def _mixed(data: Data, root: Path) -> Found:
    pairs: list[Pair] = []
    findings: list[Finding] = []
    forms: dict[str, MaskForm] = {}
    native: dict[str, LabelSet] = {}
    for name, part in data.mix.items():
        pairs_here, findings_here, form = _one(part.source, root / name, part.labels, limits_of(data))
        _require_splits(name, part.splits, ({p.split for p in pairs_here} | {f.split for f in findings_here}) - {""})
        pairs += [_placed(p, name) for p in pairs_here if not part.splits or p.split in part.splits]
        findings += [_renamed(f, name) for f in findings_here if not part.splits or f.split in part.splits]
        native[name] = form.label_set
        forms[name] = form if data.taxonomy == "native" else replace(form, label_set=in_cityscapes(form.label_set))
    if data.taxonomy == "native":
        label_set = _same_classes(native)
    else:
        label_set = CITYSCAPES
        for name, form in forms.items():
            _require_overlap(form.label_set, name)
    terms = " ".join(f"{name}: {s.terms}" for name, s in native.items() if s.terms)
    label_set = replace(label_set, terms=terms)
    return Found(pairs, findings, label_set, forms, {name: part.weight for name, part in data.mix.items()})


def _require_splits(name: str, wanted: tuple[str, ...], present: set[str]) -> None:
    if missing := [split for split in wanted if split not in present]:
        raise ConfigError(
            f"{name} has no split {', '.join(missing)}",
            expected=f"some of {', '.join(sorted(present)) or 'none'}",
            where=f"data.mix.{name}.splits",
        )


def _placed(p: Pair, part: str) -> Pair:
    def below(path: str) -> str:
        return f"{part}/{path}" if path else ""

    sequence = below(p.sequence)
    return replace(
        p, name=below(p.name), sequence=sequence, image=below(p.image), label=below(p.label),
        instances=below(p.instances), part=part,
    )  # fmt: skip


def _renamed(f: Finding, part: str) -> Finding:
    return replace(f, files=tuple(f"{part}/{entry}" for entry in f.files), message=f"{part}: {f.message}")


def _same_classes(native: dict[str, LabelSet]) -> LabelSet:
    (first, label_set), *others = native.items()
    for name, other in others:
        if other.names != label_set.names:
            raise ConfigError(
                f"{name} has other classes than {first} ({', '.join(other.names)})",
                expected=", ".join(label_set.names),
                where="data.mix",
                todo="set data.taxonomy to cityscapes",
            )
    return label_set


def _require_overlap(mapped: LabelSet, name: str) -> None:
    if all(c.train_id == IGNORE for c in mapped.classes):
        raise ConfigError(
            f"no class of {name} corresponds to one of the 19 of Cityscapes",
            where="data.taxonomy",
            todo="name the counterparts in the YAML of a folder: `cityscapes: road` in a class",
        )


def mixed_root(data: Data, links: Path) -> Path:
    """Create a folder with one link per part below `links`, so that a mix has one root.

    A part that moved gets a new folder of links. Raises DataError if a part's folder does not exist.
    """
    roots = {name: (part.root or Path()).resolve() for name, part in data.mix.items()}
    for name, path in roots.items():
        if not path.is_dir():
            raise DataError("no such folder", where=str(path), todo=f"set data.mix.{name}.root")
    here = links / sha256_bytes(json_bytes({name: str(path) for name, path in roots.items()}))[:16]
    here.mkdir(parents=True, exist_ok=True)
    for name, path in roots.items():
        link = here / name
        if not link.is_symlink():
            partial = here / f".{name}.{os.getpid()}"
            partial.unlink(missing_ok=True)
            partial.symlink_to(path, target_is_directory=True)
            os.replace(partial, link)
    return here
