"""Load initial weights from other projects' DeepLabv3+."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from roadseg.errors import ConfigError
from roadseg.model.backbone import EARLY_STRIDES
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, Architecture, DeepLabV3Plus
from roadseg.weights.foreign_names import (
    ASPP_BRANCHES,
    MMSEGMENTATION,
    SMP,
    VAINF,
    WHERE,
    Translation,
    check_values,
    part_of,
    translate,
)

CLASSIFIER, AUXILIARY = "decoder.classifier", "auxiliary_heads"
WHOLE = "fetch it again; weights of only a part of a network can't be used"
KNOWN = f"a DeepLabv3+ of {SMP} or {VAINF} as .safetensors, or a checkpoint of roadseg"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedWeights:
    """made_anew: parts that keep their initial weights, sorted. identity: those of them that pass on their input."""

    project: str
    parts: tuple[str, ...]
    made_anew: tuple[str, ...]
    identity: tuple[str, ...] = ()


def load_foreign(network: DeepLabV3Plus, path: Path) -> LoadedWeights:
    """Fill `network` in place with those tensors of the file that compute the same here; mean and std are ImageNet's.

    The whole backbone must fit. Parts with another form there, and a classifier for another number of
    classes, keep their initial weights; a classifier for the same number is loaded, although the file does
    not name its classes. Atrous rates are not in the file either: set those it was trained with. One log
    line reports everything. Raises ConfigError, and changes nothing, if nothing in the file is known, or if
    the model section does not match it; the error names what to set.
    """
    found = _translated(_read(path), path)
    unlike = _unlike(network, found, path)
    tensors = {key: value for key, value in found.tensors.items() if part_of(key) not in unlike}
    identity = {} if "decoder.fusions.0" in unlike else found.identity
    network.load_state_dict(tensors | identity, strict=False)
    network.mean.copy_(torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
    network.std.copy_(torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
    made_anew, parts = tuple(sorted(unlike)), tuple(sorted({part_of(key) for key in tensors}))
    log.info(
        "weights of %s from %s: loaded %s; not loaded %s; %s",
        *(found.project, path.name, ", ".join(parts)),
        ", ".join(f"{part} ({unlike[part]})" for part in made_anew) or "nothing",
        "; ".join((*found.remarks, *_remarks(network.architecture, parts))),
    )
    return LoadedWeights(found.project, parts, made_anew, tuple(sorted({part_of(key) for key in identity})))


def _remarks(a: Architecture, parts: Sequence[str]) -> list[str]:
    """Remarks on what such files don't contain. parts: those that are loaded."""
    remarks = ["set model.atrous_rates to those it was trained with"]
    if CLASSIFIER in parts:
        remarks.append(
            f"the file does not say which {a.num_classes} classes its classifier tells apart: "
            "taken to be the data's, in the same order"
        )
    if a.early_strides != EARLY_STRIDES:
        early, usual = (" ".join(map(str, strides)) for strides in (a.early_strides, EARLY_STRIDES))
        remarks.append(f"with model.early_strides {early} its layers see finer maps than in their training ({usual})")
    return remarks


def _unlike(network: DeepLabV3Plus, found: Translation, path: Path) -> dict[str, str]:
    """Parts of `network` that the file can't fill, and why. Raises ConfigError if another setting would help."""
    a, own = network.architecture, network.state_dict()
    unlike, misfits = dict(found.unlike), _misfits(own, found.tensors)
    last = found.tensors.get(f"{CLASSIFIER}.weight")
    if last is not None and len(last) != a.num_classes:
        unlike[CLASSIFIER] = f"{len(last)} classes there, {a.num_classes} here"
        misfits.pop(CLASSIFIER)
    if "backbone" in misfits and found.backbone == a.backbone:
        raise _unknown_encoder(found, path, f"not as timm's {a.backbone} ({_differing(misfits['backbone'])})")
    if misfits and (to_set := _to_set(found, a, misfits)):
        raise ConfigError(
            f"{path} is of another form ({_differing([name for part in misfits.values() for name in part])})",
            expected=f"the model section of these weights of {found.project}",
            where=WHERE,
            todo=f"set in the model section {', '.join(to_set)}",
        )
    unlike |= dict.fromkeys(misfits, "of another width there")
    if "decoder.fusions.0" in misfits:
        unlike |= dict.fromkeys(("decoder.refinements.0", CLASSIFIER), "the features before it are new")
    unlike.setdefault(AUXILIARY, "they have none")
    return {part: why for part, why in unlike.items() if any(key.startswith(f"{part}.") for key in own)}


def _differing(names: list[str]) -> str:
    return f"{names[0]} differs" if len(names) == 1 else f"{len(names)} tensors differ, such as {names[0]}"


def _unknown_encoder(found: Translation, path: Path, how: str) -> ConfigError:
    return ConfigError(
        f"the encoder of {path}, a {found.project}, is {how}",
        expected="MobileNetV2, a ResNet, or an encoder of segmentation_models.pytorch named tu-...",
        where=WHERE,
        todo="leave it out and set model.backbone_weights, or train it there anew with such an encoder",
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", expected=KNOWN, where=WHERE, todo="name the file in it")
    if path.name.endswith(".tar.gz"):
        raise ConfigError(
            f"{path} is an archive", expected=KNOWN, where=WHERE, todo="give a release as training.init_from"
        )
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is no .safetensors",
            expected=f"{KNOWN} (torch pickles can run code and are never read here)",
            where=WHERE,
            todo=f"run: roadseg convert-checkpoint {path} --out {path.with_suffix('.safetensors')}",
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(
            f"{path} can't be read as safetensors ({e})", expected=KNOWN, where=WHERE, todo="fetch it again"
        ) from e


def _translated(state: dict[str, Tensor], path: Path) -> Translation:
    try:
        found = translate(state)
    except KeyError as e:
        raise ConfigError(f"{path} lacks the tensor {e}", expected=KNOWN, where=WHERE, todo=WHOLE) from e
    if found is None and any(key.startswith("aspp.") for key in state):
        raise ConfigError(
            f"{path} holds the bare weights of a roadseg network, without its classes and the terms of its data",
            expected=f"a checkpoint with its .json, or {KNOWN}",
            where=WHERE,
            todo="give the release's archive, model.tar.gz, as training.init_from",
        )
    if found is None and any(key.startswith(MMSEGMENTATION) for key in state):
        raise ConfigError(
            f"{path} holds a decode_head, as of mmsegmentation or Hugging Face, which can't be transferred exactly",
            expected=KNOWN,
            where=WHERE,
            todo="give its backbone, under timm's names, as model.backbone_weights",
        )
    if found is None:
        first = ", ".join(sorted({key.split(".")[0] for key in state})[:6]) or "no tensors"
        raise ConfigError(
            f"nothing in {path} is known: its tensors begin with {first}",
            expected=KNOWN,
            where=WHERE,
            todo="give weights of timm's classification models as model.backbone_weights",
        )
    if found.backbone is None:
        raise _unknown_encoder(found, path, "none of timm's")
    check_values(found.tensors | found.identity)  # values computed from finite numbers may be infinite
    return found


def _misfits(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, list[str]]:
    """By part, tensor names that only one side has or whose shapes differ; parts that the file lacks don't count."""
    parts = {part_of(key) for key in given} | {"backbone"}
    names = [k for k in own if part_of(k) in parts and k not in given and not k.endswith("num_batches_tracked")]
    names += [k for k, v in given.items() if k not in own or own[k].shape != v.shape]
    by_part: dict[str, list[str]] = {}
    for name in names:
        by_part.setdefault(part_of(name), []).append(name)
    return by_part


def _to_set(found: Translation, a: Architecture, misfits: dict[str, list[str]]) -> list[str]:
    """Keys of the model section that do not match the file, with the values to set."""
    first, last = found.tensors.get("aspp.branches.0.0.weight"), found.tensors.get(f"{CLASSIFIER}.weight")
    width = len(first) if first is not None else last.shape[1] if last is not None else a.channels
    wanted = {
        "fusion": "concat",
        "head": found.head or a.head,
        "channels": width,
        "low_levels": (math.prod(a.early_strides),),  # the map that is at stride 4 with all its halvings
    }
    to_set = [f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in wanted.items() if getattr(a, key) != v]
    if len(a.atrous_rates) != ASPP_BRANCHES - 2:
        to_set.append("atrous_rates: the three that it was trained with")
    if "backbone" in misfits:
        not_told = f"the timm model that it was trained with, which is not {a.backbone}"
        to_set.insert(0, f"backbone: {found.backbone or not_told}")
    return to_set
