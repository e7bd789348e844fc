"""Releases and weight files that a training starts from, and their digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from roadseg.errors import ConfigError, ReleaseNotFound
from roadseg.files import sha256_file
from roadseg.release.archive import GZIP, Release, load_release

_RELEASE = "champion, a digest, 8 or more of its first characters, or the path of a model.tar.gz"
_PICKLE = (b"PK", b"\x80\x02")  # what torch.save writes is a zip now, and was a pickle
_CHECK = "check the name; a path counts from the folder that roadseg is started in"


@dataclass(frozen=True)
class ReleaseInput:
    """A release and the archive it was read from."""

    archive: Path
    release: Release


@dataclass(frozen=True)
class Inputs:
    """init: release to fine-tune. teacher: release to distill from. digests: of all inputs, for the stage's key."""

    init: ReleaseInput | None
    teacher: ReleaseInput | None
    digests: dict[str, str]


def training_inputs(
    find: Callable[[str], Path], *, backbone_weights: str, weights_from: str, init_from: str, distill_from: str
) -> Inputs:
    """find: the archive of a reference.

    Raises ConfigError with the config's key for missing inputs, StoreError if the store can't be read,
    ArchiveError for an archive that can't be trusted.
    """
    init = _read_release(init_from, find, "training.init_from")
    teacher = _read_release(distill_from, find, "training.distill_from")
    key = "model.backbone_weights"
    by_name = backbone_weights in ("none", "imagenet")
    return Inputs(
        init,
        teacher,
        {
            "weights": backbone_weights if by_name else _digest(backbone_weights, key, "none, imagenet or "),
            "weights_from": _digest(weights_from, "training.weights_from") if weights_from else "",
            "init_from": init.release.digest if init else "",
            "distill_from": teacher.release.digest if teacher else "",
        },
    )


def _read_release(reference: str, find: Callable[[str], Path], where: str) -> ReleaseInput | None:
    if not reference:
        return None
    try:
        archive = find(reference)
    except ReleaseNotFound as e:
        found = f"{e.found} in {e.where}" if e.where else e.found
        raise ConfigError(found, expected=e.expected or _RELEASE, where=where, todo=e.todo or _CHECK) from e
    if archive.is_dir():
        raise ConfigError(f"{reference!r} is a folder", expected=_RELEASE, where=where, todo="name the archive in it")
    with archive.open("rb") as file:
        head = file.read(2)
    if head != GZIP:
        convert = f"roadseg convert-checkpoint {reference} makes of a torch pickle what training.weights_from takes"
        raise ConfigError(
            f"{reference!r} is no archive of a release", expected=_RELEASE, where=where,
            todo=convert if where == "training.init_from" and head in _PICKLE else "name a model.tar.gz",
        )  # fmt: skip
    return ReleaseInput(archive, load_release(archive))


def _digest(path: str, where: str, others: str = "") -> str:
    if not Path(path).is_file():
        is_folder = Path(path).is_dir()
        raise ConfigError(
            f"{path!r} is a folder" if is_folder else f"no file {path!r}",
            expected=f"{others}a .safetensors file",
            where=where,
            todo="name the file in it" if is_folder else _CHECK,
        )
    return sha256_file(Path(path))
