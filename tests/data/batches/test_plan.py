"""How batches reach the device."""

from __future__ import annotations

import pytest
import torch

from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches import plan as module
from roadseg.data.batches.loader import Crops
from roadseg.data.batches.plan import batches_of, check_devices, choose_loader
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.mark.parametrize(
    ("device", "train_gb", "settings", "expected", "why"),
    [
        (CPU, 1, ("auto", "auto", -1), (False, False, 0), "the training process reads"),
        (CPU, 1, ("cpu", "never", 3), (False, False, 3), "3 loader processes read crops and augment them"),
        (CUDA, 20, ("auto", "auto", -1), (True, True, 0), "all 20.0 GB of train are kept in the 80.0 GB"),
        (CUDA, 21, ("auto", "auto", -1), (False, True, 8), "8 loader processes read boxes, the GPU augments them; tra"),
        (CUDA, 21, ("auto", "always", -1), (True, True, 0), "all 21.0 GB of train"),
        (CUDA, 1, ("auto", "never", 5), (False, True, 5), "5 loader processes read boxes, the GPU augments them"),
        (CUDA, 1, ("cuda", "never", 0), (False, True, 0), "the training process reads"),
        (CUDA, 1, ("cpu", "auto", -1), (False, False, 8), "8 loader processes read crops and augment them on the CPU"),
    ],
)
def test_the_choice(
    device: torch.device, train_gb: int, settings: tuple[str, str, int], expected: tuple[bool, bool, int], why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "cores", lambda: 16)
    plan = choose_loader(train_gb * GB, device, 80 * GB * (device.type == "cuda"), *settings)
    assert (plan.frames_on_gpu, plan.augment_on_gpu, plan.workers) == expected
    assert plan.why.startswith(why)
    assert ("are over a quarter of 80.0" in plan.why) == (train_gb == 21 and not plan.frames_on_gpu)


@pytest.mark.parametrize(
    ("device", "train_gb", "settings", "where"),
    [
        (CPU, 1, ("cuda", "auto"), "training.augment_device"),
        (CPU, 1, ("auto", "always"), "training.frames_on_gpu"),
        (CUDA, 1, ("cpu", "always"), "training.frames_on_gpu"),
        (CUDA, 81, ("auto", "always"), "training.frames_on_gpu"),
    ],
)
def test_contradicting_settings_are_refused(
    device: torch.device, train_gb: int, settings: tuple[str, str], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_loader(train_gb * GB, device, 80 * GB * (device.type == "cuda"), *settings)
    assert caught.value.where == where
    if train_gb == 81:  # depends on the data
        check_devices(device, *settings)
    else:
        with pytest.raises(ConfigError) as early:
            check_devices(device, *settings)
        assert str(early.value) == str(caught.value)


@pytest.mark.gpu
def test_every_plan_gives_the_same_samples_on_a_gpu(shards: Shards) -> None:
    split = shards.split("train")
    crops = Crops(split, Augmentation((32, 48), blur=0.3), 3, (9, 8, 7))
    batches = Batches(Order(split.frames, 3), 4, 2, 40)
    memory = torch.cuda.get_device_properties(CUDA).total_memory
    made = {}
    for name, settings in {
        "crops": ("cpu", "never", 2), "boxes": ("cuda", "never", 2), "boxes here": ("cuda", "never", 0),
        "frames": ("auto", "always", 0),
    }.items():  # fmt: skip
        made[name] = list(batches_of(choose_loader(10**6, CUDA, memory, *settings), crops, batches, CUDA))
        assert [b.samples for b in made[name]] == [tuple(rows) for rows in batches]
        assert all(b.image_BHWC.is_cuda and b.label_BHW.is_cuda for b in made[name])
    for other in ("boxes here", "frames"):
        for number, (a, b) in enumerate(zip(made["boxes"], made[other], strict=True)):
            assert torch.equal(a.label_BHW, b.label_BHW), (other, number)
            off = (a.image_BHWC.int() - b.image_BHWC.int()).abs()
            assert not off.any(), (other, number, int(off.max()), off.flatten(1).count_nonzero(1).tolist())
    for a, b in zip(made["boxes"], made["crops"], strict=True):
        assert ((a.image_BHWC.int() - b.image_BHWC.int()).abs() > 4).float().mean() < 0.01
        assert (a.label_BHW != b.label_BHW).float().mean() < 0.03
