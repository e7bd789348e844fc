"""Which way batches come, and that it is said."""

from __future__ import annotations

import re

import pytest
import torch

from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches import feed as module
from roadseg.data.batches.feed import choose_feed, feed, refuse_places
from roadseg.data.batches.loader import Crops
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.mark.parametrize(
    ("device", "train_gb", "settings", "way", "why"),
    [
        (
            CPU,
            1,
            ("auto", "auto", -1),
            (False, False, 0),
            "crops are read and augmented by the training process, on the CPU",
        ),
        (
            CPU,
            1,
            ("cpu", "never", 3),
            (False, False, 3),
            "crops are read and augmented by 3 loader processes, on the CPU",
        ),
        (CUDA, 20, ("auto", "auto", -1), (True, True, 0), "all 20.0 GB of train lie in the GPU's 80.0; no"),
        (
            CUDA,
            21,
            ("auto", "auto", -1),
            (False, True, 8),
            "boxes are read by 8 loader processes and augmented by the GPU; tra",
        ),
        (CUDA, 21, ("auto", "always", -1), (True, True, 0), "all 21.0 GB of train"),
        (
            CUDA,
            1,
            ("auto", "never", 5),
            (False, True, 5),
            "boxes are read by 5 loader processes and augmented by the GPU",
        ),
        (CUDA, 1, ("cuda", "never", 0), (False, True, 0), "boxes are read by the training process"),
        (
            CUDA,
            1,
            ("cpu", "auto", -1),
            (False, False, 8),
            "crops are read and augmented by 8 loader processes, on the CPU",
        ),
    ],
)
def test_the_choice(
    device: torch.device, train_gb: int, settings: tuple[str, str, int], way: tuple[bool, bool, int], why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "cores", lambda: 16)
    chosen = choose_feed(train_gb * GB, device, 80 * GB * (device.type == "cuda"), *settings)
    assert (chosen.frames_on_gpu, chosen.augment_on_gpu, chosen.workers) == way
    assert chosen.why.startswith(why)
    assert ("are over a quarter of 80.0" in chosen.why) == (train_gb == 21 and not chosen.frames_on_gpu)


@pytest.mark.parametrize(
    ("device", "train_gb", "settings", "where"),
    [
        (CPU, 1, ("cuda", "auto"), "training.augment_device: cuda, but training runs on cpu"),
        (CPU, 1, ("auto", "always"), "training.frames_on_gpu: always"),
        (CUDA, 1, ("cpu", "always"), "training.frames_on_gpu: always, .* training.augment_device cpu"),
        (CUDA, 81, ("auto", "always"), "training.frames_on_gpu: always, with 81.0 GB .* cuda .80.0 GB."),
    ],
)
def test_what_can_not_be(device: torch.device, train_gb: int, settings: tuple[str, str], where: str) -> None:
    with pytest.raises(ConfigError, match=where) as caught:
        choose_feed(train_gb * GB, device, 80 * GB * (device.type == "cuda"), *settings)
    if train_gb == 81:  # only the data tells that
        refuse_places(device, *settings)
    else:
        with pytest.raises(ConfigError, match=re.escape(str(caught.value))):
            refuse_places(device, *settings)


@pytest.mark.gpu
def test_every_way_gives_the_same_samples_on_a_gpu(shards: Shards) -> None:
    split = shards.split("train")
    crops = Crops(split, Augmentation((32, 48), blur=0.3), 3, (9, 8, 7))
    batches = Batches(Order(split.frames, 3), 4, 2, 40)
    memory = torch.cuda.get_device_properties(CUDA).total_memory
    made = {}
    for name, settings in {
        "crops": ("cpu", "never", 2), "boxes": ("cuda", "never", 2), "boxes here": ("cuda", "never", 0),
        "resident": ("auto", "always", 0),
    }.items():  # fmt: skip
        made[name] = list(feed(choose_feed(10**6, CUDA, memory, *settings), crops, batches, CUDA))
        assert [b.samples for b in made[name]] == [tuple(rows) for rows in batches]
        assert all(b.image_BHWC.is_cuda and b.label_BHW.is_cuda for b in made[name])
    for other in ("boxes here", "resident"):
        for number, (a, b) in enumerate(zip(made["boxes"], made[other], strict=True)):
            assert torch.equal(a.label_BHW, b.label_BHW), (other, number)
            off = (a.image_BHWC.int() - b.image_BHWC.int()).abs()
            assert not off.any(), (other, number, int(off.max()), off.flatten(1).count_nonzero(1).tolist())
    for a, b in zip(made["boxes"], made["crops"], strict=True):
        assert ((a.image_BHWC.int() - b.image_BHWC.int()).abs() > 4).float().mean() < 0.01
        assert (a.label_BHW != b.label_BHW).float().mean() < 0.03
