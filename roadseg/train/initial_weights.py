"""Initial weights: random, a backbone's, a release's, a checkpoint's or another project's."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from roadseg.errors import ArchiveError, ConfigError
from roadseg.files import sha256_file
from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build
from roadseg.release.archive import TERMS, Release
from roadseg.release.graph import WEIGHTS
from roadseg.train.checkpoint import averaged
from roadseg.weights.foreign import load_foreign
from roadseg.weights.foreign_names import WHERE

CLASSIFIER, AUXILIARY = "decoder.classifier", "auxiliary_heads"
# keys of the model section that determine the tensors
_SHAPING = ("backbone", "fusion", "head", "channels", "low_levels", "early_strides")
_ADVISED = (*_SHAPING, "atrous_rates", "output_stride")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """words: origin of the weights, for model.json. made_anew: parts without loaded weights.

    identity: those of them that pass on their input; the others are random. random: the random parts of a network that
    started without a whole network's weights. terms: of the data behind the weights, None without loaded weights.
    """

    network: DeepLabV3Plus
    words: str
    made_anew: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    terms: str | None = None
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Learned:
    """A network that roadseg trained before. kind: release or checkpoint. where: the config's key."""

    kind: str
    name: str
    where: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    architecture: Mapping[str, Any]


def starting_network(
    architecture: Architecture,
    seed: int,
    weights: str,
    mean: Sequence[float],
    std: Sequence[float],
    init: Release | None,
    weights_from: str,
    classes: tuple[str, ...],
) -> Start:
    """Build the network on the CPU and fill it; what is not loaded depends on `seed` only.

    weights: of the backbone, see load_backbone_weights; mean and std belong to them. Instead of them `init`, a release
    (with its normalization), or `weights_from`, a checkpoint (its averaged network) or a file of another project (see
    load_foreign). If the classes differ from the loaded network's in name or order, the classifier is new, as no row is
    known to mean the same. Raises ConfigError if the weights belong to another architecture, ArchiveError if the
    release's weights can't be read.
    """
    if init is None and not weights_from:
        network = build(architecture, seed=seed, weights=weights, mean=mean, std=std)
        named = weights in ("none", "imagenet")
        random = ("backbone", "aspp", "decoder") if weights == "none" else ("aspp", "decoder")
        return Start(network, weights if named else f"backbone weights {sha256_file(Path(weights))}", random=random)
    network = build(architecture, seed=seed, mean=mean, std=std)
    if init is not None:
        made_anew = _take(network, _of_release(init), classes)
        return Start(network, f"release {init.digest}", made_anew, terms=init.members[TERMS].decode(errors="replace"))
    path = Path(weights_from)
    if (found := averaged(path)) is not None:
        tensors, of = found
        name = f"checkpoint {path.name}"
        made_anew = _take(network, _Learned("checkpoint", name, WHERE, tensors, of.classes, of.architecture), classes)
        return Start(network, f"checkpoint {sha256_file(path)}", made_anew, terms=of.terms)
    taken = load_foreign(network, path)
    words = f"{taken.project} weights {sha256_file(path)}"
    terms = "not in the file; ask where it is from"
    return Start(network, words, taken.made_anew, terms=terms, identity=taken.identity)


def refuse_frozen_at_random(start: Start, frozen: Sequence[str]) -> None:
    """Raise ConfigError if a part without loaded weights is frozen; warn about random frozen parts of a new network."""
    random = [part for part in start.made_anew if part not in start.identity]
    if new := [part for part in random if part.split(".")[0] in frozen]:
        raise ConfigError(
            f"{', '.join(sorted({part.split('.')[0] for part in new}))}, in which {', '.join(new)} is new and random",
            expected="parts whose weights were learned",
            where="training.freeze",
            todo=f"leave it out: started from {start.words}, it has to be learned for these classes",
        )
    if unlearned := [part for part in start.random if part in frozen]:
        log.warning("training.freeze: %s keeps random weights, as nothing is given to start from", ", ".join(unlearned))


def _of_release(init: Release) -> _Learned:
    name = f"release {init.digest[:12]}"
    try:
        tensors = load_tensors(init.members[WEIGHTS])
    except SafetensorError as e:
        raise ArchiveError(f"{WEIGHTS} is not readable ({e})", where=name) from e
    bias = f"{CLASSIFIER}.bias"
    if bias in tensors:  # offsets suit those weights' label maps, and are fitted again
        tensors[bias] = tensors[bias] - torch.from_numpy(init.class_offsets).to(tensors[bias])
    architecture = init.model.get("architecture", {})
    return _Learned("release", name, "training.init_from", tensors, init.label_set.names, architecture)


def _take(network: DeepLabV3Plus, other: _Learned, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Fill `network` in place; returns the parts that were not loaded."""
    own = network.state_dict()
    other_classes = other.classes != classes
    heads = [key for key in own if _within(key, AUXILIARY)]
    all_there = all(key in other.tensors and other.tensors[key].shape == own[key].shape for key in heads)
    made_anew = [CLASSIFIER] * other_classes + [AUXILIARY] * (bool(heads) and (other_classes or not all_there))
    left_out = made_anew if heads else [*made_anew, AUXILIARY]
    state = {key: value for key, value in other.tensors.items() if not any(_within(key, part) for part in left_out)}
    if wrong := _differing(own, state, made_anew):
        raise ConfigError(
            f"{other.name} has another architecture ({len(wrong)} tensors differ, such as {wrong[0]})",
            where=other.where,
            todo=_advice(network.architecture.to_json(), other.architecture, other.kind),
        )
    network.load_state_dict(state, strict=False)
    _warn_of_other_rates(network.architecture, other)
    if other_classes:
        theirs, ours = ", ".join(other.classes), ", ".join(classes)
        log.info("%s knows other classes (%s); made anew for %s: %s", other.name, theirs, ours, ", ".join(made_anew))
    elif made_anew:
        log.info("%s has no auxiliary heads: they are new", other.name)
    return tuple(made_anew)


def _warn_of_other_rates(ours: Architecture, other: _Learned) -> None:
    """Tensors fit at any rates and strides, but they learned other ones."""
    theirs = other.architecture
    form = ours.to_json()
    reach = [rate * theirs.get("output_stride", 0) for rate in theirs.get("atrous_rates", ())]
    if not reach:
        return
    rates_differ = reach != [rate * ours.output_stride for rate in ours.atrous_rates]
    if rates_differ or theirs["early_strides"] != form["early_strides"]:
        keys = ("atrous_rates", "output_stride", "early_strides")
        flags = " ".join(f"--model.{key.replace('_', '-')} {_flag(theirs[key])}" for key in keys)
        log.warning(
            "%s was trained with %s; here they are %s", other.name, flags, ", ".join(_flag(form[key]) for key in keys)
        )


def _advice(ours: Mapping[str, Any], theirs: Any, kind: str = "release") -> str:
    """The flags that give this network the other's tensors. kind: release or checkpoint."""
    theirs = theirs if isinstance(theirs, Mapping) else {}

    def differing(keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key in theirs and _flag(theirs[key]) != _flag(ours[key])]

    options = theirs["backbone_options"]
    in_yaml = f"backbone_options: {json.dumps(options)} in the YAML's model section"
    parts = [in_yaml] * (options != ours["backbone_options"])
    if not parts and not differing(_SHAPING):
        return f"no value of the model section tells them apart: take a {kind} that this version made"
    parts += [f"--model.{key.replace('_', '-')} {_flag(theirs[key])}" for key in differing(_ADVISED)]
    return f"to go on with that {kind}'s: {' '.join(parts)}"


def _flag(value: Any) -> str:
    return " ".join(shlex.quote(str(part)) for part in (value if isinstance(value, list | tuple) else [value]))


def _differing(own: dict[str, Tensor], given: dict[str, Tensor], made_anew: Sequence[str]) -> list[str]:
    absent = [key for key in own if key not in given and not any(_within(key, part) for part in made_anew)]
    return absent + [key for key, value in given.items() if key not in own or own[key].shape != value.shape]


def _within(key: str, part: str) -> bool:
    return key.startswith(part + ".")
