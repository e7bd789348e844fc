"""The loss of a batch: a weighted sum of terms for each head, computed in parts that add up.

Shapes: B images of a part, K classes, H W the label, h w a head's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roadseg.model.deeplab import TrainingOutput
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.losses.hard_pixels import hardest, near_another_class
from roadseg.train.losses.pixel import at_least_float32, class_weight_of, cross_entropy_sum, focal_sum, positive_or_1
from roadseg.train.losses.region import lovasz_softmax, region_mutual_information, soft_dice, truth_on_grid


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of one head's loss; 0 leaves a term out."""

    cross_entropy: float = 1.0
    ohem: float = 0.0
    focal: float = 0.0
    lovasz: float = 0.0
    dice: float = 0.0
    boundary: float = 0.0
    rmi: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion:
    """Loss of the main head plus auxiliary_weight x the loss of every auxiliary head.

    class_weights_K: float32 on the logits' device; they weigh the pixels of cross_entropy, focal, ohem
    and boundary. label_smoothing: of cross_entropy, ohem and boundary, which share one pass over the
    upsampled logits. ohem_threshold, ohem_keep: see hard_pixels.hardest. boundary_px: see
    near_another_class. ranks: that compute the batch together.
    """

    main: Terms
    auxiliary: Terms
    auxiliary_weight: float
    class_weights_K: Tensor | None
    label_smoothing: float
    ohem_threshold: float
    ohem_keep: float
    focal_gamma: float
    boundary_px: int
    ranks: Ranks = ALONE

    def counts(self, label_BHW: Tensor) -> Tensor:
        """float32 [2]: the weights of all valid pixels and of those near another class, summed.

        cross_entropy and focal are means over the first, boundary over the second. The caller adds the
        counts of all parts of a batch.
        """
        weights = class_weight_of(label_BHW, self.class_weights_K)
        boundary = self._boundary_of(label_BHW)
        return torch.stack([weights.sum(), weights.new_zeros(()) if boundary is None else (weights * boundary).sum()])

    def __call__(self, output: Tensor | TrainingOutput, label_BHW: Tensor, counts_total: Tensor, parts: int) -> Tensor:
        """One part's share of the batch's loss: a scalar in float32, or in float64 for float64 logits.

        Added over the `parts` equal parts (micro-batches x ranks) the shares of cross_entropy, focal, boundary
        and rmi are the whole batch's means; ohem, lovasz and dice are the mean over the micro-batches, each
        of all ranks' images. counts_total: the sum of all parts' counts; a term whose count is 0 is 0.
        """
        counts = positive_or_1(counts_total)
        boundary = self._boundary_of(label_BHW)
        if isinstance(output, Tensor):
            return self._head(output, label_BHW, boundary, counts, parts, self.main)
        total = self._head(output.logits, label_BHW, boundary, counts, parts, self.main)
        for logits in output.auxiliary if self.auxiliary_weight else ():
            loss = self._head(logits, label_BHW, boundary, counts, parts, self.auxiliary)
            total = total + self.auxiliary_weight * loss
        return total

    def _boundary_of(self, label_BHW: Tensor) -> Tensor | None:
        wanted = self.main.boundary or self.auxiliary.boundary
        return near_another_class(label_BHW, self.boundary_px) if wanted else None

    def _head(
        self, logits: Tensor, label: Tensor, boundary: Tensor | None, counts: Tensor, parts: int, terms: Terms
    ) -> Tensor:
        total = torch.zeros((), device=logits.device)
        if terms.cross_entropy or terms.ohem or terms.boundary:
            total = total + self._cross_entropies(logits, label, boundary, counts, parts, terms)
        if terms.focal:
            loss = focal_sum(logits, label, self.class_weights_K, self.focal_gamma)
            total = total + terms.focal * loss / counts[0]
        if terms.lovasz or terms.dice or terms.rmi:
            total = total + self._regions(logits, label, parts, terms)
        return total

    def _cross_entropies(
        self, logits: Tensor, label: Tensor, boundary: Tensor | None, counts: Tensor, parts: int, terms: Terms
    ) -> Tensor:
        """cross_entropy, ohem and boundary combined to one weight per pixel, so that one pass is enough."""
        every = terms.cross_entropy / counts[0]
        if not (terms.ohem or terms.boundary):
            return every * cross_entropy_sum(logits, label, self.class_weights_K, self.label_smoothing)
        weights = every.expand(label.shape)
        if boundary is not None:
            weights = weights + terms.boundary / counts[1] * boundary
        if terms.ohem:
            hard = hardest(logits, label, self.ohem_threshold, self.ohem_keep, self.ranks)
            count = self.ranks.sum_((hard * class_weight_of(label, self.class_weights_K)).sum())
            weights = weights + terms.ohem * self.ranks.world / parts / positive_or_1(count) * hard
        return cross_entropy_sum(logits, label, self.class_weights_K, self.label_smoothing, weights)

    def _regions(self, logits: Tensor, label: Tensor, parts: int, terms: Terms) -> Tensor:
        fine = at_least_float32(logits)
        truth = truth_on_grid(label, logits.shape[2], logits.shape[3], logits.shape[1])
        total, micro_batches = torch.zeros((), device=logits.device), parts // self.ranks.world
        if terms.lovasz or terms.dice:
            p = fine.softmax(dim=1)
            if terms.lovasz:
                total = total + terms.lovasz / micro_batches * lovasz_softmax(p, truth, self.ranks)
            if terms.dice:
                total = total + terms.dice / micro_batches * soft_dice(p, truth, self.ranks)
        if terms.rmi:
            stride = label.shape[1] / logits.shape[2]
            total = total + terms.rmi / parts * region_mutual_information(fine, truth, stride)
        return total
