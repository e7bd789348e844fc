"""Select pixels for a loss term: the hardest ones (OHEM), or those near another class.

Results have no gradient, shapes never depend on values, and nothing waits for the device.

Shapes: B images of this rank, K classes, H W the label, h w the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from roadseg.labels import IGNORE
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.losses.pixel import true_class_losses


@torch.no_grad()
def hardest(logits_BKhw: Tensor, label_BHW: Tensor, threshold: float, keep: float, ranks: Ranks = ALONE) -> Tensor:
    """float32 [B, H, W], 1 for the pixels that OHEM (Shrivastava et al. 2016) keeps, 0 for the others.

    Kept are valid pixels whose true class has a probability below `threshold`; if these are fewer than
    k = ceil(keep x valid pixels), the k pixels of all ranks with the lowest probability. The k-th loss is exact;
    pixels that tie with it share the rest of k, so that the weights add up to k. Class weights and label smoothing do
    not affect the selection.
    """
    valid = label_BHW != IGNORE
    loss = true_class_losses(logits_BKhw, label_BHW)
    # Non-negative floats are ordered as their bits; -1 is below all of them.
    bits = torch.where(valid, loss.abs().view(torch.int32), -1)
    k = torch.ceil(ranks.sum_(valid.sum()).float() * keep).long()
    kth = _kth_largest(bits, k, ranks)
    above, ties = bits > kth, bits == kth
    more, tied = ranks.sum_(torch.stack([above.sum(), ties.sum()]))
    share = (k - more).float() / tied.clamp(min=1).float()
    hard = above | (valid & (loss > -math.log(threshold)))
    return torch.where(hard, 1.0, torch.where(ties, share, 0.0))


def _kth_largest(bits: Tensor, k: Tensor, ranks: Ranks) -> Tensor:
    """The k-th largest of all ranks' int32 `bits`, negative ones left out; int32's largest for k = 0.

    A radix select of one bit per pass: k is known only on the device, and 31 passes over the map take less time there
    than sorting it. Each pass needs one all-reduce of one number.
    """
    found = torch.zeros((), dtype=torch.int32, device=bits.device)
    for bit in range(30, -1, -1):
        tried = found + (1 << bit)
        found = torch.where(ranks.sum_((bits >= tried).sum()) >= k, tried, found)
    return found


@torch.no_grad()
def near_another_class(label_BHW: Tensor, reach_px: int) -> Tensor:
    """float32 [B, H, W]: 1 for valid pixels with another class in the square of +-reach_px around them.

    Void is not a class: a border between a class and void does not count.
    """
    label = label_BHW.to(torch.uint8)  # void (255) is never the lowest class, and never the highest when written as 0
    valid = label != IGNORE
    highest = _over_windows(torch.where(valid, label, 0), reach_px, torch.maximum, 0)
    lowest = _over_windows(label, reach_px, torch.minimum, IGNORE)
    return (valid & (highest > lowest)).float()


def _over_windows(map_BHW: Tensor, reach_px: int, pick: Callable[[Tensor, Tensor], Tensor], outside: int) -> Tensor:
    """`pick` over the square around each pixel, doubling the window a pass: max_pool2d takes no uint8 and is slower."""
    window = 2 * reach_px + 1
    picked = F.pad(map_BHW, (reach_px,) * 4, value=outside)
    for dim in (1, 2):
        reached = 1
        while reached < window:
            step = min(reached, window - reached)
            length = picked.shape[dim] - step
            picked = pick(picked.narrow(dim, 0, length), picked.narrow(dim, step, length))
            reached += step
    return picked
