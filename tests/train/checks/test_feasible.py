"""What can't be trained is told at once, before the first step, and what would fit after memory ran out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from roadseg.config.training import Augment, Phase, Training
from roadseg.data.augment.cpu import Augmentation, draw, generator
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError
from roadseg.model.deeplab import Architecture, build
from roadseg.model.surgery import blocks, checkpoint_activations
from roadseg.train.checks import feasible as refusals
from roadseg.train.checks.feasible import (
    image_share,
    out_of_memory,
    ran_out,
    refuse_impossible,
    refuse_whatever_the_data,
    what_fits,
)
from roadseg.train.checks.memory import CONTEXT_BYTES, activation_bytes, step_bytes

SMALL = Architecture(3, "test_efficientnet", channels=8, head="separable", atrous_rates=(1, 2))
FITS = Training(crop_px=(48, 96), batch_size=4)  # frames are 48x96
IN_PARTS = "batch norm then sees a part of the batch at a time"


def refused(shards: Shards, t: Training, world: int = 1, architecture: Architecture = SMALL) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_impossible(t, architecture, shards, shards.split("train"), world)
    return str(caught.value)


def change(**fields: object) -> Training:
    return Training.model_validate({**FITS.model_dump(), **fields})


def test_crops_that_no_frame_fills_are_warned_of(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    refuse_impossible(change(crop_px=(64, 96)), SMALL, shards, shards.split("train"))
    (line,) = caplog.messages
    assert line.startswith(
        "training.crop_px: crops of 64x96 reach beyond frames of 48x96: 22 % of what they show is pad"
    )


def test_what_can_be_trained_is_neither_refused_nor_warned_of(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    for t in (FITS, change(crop_px=(48, 96)), change(crop_px=(17, 17)), change(batch_size=8, accumulate=2)):
        refuse_impossible(t, SMALL, shards, shards.split("train"))
    refuse_impossible(change(batch_size=8, accumulate=2), SMALL, shards, shards.split("train"), 2)
    assert not caplog.records


def test_all_problems_are_told_in_one_error(shards: Shards) -> None:
    none = replace(shards, class_pixels={"train": [500, 0, 0, 40]}, shards={"train": shards.shards["train"]})
    text = refused(none, change(crop_px=(512, 512), batch_size=5, accumulate=1, patience=3), world=2)
    assert text.startswith("4 things that can't be trained:\n")
    assert "training.crop_px: 9" in text and "frames are 48x96 (most of them) and drawn at 0.5 to 2 times" in text
    assert "set at most 48 96, or raise training.augment.scale" in text
    assert (
        "training.batch_size: 5 samples can't be shared evenly by 2 processes; expected a multiple of 2; set 4" in text
    )
    assert "data: no class but road has a pixel in train" in text
    assert "become (data.taxonomy; of source folder, the YAML that data.labels names)" in text
    assert "training.patience: it looks at the split val, which is not there (besides train: none)" in text
    one = refused(shards, change(batch_size=1), world=2)
    assert "expected a multiple of 2; set 2: it counts the samples of a step over all of them" in one


@pytest.mark.parametrize(
    ("values", "most"),
    [({"steps": 100, "patience": 9}, 8), ({"steps": 20, "validate_every": 500, "patience": 1}, 0)],
)
def test_patience_that_never_acts_is_refused(shards: Shards, values: dict[str, int], most: int) -> None:
    text = refused(shards, change(epochs=None, **values))
    advice = f"set it to {f'{most} at most' if most else 0}, or validate more often"
    assert f"a run of {values['steps']} steps never ends early; {advice}" in text
    assert ("1 validation after" if values["patience"] == 1 else "9 validations after") in text
    assert text.startswith("1 thing ")
    with pytest.raises(ConfigError, match="never ends early"):  # the steps are given
        refuse_whatever_the_data(change(epochs=None, **values), SMALL)
    refuse_impossible(change(epochs=None, **{**values, "patience": most}), SMALL, shards, shards.split("train"))


def test_crops_of_later_phases_are_looked_at_too(shards: Shards) -> None:
    phases = (Phase(after=0.5, crop_px=(256, 256)), Phase(after=0.8, output_stride=32, crop_px=(32, 20)))
    text = refused(shards, change(phases=phases))
    assert "crops of 256x256 show would be padding" in text
    assert "a crop of 32x20 is one cell of the map at output stride 32; set sides of 128 or more, as far" in text


def test_phases_without_a_step_are_refused(shards: Shards) -> None:
    phases = (Phase(after=0.1, crop_px=(32, 64)), Phase(after=0.8, crop_px=(48, 96)))
    said = refused(shards, change(steps=2, phases=phases))
    assert "what comes before the first phase has none of the 2 steps" in said
    assert "the phase after 0.8 has none of the 2 steps" in said and "phase after 0.1" not in said
    with pytest.raises(ConfigError, match=r"the phase after 0\.8 has none of the 2 steps"):
        refuse_whatever_the_data(change(steps=2, phases=phases), SMALL)
    few = change(epochs=1, phases=phases)  # six frames, so two steps: the data says that
    assert "the phase after 0.8 has none of the 2 steps" in refused(shards, few)
    refuse_whatever_the_data(few, SMALL)
    refuse_impossible(change(steps=10, phases=phases), SMALL, shards, shards.split("train"))


@pytest.mark.parametrize(
    "status", ["CUBLAS_STATUS_ALLOC_FAILED when calling `x`", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"]
)
def test_libraries_that_got_no_memory_ran_out_too(status: str) -> None:
    assert ran_out(RuntimeError(f"CUDA error: {status}")) and not ran_out(RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR"))


def test_frames_that_are_always_enlarged_may_be_smaller_than_the_crop(shards: Shards) -> None:
    t = change(crop_px=(128, 256))
    assert "would be padding" in refused(shards, t)
    enlarged = change(crop_px=(128, 256), augment=Augment(scale=(2.0, 4.0)))
    refuse_impossible(enlarged, SMALL, shards, shards.split("train"))


@pytest.mark.parametrize("crop_px", [(48, 96), (100, 64), (300, 500)])
def test_the_share_of_image_is_that_of_draws(crop_px: tuple[int, int]) -> None:
    sizes = Counter({(48, 96): 3, (200, 100): 1})
    shares = []
    for number in range(4000):
        height, width = list(sizes.elements())[number % 4]
        inner = draw(Augmentation(crop_px, (0.5, 2.0)), generator(1, number), height, width).inner
        shares.append(inner[2] * inner[3] / (crop_px[0] * crop_px[1]))
    assert image_share(sizes, crop_px, (0.5, 2.0)) == pytest.approx(np.mean(shares), abs=0.01)


def test_absent_classes_are_named_and_trained_without(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    some = replace(shards, class_pixels={"train": [500, 0, 60, 40]})
    refuse_impossible(FITS, SMALL, some, some.split("train"))
    (record,) = caplog.records
    assert record.message.startswith("no pixel of train is sky: that can't be learned; add frames that show it")
    caplog.clear()
    val = replace(some, class_pixels={"train": [500, 0, 60, 40], "val": [0, 7, 0, 0]})
    text = refused(val, FITS)
    assert "can't be learned and count 0 where they are scored (val has sky); add frames" in text
    assert text.endswith("data.allow class-missing")
    refuse_impossible(FITS, SMALL, val, some.split("train"), allow=("class-missing",))
    assert len(caplog.records) == 1  # accepted, and told
    void = replace(shards, class_pixels={"train": [0, 0, 0, 40]})
    assert "no class has a pixel in train" in refused(void, FITS)


# ── one image a forward ─────────────────────────────────────────────────────────────────────────


def test_batch_norm_of_single_images_is_refused(shards: Shards) -> None:
    text = refused(shards, change(batch_size=2, accumulate=2))
    assert "batch norm would take its statistics from one image at a time (2 a step, over 1 process in 2" in text
    assert text.endswith("a larger training.batch_size, a smaller training.accumulate, or training.freeze batch_norm")
    alone = refused(shards, change(batch_size=2, sync_batch_norm=False), world=2)
    assert "(2 a step, over 2 processes in 1 micro-batch each)" in alone
    for t, world in (
        (change(batch_size=2), 1),
        (change(batch_size=2), 2),  # one each, but their statistics are shared
        (change(batch_size=1, freeze=["batch_norm"]), 1),
    ):
        refuse_impossible(t, SMALL, shards, shards.split("train"), world)


def test_one_cell_of_one_image(shards: Shards) -> None:
    assert refused(shards, change(batch_size=1, crop_px=(16, 16))).startswith("2 things that can't be trained")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world", "advised"),
    [(6, 1, 2, "4 or 8"), (2, 1, 2, "4"), (9, 1, 3, "6 or 12"), (18, 3, 2, "12 or 24"), (10, 5, 2, "20")],
)
def test_class_mix_between_processes_is_refused(batch_size: int, accumulate: int, world: int, advised: str) -> None:
    t = change(batch_size=batch_size, accumulate=accumulate, augment=Augment(class_mix=0.5))
    with pytest.raises(ConfigError) as caught:
        refuse_whatever_the_data(t, SMALL, world)
    assert str(caught.value) == (
        "1 thing that can't be trained:\n"
        f"  training.batch_size: {batch_size} samples are {batch_size // world} for each of {world} processes; "
        "expected an even number for each, as class_mix pastes between neighbours; "
        f"set {advised}, or training.augment.class_mix 0"
    )
    for fitting in map(int, advised.split(" or ")):
        refuse_whatever_the_data(t.model_copy(update={"batch_size": fitting}), SMALL, world)
    refuse_whatever_the_data(t.model_copy(update={"augment": Augment()}), SMALL, world)
    refuse_whatever_the_data(t.model_copy(update={"batch_size": 9, "accumulate": 1}), SMALL, 1)


# ── out of memory ───────────────────────────────────────────────────────────────────────────────


def test_activations_grow_with_pixels_and_images_and_halve_in_bf16() -> None:
    whole = activation_bytes(SMALL, (256, 512), 4, bf16=False)
    assert activation_bytes(SMALL, (512, 512), 4, bf16=False) == pytest.approx(2 * whole, rel=0.02)
    assert activation_bytes(SMALL, (256, 512), 8, bf16=False) == pytest.approx(2 * whole, rel=0.02)
    assert 0.4 * whole < activation_bytes(SMALL, (256, 512), 4, bf16=True) < 0.65 * whole


def test_activations_that_are_computed_again_are_kept_for_one_block_at_a_time() -> None:
    """What autograd holds after a forward, and the largest block beside it."""
    network = build(replace(SMALL, backbone="mobilenetv2_035"), seed=0).train()
    units = list(blocks(network.backbone))
    assert len(units) == 17
    checkpoint_activations(network.backbone)
    held: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    inputs: list[torch.Tensor] = []
    for unit in units:
        unit.register_forward_pre_hook(lambda _, given: inputs.extend(given))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network(torch.zeros(1, 3, 256, 256))
    for t in inputs:
        keep(t)
    whole, again = (activation_bytes(network.architecture, (256, 256), 1, False, again) for again in (False, True))
    assert sum(held.values()) < again < 0.8 * whole


def test_activations_are_what_autograd_keeps() -> None:
    """At least the inputs of all convolutions and batch norms, found by another kind of hook."""
    network, kept = build(SMALL, seed=0).train(), {}

    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...], _: object) -> None:
        kept[arguments[0].untyped_storage().data_ptr()] = (arguments[0], arguments[0].untyped_storage().nbytes())

    for m in network.modules():
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d):
            m.register_forward_hook(keep)
    network(torch.rand(2, 3, 256, 256))
    inputs = sum(size for _, size in kept.values())
    measured = activation_bytes(SMALL, (256, 256), 2, bf16=False)
    assert inputs < measured < 2 * inputs  # and what activations, gates and the enlargement keep


def test_the_default_network_s_estimate_is_near_its_peak_on_an_h100() -> None:
    """Peaks of a step in eager mode there, with the loss that makes no full-size map: GiB."""
    peaks = [((768, 768), 16, False, 18.8), ((768, 768), 4, True, 2.5), ((360, 480), 16, True, 2.9)]
    for crop_px, batch, bf16, peak in peaks:
        estimate = (step_bytes(Architecture(19), crop_px, batch, bf16) - CONTEXT_BYTES) / 2**30
        assert 0.95 * peak < estimate < 1.2 * peak


def test_what_fits_is_estimated_to_fit() -> None:
    t, gib = change(crop_px=(768, 768), batch_size=32, accumulate=2), 2**30
    changes = what_fits(t, 1, 16, (768, 768), (2 * gib, 34 * gib), 24 * gib)
    assert changes == [
        f"training.accumulate 4 ({IN_PARTS})",  # 9.8 of 16 fit; 8 divide the batch
        "training.batch_size 18",
        "training.crop_px 576 576",
    ]
    fewer = what_fits(t, 2, 8, (768, 768), (2 * gib, 34 * gib), 24 * gib)
    assert fewer[:2] == [f"training.accumulate 4 ({IN_PARTS})", "training.batch_size 16"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"freeze": ["batch_norm"]}, "the same batch in parts"),
        ({"loss": {"dice": 1, "ohem": 0.5}}, "batch norm, ohem and dice then see a part of the batch at a time"),
        (
            {"freeze": ["batch_norm"], "auxiliary_loss": {"lovasz": 1, "rmi": 1}},
            "lovasz then sees a part of the batch at a time",
        ),
        ({"auxiliary_loss": {"lovasz": 1}, "auxiliary_weight": 0}, IN_PARTS),
    ],
)
def test_what_micro_batches_change_is_told(fields: dict[str, object], told: str) -> None:
    gib = 2**30
    changes = what_fits(change(batch_size=8, **fields), 1, 8, (768, 768), (2 * gib, 34 * gib), 24 * gib)
    assert changes[0] == f"training.accumulate 2 ({told})"


def test_frames_that_lie_on_the_gpu_can_make_room() -> None:
    t, gib = change(crop_px=(768, 768), batch_size=16), 2**30
    needs = (2 * gib, 66 * gib)  # 4 a crop
    beside = what_fits(t, 1, 16, (768, 768), needs, 60 * gib, 20 * gib)
    assert beside[:2] == ["training.frames_on_gpu never", f"training.accumulate 2 ({IN_PARTS})"]
    assert beside[2] == "training.batch_size 13"  # 13 need 54 of the 60 GiB, and 17 would of 80
    for there, frames in ((80, 0), (50, 20), (60, 6)):  # none; 66 of 70 are too near; of 66 even more so
        assert "frames_on_gpu" not in str(what_fits(t, 1, 16, (768, 768), needs, there * gib, frames * gib))
    low = what_fits(t, 1, 16, (768, 768), (2 * gib, 10 * gib), 78 * gib, 2 * gib)  # more than 78 were needed
    assert "frames_on_gpu" not in str(low)


def test_what_parts_neighbours_is_never_advised() -> None:
    t, gib = change(crop_px=(768, 768), batch_size=32, augment=Augment(class_mix=0.5)), 2**30
    needs = (2 * gib, 34 * gib)
    assert "training.batch_size 18" in what_fits(change(batch_size=32), 2, 16, (768, 768), needs, 24 * gib)
    assert "training.batch_size 16" in what_fits(t, 2, 16, (768, 768), needs, 24 * gib)
    assert "training.batch_size 9" in what_fits(t, 1, 16, (768, 768), needs, 24 * gib)


def test_what_failed_is_never_advised() -> None:
    """Also where the estimate says that it fits, and where not even one crop does."""
    t, gib = change(crop_px=(768, 768), batch_size=8), 2**30
    changes = what_fits(t, 1, 8, (768, 768), (2 * gib, 10 * gib), 80 * gib)
    assert changes[:2] == [f"training.accumulate 2 ({IN_PARTS})", "training.batch_size 7"]
    assert "training.crop_px 704 704" in changes
    one = change(crop_px=(768, 768), batch_size=1, freeze=["batch_norm"])
    assert what_fits(one, 1, 1, (768, 768), (2 * gib, 90 * gib), 24 * gib) == ["training.crop_px 352 352"]
    assert what_fits(one, 1, 1, (768, 768), (30 * gib, 90 * gib), 24 * gib) == []


@pytest.mark.parametrize(
    ("world", "frozen", "advised"),
    [
        (1, [], []),  # one image would fit, and batch norm needs two
        (1, ["batch_norm"], ["training.accumulate 8 (the same batch in parts)", "training.batch_size 1"]),
        (2, [], [f"training.accumulate 4 ({IN_PARTS})", "training.batch_size 2"]),
    ],
)
def test_what_batch_norm_can_not_take_is_never_advised(world: int, frozen: list[str], advised: list[str]) -> None:
    t, gib = change(crop_px=(768, 768), batch_size=8, freeze=frozen), 2**30
    rows = 8 // world
    changes = what_fits(t, world, rows, (768, 768), (2 * gib, (2 + 12 * rows) * gib), 24 * gib)
    assert [c for c in changes if "crop" not in c] == advised


@pytest.mark.parametrize("backbone", ["densenet121", "resnest14d"])  # blocks that take lists; batch norm of 1 value
def test_every_backbone_gets_advice(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_memory_bytes", lambda device: 8 << 30)
    t = change(crop_px=(768, 768), batch_size=64)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    told = str(
        out_of_memory(error, replace(SMALL, backbone=backbone, output_stride=32), t, 1, True, torch.device("cuda"))
    )
    assert "no memory for 64 crops of 768x768" in told and "set one of: training.accumulate" in told


def test_the_message_names_batch_crop_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_memory_bytes", lambda device: 4 << 30)
    t = Training(crop_px=(512, 512), batch_size=64, phases=(Phase(after=0.5, crop_px=(1024, 1024)),))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB.\nmore")
    told = out_of_memory(error, SMALL, t, 2, False, torch.device("cuda", 1))
    assert "no memory for 32 crops of 1024x1024 at once in fp32 on cuda:1; about" in str(told)
    assert "(CUDA out of memory. Tried to allocate 2.25 GiB.)" in str(told)
    assert "set one of: training.accumulate" in str(told) and "(and those of phases)" in str(told)
    assert "GiB are needed, of 4 (" in str(told)
    monkeypatch.setattr(refusals, "_memory_bytes", lambda device: 80 << 30)
    beside = out_of_memory(error, SMALL, t, 2, False, torch.device("cuda", 1), 20 << 30, 300 << 20)
    held = (
        "GiB are needed beside 20.0 GiB of train's frames and 0.3 GiB of the teacher's weights, of 80, so the estimate"
    )
    assert f"{held} is too low (" in str(beside)
    monkeypatch.undo()
    other = out_of_memory(MemoryError(), SMALL, FITS, 1, False, torch.device("cpu"))
    assert "on cpu (MemoryError); set one of: training.accumulate 2" in str(other)
