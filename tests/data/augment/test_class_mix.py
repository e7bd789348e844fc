"""ClassMix between neighboring crops: image and label together, equal on one process and on two."""

import pytest
import torch

from roadseg.data.augment.class_mix import class_mix
from roadseg.data.batches.loader import Batch
from roadseg.labels import IGNORE


def batch(rows: int = 6) -> Batch:
    """Every pixel of row r has the color r; labels are drawn, void among them."""
    draw = torch.Generator().manual_seed(1)
    label = torch.randint(0, 5, (rows, 8, 10), dtype=torch.uint8, generator=draw)
    label[label == 4] = IGNORE
    image = torch.arange(rows, dtype=torch.uint8)[:, None, None, None].expand(rows, 8, 10, 3).contiguous()
    return Batch(image, label, ())


def test_whole_classes_of_the_neighbor_are_pasted_with_their_labels() -> None:
    before = batch()
    after = class_mix(before, 1.0, 3, 17, 0, 6)
    for row in range(6):
        pasted = after.image_BHWC[row, ..., 0] == row ^ 1
        kept = after.image_BHWC[row, ..., 0] == row
        assert (pasted | kept).all() and pasted.any() and kept.any()
        neighbour = before.label_BHW[row ^ 1]
        assert torch.equal(after.label_BHW[row][pasted], neighbour[pasted])
        assert torch.equal(after.label_BHW[row][kept], before.label_BHW[row][kept])
        for train_id in neighbour.unique():
            share = pasted[neighbour == train_id].float().mean()
            assert share in (0, 1) and not (train_id == IGNORE and share)


def test_a_share_of_the_crops_is_mixed_and_the_input_is_unchanged() -> None:
    before = batch(200)
    image = before.image_BHWC.clone()
    after = class_mix(before, 0.3, 0, 0, 0, 200)
    changed = (after.image_BHWC != image).flatten(1).any(1).float().mean()
    assert 0.2 < changed < 0.4 and torch.equal(before.image_BHWC, image)
    assert torch.equal(class_mix(before, 0.0, 0, 0, 0, 200).label_BHW, before.label_BHW)


def test_two_processes_equal_one_and_a_step_is_deterministic() -> None:
    whole = class_mix(batch(8), 0.5, 2, 5, 0, 8)
    full = batch(8)
    halves = [
        class_mix(Batch(full.image_BHWC[s], full.label_BHW[s], ()), 0.5, 2, 5, s.start, 8)
        for s in (slice(0, 4), slice(4, 8))
    ]
    assert torch.equal(torch.cat([h.label_BHW for h in halves]), whole.label_BHW)
    assert torch.equal(torch.cat([h.image_BHWC for h in halves]), whole.image_BHWC)
    assert not torch.equal(class_mix(batch(8), 0.5, 2, 6, 0, 8).label_BHW, whole.label_BHW)


@pytest.mark.parametrize("first_row", [0, 3])
def test_pairs_must_not_span_processes(first_row: int) -> None:
    """The preflight checks refuse such batches before training."""
    with pytest.raises(AssertionError):
        class_mix(batch(3), 1.0, 0, 0, first_row, 6)


def test_a_crop_without_a_neighbor_is_unchanged() -> None:
    after = class_mix(batch(5), 1.0, 0, 0, 0, 5)
    assert torch.equal(after.label_BHW[4], batch(5).label_BHW[4])
