"""Checkpoints: one safetensors file with everything that training needs to go on, and a JSON beside it.

The JSON is written last and holds the SHA-256 of the tensors: what has no matching JSON was never saved.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from roadseg.files import read_json, sha256_bytes, write_atomic, write_json

log = logging.getLogger(__name__)
KEPT = 2


def save(folder: Path, step: int, network: nn.Module, average: nn.Module, optimizer: Optimizer) -> None:
    """Save the state after `step` steps, then remove all but the newest checkpoints."""
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    data = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    path = folder / f"step-{step:08d}.safetensors"
    write_atomic(path, data)
    write_json(path.with_suffix(".json"), {"step": step, "sha256": sha256_bytes(data), "bytes": len(data)})
    prune(folder, KEPT)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what a kill left half-written."""
    for path in sorted(folder.glob("step-*.json"))[:-keep]:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)
    for path in [*folder.glob(".*.tmp"), *folder.glob("step-*.safetensors")]:
        if path.name.endswith(".tmp") or not path.with_suffix(".json").exists():
            path.unlink()


def newest(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest checkpoint whose digest holds, or None."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            about = read_json(path)
            data = path.with_suffix(".safetensors").read_bytes()
            if sha256_bytes(data) != about["sha256"]:
                raise ValueError("its SHA-256 differs from what was saved")
            return int(about["step"]), load_tensors(data)
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path.stem, e)
    return None


def restore(tensors: dict[str, Tensor], network: nn.Module, average: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors where they came from, bit for bit, in each parameter's memory layout."""
    for prefix, module in (("network.", network), ("average.", average)):
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            like = parameters[int(i)]
            if value.shape == like.shape:  # moments; a channels-last parameter's are channels-last too
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            states.setdefault(int(i), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})
