"""Checkpoints: one safetensors file with the whole training state, and a JSON file beside it.

The JSON is written last and holds the SHA-256 of the tensors: what has no matching JSON was never saved. It also
stores the origin of the network, for a training that starts from it.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from roadseg.errors import ConfigError, RoadsegError
from roadseg.files import json_bytes, read_json, sha256_bytes, write_atomic
from roadseg.weights.foreign_names import WHERE

log = logging.getLogger(__name__)
KEPT = 2
NETWORK, AVERAGE = "network.", "average."  # prefixes of tensor names
WITH_STATE = "optimizer.parameters"  # number of parameters with optimizer state
NAMED = 5  # most tensors that an error lists


@dataclass(frozen=True)
class Origin:
    """Origin of a checkpoint's network. architecture: as JSON. terms: of all data behind its weights."""

    classes: tuple[str, ...]
    architecture: dict[str, Any]
    terms: str


def save(
    folder: Path, step: int, network: nn.Module, average: nn.Module, optimizer: Optimizer, of: Origin | None = None
) -> None:
    """Save the state after `step` steps, then remove all but the newest checkpoints.

    of: origin of the network; without it no training can start from the checkpoint, only resume. Returns only after
    both files were flushed and read back as written (0.03 s for 50 MB). Raises RoadsegError if that fails;
    then nothing of this step is left, and the checkpoints before it stay.
    """
    data = save_tensors(_state(network, average, optimizer))
    about: dict[str, Any] = {"step": step, "sha256": sha256_bytes(data), "bytes": len(data)}
    if of:
        about["of"] = asdict(of)
    about["check"] = sha256_bytes(json_bytes(about))
    path = folder / f"step-{step:08d}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        _sweep(folder)  # half-written files of a killed run may fill the disk
        _write(path, data)
        _write(path.with_suffix(".json"), json.dumps(about, indent=1, sort_keys=True).encode() + b"\n")
    except OSError as e:
        _sweep(folder)
        raise not_saved(e, path, len(data), folder) from e
    for later in folder.glob("step-*.json"):  # damaged: otherwise training would have resumed from them
        if later.stem > path.stem:
            _remove(later)
    prune(folder, KEPT)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and half-written files of a killed run."""
    for path in sorted(folder.glob("step-*.json"))[:-keep]:
        _remove(path)  # the JSON first: without it the tensors do not count
    _sweep(folder)


def newest(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest intact checkpoint, or None."""
    found = sorted(folder.glob("step-*.json"), reverse=True)
    for path in found:
        try:
            about, tensors = _read(path)
            if path.stem != f"step-{about['step']:08d}":
                raise ValueError("it has another's name")
            return about["step"], tensors
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path.stem, e)
    if found:
        log.warning("no checkpoint in %s is whole: training starts again", folder)
    return None


def averaged(path: Path) -> tuple[dict[str, Tensor], Origin] | None:
    """The averaged network's tensors of a checkpoint, by that network's names; None if `path` is no checkpoint.

    path: its .safetensors, under any name, with the .json beside it. Raises ConfigError if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if not any(name.startswith(AVERAGE) for name in file.keys()):  # noqa: SIM118
                return None
    except (OSError, SafetensorError):
        if not path.with_suffix(".json").is_file():
            return None
    try:
        about, tensors = _read(path.with_suffix(".json"))
        of = Origin(tuple(o["classes"]), dict(o["architecture"]), str(o["terms"])) if (o := about.get("of")) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise ConfigError(
            f"the checkpoint {path} is damaged or lacks its .json ({e})",
            where=WHERE,
            todo="name the one before, or copy both files again",
        ) from e
    if of is None:
        raise ConfigError(
            f"the checkpoint {path} does not say what its network is of: an earlier version saved it",
            where=WHERE,
            todo="let that training end, with the version that began it, and start from its release",
        )
    mine = {k.removeprefix(AVERAGE): v for k, v in tensors.items() if k.startswith(AVERAGE)}
    return mine, of


def restore(tensors: dict[str, Tensor], network: nn.Module, average: nn.Module, optimizer: Optimizer) -> None:
    """Restore a checkpoint's tensors bit for bit, in each parameter's memory layout.

    Raises RoadsegError, and changes nothing, if they do not fit this network and optimizer.
    """
    if wrong := _misfits(tensors, network, average, optimizer):
        more = f" and {len(wrong) - NAMED} more" * (len(wrong) > NAMED)
        raise RoadsegError(
            f"the checkpoint is of another network or optimizer: {'; '.join(wrong[:NAMED])}{more}",
            expected="the tensors of this training's network, average and optimizer",
            todo="go on with the version of roadseg and of timm that saved it, or remove the folder checkpoints "
            "to train from the first step",
        )
    for prefix, module in ((NETWORK, network), (AVERAGE, average)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    parameters = _parameters(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    for i, name, value in _optimizer_state(tensors):
        like = parameters[i]
        if value.shape == like.shape:  # moments; a channels-last parameter's are channels-last too
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        states.setdefault(i, {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def not_saved(error: OSError, path: Path, size_bytes: int, folder: Path) -> RoadsegError:
    """The error for a failed write, with what to do. folder: of the checkpoints."""
    megabytes = f"{max(size_bytes / 1e6, 0.1):.1f} MB"
    saved = sorted(p.stem for p in folder.glob("step-*.json"))
    stands = f"it goes on after step {int(saved[-1].removeprefix('step-'))}" if saved else "it starts again"
    free = f"free {megabytes} on that disk (`roadseg clean` shows what no run needs)"
    elsewhere = "make it writable or pass another --workspace"
    found, todo = {
        errno.ENOSPC: (f"no space left for {megabytes}", free),
        errno.EDQUOT: (f"the quota leaves no room for {megabytes}", free),
        errno.EFBIG: (f"a file of {megabytes} is not allowed here", "raise the limit (ulimit -f)"),
        errno.EROFS: ("the file system is read-only", elsewhere),
        errno.EACCES: ("may not be written", elsewhere),
        errno.EPERM: ("may not be written", elsewhere),
    }.get(error.errno or 0, (f"could not be saved ({error.strerror or error})", "look after that disk"))
    return RoadsegError(found, where=str(path), todo=f"{todo}, then run again: {stands}")


def _state(network: nn.Module, average: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"{NETWORK}{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"{AVERAGE}{k}": v for k, v in average.state_dict().items()}
    states = optimizer.state_dict()["state"]
    for i, state in states.items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    tensors[WITH_STATE] = torch.tensor(sum(any(isinstance(v, Tensor) for v in s.values()) for s in states.values()))
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def _write(path: Path, data: bytes) -> None:
    """Raises OSError also if the rename or bytes were lost silently."""
    write_atomic(path, data)
    try:
        same = path.read_bytes() == data
    except FileNotFoundError:
        same = False
    if not same:
        raise OSError(errno.EIO, "it was written, but can't be read back")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises ValueError, KeyError or similar for files that differ from what was saved."""
    about = read_json(path)
    check = about.get("check")  # not in the first form
    rest = {k: v for k, v in about.items() if k != "check"}
    if not (check == sha256_bytes(json_bytes(rest)) if check else set(about) == {"step", "sha256", "bytes"}):
        raise ValueError("its JSON differs from what was saved")
    data = path.with_suffix(".safetensors").read_bytes()
    if len(data) != about["bytes"] or sha256_bytes(data) != about["sha256"]:
        raise ValueError("its SHA-256 differs from what was saved")
    return about, load_tensors(data)


def _sweep(folder: Path) -> None:
    for path in [*folder.glob(".*.tmp"), *folder.glob("step-*.safetensors")]:
        if path.name.endswith(".tmp") or not path.with_suffix(".json").exists():
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        log.warning("%s could not be removed (%s)", path, e.strerror)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _optimizer_state(tensors: Mapping[str, Tensor]) -> list[tuple[int, str, Tensor]]:
    """(index of the parameter, name, value) of the optimizer's state."""
    found = [(key.split(".", 2), tensors[key]) for key in sorted(tensors) if key != WITH_STATE]
    return [(int(parts[1]), parts[2], value) for parts, value in found if parts[0] == "optimizer"]


def _misfits(tensors: dict[str, Tensor], network: nn.Module, average: nn.Module, optimizer: Optimizer) -> list[str]:
    """A description of missing, unknown or differently shaped tensors."""
    expected = {f"{NETWORK}{k}": v for k, v in network.state_dict().items()}
    expected |= {f"{AVERAGE}{k}": v for k, v in average.state_dict().items()}
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    for key, value in sorted(tensors.items()):
        if key.startswith("optimizer."):
            continue
        if key not in expected:
            wrong.append(f"{key} is unknown")
        elif value.shape != expected[key].shape:
            wrong.append(f"{key} is {list(value.shape)}, not {list(expected[key].shape)}")
    return wrong + _optimizer_misfits(tensors, network, optimizer)


def _optimizer_misfits(tensors: dict[str, Tensor], network: nn.Module, optimizer: Optimizer) -> list[str]:
    parameters = _parameters(optimizer)
    names = {id(p): name for name, p in network.named_parameters()}
    if isinstance(optimizer, SGD):
        needed = {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    else:
        needed = {"step", "exp_avg", "exp_avg_sq"}
    states: dict[int, set[str]] = {}
    wrong = []
    for i, name, value in _optimizer_state(tensors):
        states.setdefault(i, set()).add(name)
        if i >= len(parameters) or name not in needed:
            wrong.append(f"optimizer.{i}.{name} is unknown")
        elif value.ndim and value.shape != parameters[i].shape:
            of = names.get(id(parameters[i]), "a parameter")
            wrong.append(f"optimizer.{i}.{name} is {list(value.shape)}, not {list(parameters[i].shape)} as {of}")
    wrong += [f"optimizer.{i}.{name} is missing" for i, had in sorted(states.items()) for name in sorted(needed - had)]
    if WITH_STATE in tensors and int(tensors[WITH_STATE]) != len(states):
        wrong.append(f"the optimizer's state is of {len(states)} parameters, not of {int(tensors[WITH_STATE])}")
    return wrong
