"""`roadseg data diff A B`: compare two data sets, or a data set with a release's training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roadseg.config.sections import Config, load_config
from roadseg.data.frames import read_picture
from roadseg.errors import DataError, UsageError
from roadseg.pipeline.run import dataset
from roadseg.progress import progress
from roadseg.release.archive import Release, load_release
from roadseg.release.store.resolve import find_release, store_of
from roadseg.review.data_profile import Embed, Profile, make_profile, sampled_indexes
from roadseg.review.drift import Row, compare, table, verdict

if TYPE_CHECKING:
    from roadseg.data.manifest import Sample
    from roadseg.images.decode import Limits


@dataclass(frozen=True)
class Side:
    """A or B as given: a config and a split of its data, or a release."""

    title: str
    config: Config | None
    split: str
    release: Release | None


@dataclass(frozen=True)
class Diff:
    """rows, verdict: see drift.py. text: the table for a terminal."""

    rows: list[Row]
    verdict: str
    text: str


def data_diff(
    a: str, b: str, config: Config, *, workspace: Path = Path("workspace"), release: str | None = None
) -> Diff:
    """Compare A with B, each a YAML config whose data section names a data set, or a release.

    A config may be followed by ":SPLIT" (default: train, or the first split if there is no train). release: its
    backbone computes the embeddings; the default is the release being compared, else the champion, else none.
    Raises UsageError if an argument is neither, and whatever ingest raises for the data.
    """
    sides = [_side(text, config, workspace) for text in (a, b)]
    embedding_release = _embedding_release(sides, release, config, workspace)
    embed, embedded_by = _embedding(embedding_release)
    first, second = (_profile(side, workspace, embed, embedded_by) for side in sides)
    rows = compare(first, second)
    return Diff(rows, verdict(rows), table(rows, first.title, second.title))


def _side(text: str, config: Config, workspace: Path) -> Side:
    path, _, split = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
    if Path(path).suffix in (".yaml", ".yml"):
        return Side(text, load_config(path), split, None)
    try:
        return Side(text, None, "", load_release(find_release(config, workspace, text)))
    except OSError as e:
        raise UsageError(f"{text!r} is not a release ({e.strerror})", expected="a YAML config or a release") from e


def _embedding_release(sides: list[Side], named: str | None, config: Config, workspace: Path) -> Release | None:
    if named:
        return load_release(find_release(config, workspace, named))
    if given := next((s.release for s in sides if s.release), None):
        return given
    if store_of(config, workspace).champion():
        return load_release(find_release(config, workspace, "champion"))
    return None


def _embedding(release: Release | None) -> tuple[Embed | None, str]:
    if release is None:
        return None, ""
    from roadseg.release.network import load_network
    from roadseg.review.embedding import backbone_digest, embedder

    network = load_network(release)
    return embedder(network), backbone_digest(network)


def _profile(side: Side, workspace: Path, embed: Embed | None, embedded_by: str) -> Profile:
    if side.release:
        stored = side.release.model.get("data_profile")
        if stored is None:
            raise DataError(
                "the release has no profile of its training data",
                expected="one made by this version of roadseg or a later one",
                where=side.title,
                todo="train it again, or pass the config of its data set",
            )
        return Profile.from_json(stored)
    assert side.config is not None
    data = dataset(side.config, workspace)
    manifest, root, limits = data.manifest, data.root, data.limits
    split = side.split or ("train" if "train" in manifest.splits else manifest.splits[0])
    samples = manifest.split(split)
    title = f"{side.title} ({manifest.source} {split}, {len(samples):,} images)"
    images = _images([samples[i] for i in sampled_indexes(len(samples))], root, limits)
    return make_profile(title, images, len(samples), manifest.histogram(split), manifest.label_set, embed, embedded_by)


def _images(samples: list[Sample], root: Path, limits: Limits) -> Iterator[np.ndarray]:
    with progress(len(samples), "profile", "images") as bar:
        for sample in samples:
            yield read_picture(root, sample, limits)
            bar.update()
