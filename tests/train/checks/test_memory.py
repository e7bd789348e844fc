"""Memory of a training step: what is estimated, and what is advised when it runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roadseg.config.sections import Config, load_config
from roadseg.errors import ConfigError
from roadseg.model.deeplab import Architecture
from roadseg.train.checks import memory
from roadseg.train.checks.memory import CONTEXT_BYTES, out_of_memory, step_bytes
from roadseg.train.checks.memory_errors import is_out_of_memory
from roadseg.train.recipe import Recipe, recipe_of

SMALL = Architecture(
    num_classes=3, backbone="test_efficientnet", channels=8, head="separable", atrous_rates=(1, 2), low_levels=(8, 4)
)
CUDA = torch.device("cuda", 1)
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB.\nmore")


def recipe(device_type: str = "cuda", **training: object) -> Recipe:
    config: Config = load_config(None, {"training": {"epochs": 1, **training}})
    return replace(recipe_of(config, num_classes=3, device_type=device_type, frames=1000), architecture=SMALL)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR"), False),
        (MemoryError(), True),
        (ConfigError("out of memory"), False),
    ],
)
def test_errors_of_missing_memory_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_estimate_grows_with_pixels_and_images_and_falls_in_bf16() -> None:
    def step(crop_px: tuple[int, int], images: int, bf16: bool = False) -> int:
        return step_bytes(SMALL, crop_px, images, bf16) - CONTEXT_BYTES

    whole = step((256, 512), 4)
    assert step((512, 512), 4) == pytest.approx(2 * whole, rel=0.1)
    assert step((256, 512), 8) == pytest.approx(2 * whole, rel=0.1)
    assert 0.4 * whole < step((256, 512), 4, bf16=True) < 0.75 * whole


def test_the_default_networks_estimate_is_near_its_peak_on_an_h100() -> None:
    """Peaks of a step in eager mode there, with the loss that makes no full-size map: GiB."""
    peaks = [((768, 768), 16, False, 18.8), ((768, 768), 4, True, 2.5), ((360, 480), 16, True, 2.9)]
    for crop_px, batch, bf16, peak in peaks:
        estimate = (step_bytes(Architecture(num_classes=19), crop_px, batch, bf16) - CONTEXT_BYTES) / 2**30
        assert 0.9 * peak < estimate < 1.25 * peak


def test_the_error_says_what_was_tried_and_advises_three_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: 4 << 30)
    phases = [{"after": 0.5, "crop_px": [1024, 1024]}]
    e = out_of_memory(ERROR, recipe(crop_px=[512, 512], batch_size=64, phases=phases), 2, CUDA)
    assert e.found.startswith("no memory for 32 crops of 1024x1024 at once in bf16 on cuda:1; about ")
    assert "GiB are needed, of 4 (CUDA out of memory. Tried to allocate 2.25 GiB.)" in e.found and e.exit_code == 1
    accumulate, crop, cheaper = e.todo.removeprefix("set one of: ").split("; ")
    assert accumulate.startswith("training.accumulate ") and 32 % int(accumulate.split()[1]) == 0
    assert crop.startswith("training.crop_px ") and crop.endswith("(and those of phases)")
    assert int(crop.split()[1]) < 1024
    assert cheaper == "training.activation_checkpointing True"


def test_advice_fits_the_recipe() -> None:
    on_cpu = out_of_memory(MemoryError(), recipe("cpu", batch_size=4, crop_px=[48, 96]), 1, torch.device("cpu"))
    assert "on cpu (MemoryError)" in on_cpu.found
    assert "training.accumulate 2" in on_cpu.todo and "training.precision bf16" in on_cpu.todo
    held = out_of_memory(MemoryError(), recipe(batch_size=4), 1, torch.device("cpu"), frames_bytes=1 << 30)
    assert "training.frames_on_gpu never" in held.todo
    one = out_of_memory(MemoryError(), recipe(batch_size=2), 1, torch.device("cpu"))  # batch norm needs two images
    assert "training.accumulate" not in one.todo
    frozen = out_of_memory(MemoryError(), recipe(batch_size=2, freeze=["batch_norm"]), 1, torch.device("cpu"))
    assert "training.accumulate 2" in frozen.todo
