"""What a training starts from besides its data: weights and releases, by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from roadseg.config import Config
from roadseg.errors import ConfigError
from roadseg.files import sha256_file
from roadseg.release.archive import Release, load_release


@dataclass(frozen=True)
class Given:
    """A release and the archive it was read from."""

    archive: Path
    release: Release


@dataclass(frozen=True)
class Inputs:
    """init: what is trained further; teacher: what is learnt from. digests: of all, for the stage's key."""

    init: Given | None
    teacher: Given | None
    digests: dict[str, str]


def training_inputs(config: Config, find: Callable[[str], Path]) -> Inputs:
    """find: the archive of a reference. Raises ConfigError for a file that is not there, what `find` and loading do."""
    t, weights = config.training, config.model.backbone_weights
    init, teacher = (_given(reference, find) for reference in (t.init_from, t.distill_from))
    own = weights in ("none", "imagenet")
    return Inputs(
        init,
        teacher,
        {
            "weights": weights if own else _digest(weights, "model.backbone_weights", "none, imagenet or "),
            "weights_from": _digest(t.weights_from, "training.weights_from") if t.weights_from else "",
            "init_from": init.release.digest if init else "",
            "distill_from": teacher.release.digest if teacher else "",
        },
    )


def _given(reference: str, find: Callable[[str], Path]) -> Given | None:
    if not reference:
        return None
    archive = find(reference)
    return Given(archive, load_release(archive))


def _digest(path: str, where: str, others: str = "") -> str:
    if not Path(path).is_file():
        found = f"{path!r} is a folder" if Path(path).is_dir() else f"no file {path!r}"
        raise ConfigError(found, expected=f"{others}a .safetensors file", where=where)
    return sha256_file(Path(path))
