"""ClassMix (Olsson et al., 2021) for labeled crops: paste half a crop's classes into others.

Shapes: B crops, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from roadseg.data.augment.cpu import generator
from roadseg.data.batches.loader import Batch
from roadseg.labels import IGNORE


def class_mix(batch: Batch, share: float, seed: int, step: int, first_row: int, rows: int) -> Batch:
    """Paste, into a `share` of the crops, about half the classes of their neighbor (2k with 2k + 1).

    Pixels keep their position and label; void is never pasted. Random choices are a function of (seed, step, row).
    The batch holds the rows from first_row on, out of the `rows` of all processes.
    """
    # The preflight checks refuse batches whose pairs would be split between two processes.
    assert first_row % 2 == 0 and (len(batch.label_BHW) % 2 == 0 or len(batch.label_BHW) == rows)
    rng = generator(seed, 9, step)
    mixed, picks = rng.random(rows) < share, rng.random((rows, 256)) < 0.5
    mine = slice(first_row, first_row + len(batch.label_BHW))
    paired = len(batch.label_BHW) // 2 * 2
    table = mixed[mine, None] & picks[mine]
    table[:, IGNORE] = False
    device = batch.label_BHW.device
    neighbor = torch.arange(paired, device=device) ^ 1
    label, image = batch.label_BHW[:paired], batch.image_BHWC[:paired]
    other = label[neighbor]
    chosen = torch.from_numpy(table[:paired])
    # Pinned, so that the copy is only queued and does not wait for the previous step.
    chosen = chosen.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chosen
    pasted = chosen.gather(1, other.flatten(1).long()).view(other.shape)
    image_BHWC, label_BHW = batch.image_BHWC.clone(), batch.label_BHW.clone()
    label_BHW[:paired] = torch.where(pasted, other, label)
    image_BHWC[:paired] = torch.where(pasted[..., None], image[neighbor], image)
    return Batch(image_BHWC, label_BHW, batch.samples)


def class_mixed(
    batches: Iterable[Batch], share: float, seed: int, step: int, first_row: int, rows: int
) -> Iterator[Batch]:
    """Apply `class_mix` to the batches from `step` on."""
    for number, batch in enumerate(batches, step):
        yield class_mix(batch, share, seed, number, first_row, rows)
