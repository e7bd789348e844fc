"""Draw the label maps of the same few frames at every validation.

Shapes: H W the frame, h w its panel in the picture, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from roadseg.data.shards.index import Split
from roadseg.files import write_atomic
from roadseg.images.decode import encode_jpeg
from roadseg.labels import IGNORE, LabelSet
from roadseg.report.progress_strip import grid, name_of, step_of

MOST_FRAMES = 16
PANEL_PX = 480  # longest side of a panel
KEPT = 12  # pictures: the first, the last and ten between
VOID = 40  # grey of void in the truth; a prediction there, which nothing scores, is dimmed


def evenly(length: int, most: int) -> list[int]:
    """At most `most` indexes of `length` things, ascending and evenly spaced, first and last included."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(most, length)).round()})


class Pictures:
    """log/pictures/step-00001200.jpg: one row per frame with image, truth and prediction.

    chosen: indexes into `split`, such as evenly(len(split), 4). folder: where the pictures go.
    """

    def __init__(self, split: Split, label_set: LabelSet, chosen: Sequence[int], folder: Path) -> None:
        assert len(chosen) <= MOST_FRAMES
        self._split, self._palette, self._chosen, self._folder = split, label_set.palette, chosen, folder

    def draw(self, network: nn.Module, step: int, device: torch.device, bf16: bool) -> Path | None:
        """The picture after `step`; None without frames. `network`: in eval mode, uint8 [1, 3, H, W] to logits.

        The same weights give the same picture. Pictures of later steps, left by a killed run, are removed.
        """
        assert not network.training, "its batch norm would learn from frames that are only drawn"
        if not self._chosen:
            return None
        rows = [self._row(network, index, device, bf16) for index in self._chosen]
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name_of(step)
        write_atomic(path, encode_jpeg(grid(rows), 85))
        steps = {step_of(p): p for p in self._folder.glob("step-*.jpg")}
        kept = thinned([s for s in steps if s <= step])
        for s, found in steps.items():
            if s not in kept:
                found.unlink()
        return path

    @torch.inference_mode()
    def _row(self, network: nn.Module, index: int, device: torch.device, bf16: bool) -> list[np.ndarray]:
        image, label = self._split.read(index)
        image_1HWC = torch.from_numpy(image.copy())[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(image_1HWC.permute(0, 3, 1, 2))
        classes_HW = F.interpolate(logits.float(), label.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        return panels(image, label, classes_HW.byte().cpu().numpy(), self._palette)


def panels(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, palette: np.ndarray) -> list[np.ndarray]:
    """Frame, truth and prediction as uint8 [h, w, 3] RGB, shrunk to PANEL_PX at most.

    image: uint8 [H, W, 3]. label, prediction: uint8 [H, W] train ids. palette: uint8 [256, 3].
    """
    height, width = label.shape
    scale = min(1.0, PANEL_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    truth, classes = (cv2.resize(a, size, interpolation=cv2.INTER_NEAREST) for a in (label, prediction))
    void = (truth == IGNORE)[..., None]
    coloured = palette[classes]
    return [small, np.where(void, np.uint8(VOID), palette[truth]), np.where(void, coloured // 3, coloured)]


def thinned(steps: Sequence[int], most: int = KEPT) -> list[int]:
    """At most `most` of `steps`: the first, the last, and others such that the smallest gaps are removed.

    Called after every picture, it keeps the gaps between pictures within a factor of three.
    """
    kept = sorted(steps)
    while len(kept) > most:
        gaps = [kept[i + 1] - kept[i - 1] for i in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
    return kept
