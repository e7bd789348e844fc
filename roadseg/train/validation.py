"""Score the averaged network on whole frames during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.data.shards.index import Split
from roadseg.errors import RoadsegError
from roadseg.labels import IGNORE, LabelSet
from roadseg.metrics.iou import scores
from roadseg.train.checks.memory_errors import is_out_of_memory
from roadseg.train.distributed.process_group import Ranks

CLASSES_AT_ONCE = 20


def label_map(logits_1Khw: Tensor, height: int, width: int) -> Tensor:
    """int64 [H, W]: the class of the largest bilinearly upsampled logit, a few classes at a time."""
    best = torch.full((height, width), -torch.inf, device=logits_1Khw.device)
    classes = torch.zeros((height, width), dtype=torch.int64, device=logits_1Khw.device)
    for first in range(0, logits_1Khw.shape[1], CLASSES_AT_ONCE):
        some = logits_1Khw[:, first : first + CLASSES_AT_ONCE]
        values, found = F.interpolate(some, (height, width), mode="bilinear", align_corners=False)[0].max(0)
        better = values > best
        best, classes = torch.where(better, values, best), torch.where(better, found + first, classes)
    return classes


@torch.inference_mode()
def validate(
    network: nn.Module,
    split: Split,
    num_classes: int,
    device: torch.device,
    bf16: bool,
    stopped: Callable[[], int],
    ranks: Ranks,
) -> Tensor | None:
    """int64 [K, K] confusion (rows truth) of a split's frames, on the CPU; the ranks share the frames.

    None if a rank was `stopped` before the end.
    """
    size = num_classes * num_classes
    matrix = torch.zeros(size + 1, dtype=torch.int64, device=device)  # the last element counts stopped ranks
    for index in range(ranks.rank, len(split), ranks.world):
        if stopped():
            matrix[size] = 1
            break
        image, label = split.read(index)
        image_BHWC, label_HW = (
            torch.from_numpy(image.copy())[None].to(device),
            torch.from_numpy(label.copy()).to(device),
        )
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(image_BHWC.permute(0, 3, 1, 2))
            prediction_HW = label_map(logits.float(), *label.shape)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise RoadsegError(
                f"no memory left on {device} to score a frame of {label.shape[0]}x{label.shape[1]} while training",
                where="validation",
                todo="leave it some: a smaller training.batch_size, or more training.accumulate",
            ) from e
        valid = label_HW != IGNORE
        joint = label_HW[valid].long() * num_classes + prediction_HW[valid]
        matrix[:size] += torch.bincount(joint, minlength=size)
    total = ranks.sum_(matrix).cpu()
    return None if total[size] else total[:size].reshape(num_classes, num_classes)


def score_splits(
    network: nn.Module,
    splits: Mapping[str, Split],
    label_set: LabelSet,
    device: torch.device,
    bf16: bool,
    stopped: Callable[[], int],
    ranks: Ranks,
) -> dict[str, dict[str, Any]] | None:
    """The scores of every split, by its name; None if a signal to any rank cut one short."""
    results = {}
    for name, split in splits.items():
        matrix = validate(network, split, label_set.num_classes, device, bf16, stopped, ranks)
        if matrix is None:
            return None
        results[name] = scores(matrix.numpy(), label_set)
    return results
