"""What a step minimizes: the criterion on labels, plus distillation.

Shapes: B samples, H W the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roadseg.train.losses.criterion import Criterion
from roadseg.train.losses.distillation import Distillation


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss in parts (micro-batches of every rank), whose sum is the loss of the whole batch.

    bf16: whether the teacher runs under autocast, as the network does.
    """

    criterion: Criterion
    distillation: Distillation | None = None
    bf16: bool = False

    def counts(self, label_BHW: Tensor) -> Tensor:
        """float32 [n]: divisors of the means over pixels; sum them over all parts before computing the first one."""
        return self.criterion.counts(label_BHW)

    def __call__(self, image_BCHW: Tensor, output: Any, label_BHW: Tensor, counts: Tensor, parts: int) -> Tensor:
        """One part's share of the loss, a scalar."""
        loss = self.criterion(output, label_BHW, counts, parts)
        if self.distillation is None:
            return loss
        logits = output if isinstance(output, Tensor) else output.logits
        with torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return loss + self.distillation(image_BCHW, logits, parts)
