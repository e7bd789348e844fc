"""Estimate the memory of a training step, and advise when it does not fit."""

from __future__ import annotations

from math import floor, sqrt

import torch

from roadseg.errors import RoadsegError
from roadseg.model.deeplab import Architecture, build
from roadseg.profile.cost import LOSS, saved_by_part
from roadseg.train.checks.memory_errors import first_line
from roadseg.train.recipe import Phase, Recipe

# Peaks of 10 networks and batches on an H100, eager, fp32 and bf16, were 1.03 to 1.25 times what forward kept
# (median 1.08); compiled, the default network's was 0.73 times that.
BACKWARD = 1.15
COPIES = 5  # of the weights in float32: themselves, gradients, two moments, the average
CONTEXT_BYTES = 2 << 30  # of CUDA, cuDNN and cuBLAS, what the allocator can't fill, and the loss
FILLED = 0.9  # share of a GPU that an estimate may fill, as it may be too low
CROP_STEP_PX = 32


def step_bytes(architecture: Architecture, crop_px: tuple[int, int], images: int, bf16: bool) -> int:
    """Estimate of the GPU memory of training with micro-batches of `images` crops; frames held there don't count."""
    network = build(architecture, seed=0)
    saved = saved_by_part(network, (images, *crop_px), bf16)
    weights = sum(p.numel() for p in network.parameters())
    kept = sum(size for part, size in saved.items() if part != LOSS)
    return round(BACKWARD * kept) + 4 * COPIES * weights + CONTEXT_BYTES


def out_of_memory(
    error: BaseException, recipe: Recipe, world: int, device: torch.device, frames_bytes: int = 0
) -> RoadsegError:
    """The error to raise from `error`: what was tried, what it needs, and three changes of which each helps.

    frames_bytes: of train's frames that lie on the device.
    """
    b, bf16 = recipe.batches, recipe.loop.bf16
    images = b.batch_size // (world * b.accumulate)
    phase = max(recipe.phases, key=lambda p: p.crop_px[0] * p.crop_px[1] / p.output_stride)
    total = _memory_bytes(device)
    needed = step_bytes(recipe.architecture.at_output_stride(phase.output_stride), phase.crop_px, max(images, 2), bf16)
    share = min(FILLED * max(total - frames_bytes, 0) / needed, FILLED) if total else 0.5
    estimate = f"; about {needed / 2**30:.0f} GiB are needed, of {total / 2**30:.0f}" if total else ""
    tried = f"{images} crops of {phase.crop_px[0]}x{phase.crop_px[1]} at once in {'bf16' if bf16 else 'fp32'}"
    return RoadsegError(
        f"no memory for {tried} on {device}{estimate} ({first_line(error)})",
        todo="set one of: " + "; ".join(_advice(recipe, phase, images, share, frames_bytes)),
    )


def _advice(recipe: Recipe, phase: Phase, images: int, share: float, frames_bytes: int) -> list[str]:
    """Smaller micro-batches, a smaller crop, and what makes a step cheaper. share: of what was tried, that fits."""
    least = 1 if "batch_norm" in recipe.freeze else 2
    parts = [n for n in range(2, images + 1) if images % n == 0 and images // n >= least]
    fitting = [n for n in parts if images // n <= share * images] or parts[-1:]
    advice = [f"training.accumulate {recipe.batches.accumulate * n}" for n in fitting[:1]]
    smaller = [floor(px * sqrt(share) / CROP_STEP_PX) * CROP_STEP_PX for px in phase.crop_px]
    if min(smaller) > 0:
        advice.append(
            f"training.crop_px {smaller[0]} {smaller[1]}" + " (and those of phases)" * (len(recipe.phases) > 1)
        )
    if frames_bytes:
        advice.append("training.frames_on_gpu never")
    elif not recipe.loop.bf16:
        advice.append("training.precision bf16")
    elif not recipe.activation_checkpointing:
        advice.append("training.activation_checkpointing True")
    return advice or ["a smaller model.backbone"]


def _memory_bytes(device: torch.device) -> int:
    """Memory of a GPU without what other processes hold there; 0 for other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
