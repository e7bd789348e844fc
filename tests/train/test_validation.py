"""Confusion of whole frames: against integers counted by hand, a few classes at a time, and with its own error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from roadseg.data.shards.index import Shards
from roadseg.errors import RoadsegError
from roadseg.labels import IGNORE
from roadseg.train import validation
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.validation import label_map, validate

CPU = torch.device("cpu")


class Fixed(nn.Module):
    """Logits that depend on the mean colour of 4x4 cells alone."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        cells = F.avg_pool2d(image.float(), 4, ceil_mode=True)
        return torch.cat([cells[:, :1], cells[:, 1:2], cells[:, 2:]], 1)


@pytest.mark.parametrize("at_once", [1, 2, 20])
def test_a_few_classes_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(validation, "CLASSES_AT_ONCE", at_once)
    logits = torch.randn(1, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits, (25, 33), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(label_map(logits, 25, 33), expected)


def test_it_counts_what_is_there_and_ranks_share_the_frames(shards: Shards) -> None:
    val = shards.split("val")
    counted = torch.zeros(3, 3, dtype=torch.int64)
    for index in range(len(val)):
        image, label = (torch.from_numpy(a.copy()) for a in val.read(index))
        found = label_map(Fixed()(image.permute(2, 0, 1)[None]), *label.shape)
        for truth, predicted in zip(label.flatten().tolist(), found.flatten().tolist(), strict=True):
            if truth != IGNORE:
                counted[truth, predicted] += 1
    whole = validate(Fixed(), val, 3, CPU, False, lambda: 0, ALONE)
    assert whole is not None and torch.equal(whole, counted)

    class Half(Ranks):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    parts = [validate(Fixed(), val, 3, CPU, False, lambda: 0, Half(rank, 2)) for rank in (0, 1)]
    assert torch.equal(sum(p for p in parts if p is not None), counted)


def test_a_signal_leaves_no_scores(shards: Shards) -> None:
    assert validate(Fixed(), shards.split("val"), 3, CPU, False, lambda: 15, ALONE) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_no_memory_for_a_frame_is_told_as_that(shards: Shards, error: Exception) -> None:
    class Full(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(RoadsegError, match=r"validation: no memory left on cpu to score a frame of \d+x\d+ while"):
        validate(Full(), shards.split("val"), 3, CPU, False, lambda: 0, ALONE)
