"""Distillation from a teacher's class scores (Hinton et al., 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadseg.errors import ConfigError
from roadseg.labels import LabelSet
from roadseg.release.archive import Release
from roadseg.train.losses.pixel import at_least_float32, upsample


class Distillation:
    """weight x temperature^2 x KL(teacher || student) of the softmax of logits / temperature.

    teacher: image [B, 3, H, W] to logits [B, K, h', w'], on the student's device; it is set to eval mode
    and its parameters are frozen here.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight, self._temperature = weight, temperature

    def __call__(self, image_BCHW: Tensor, student_BKhw: Tensor, parts: int) -> Tensor:
        """The mean over all cells of the student's grid, void and padded ones too, divided by `parts`.

        The teacher runs under the caller's autocast; its logits are resized (bilinear) to the student's
        grid. Scalar in float32, or in float64 for float64 logits; added over the equal parts of a batch
        it is the whole batch's.
        """
        with torch.no_grad():
            taught = at_least_float32(self._teacher(image_BCHW))
            if taught.shape[2:] != student_BKhw.shape[2:]:
                taught = upsample(taught, *student_BKhw.shape[2:])
            log_t = F.log_softmax(taught / self._temperature, dim=1)
        log_s = F.log_softmax(at_least_float32(student_BKhw) / self._temperature, dim=1)
        cells = log_s.numel() // log_s.shape[1] * parts
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return self._weight * self._temperature**2 / cells * divergence


def refuse_other_classes(teacher: Release, label_set: LabelSet) -> None:
    """Raises ConfigError unless the teacher's classes are the data's, in the same order."""
    if teacher.label_set.names != label_set.names:
        raise ConfigError(
            f"release {teacher.digest[:12]} knows other classes ({', '.join(teacher.label_set.names)})",
            expected=", ".join(label_set.names),
            where="training.distill_from",
            todo="learn from a release that was trained on the same classes, or set training.distill_from to ''",
        )
