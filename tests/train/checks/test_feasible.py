"""What can't be trained is told at once, before the first step, and what would fit after memory ran out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from roadseg.config.sections import Config
from roadseg.config.training import Augment, Phase, Training
from roadseg.data.augment.cpu import Augmentation, generator, sample_params
from roadseg.data.shards.index import Shards
from roadseg.errors import ConfigError
from roadseg.model.deeplab import Architecture
from roadseg.train.checks.feasible import image_share, refuse_untrainable, refuse_untrainable_on_any_data
from roadseg.train.recipe import Recipe, recipe_of

SMALL = Architecture(num_classes=3, backbone="test_efficientnet", channels=8, head="separable", atrous_rates=(1, 2))
FITS = Training(crop_px=(48, 96), batch_size=4)  # frames are 48x96
IN_PARTS = "batch norm then sees a part of the batch at a time"


def recipe(t: Training, frames: int | None = None) -> Recipe:
    made = recipe_of(Config(training=t), num_classes=3, device_type="cpu", frames=frames)
    return replace(made, architecture=SMALL)


def refuse_impossible(t: Training, shards: Shards, world: int = 1, allow: tuple[str, ...] = ()) -> None:
    frames = shards.split("train")
    refuse_untrainable(recipe(t, len(frames)), shards, frames, world, allow)


def refuse_whatever_the_data(t: Training, world: int = 1) -> None:
    refuse_untrainable_on_any_data(recipe(t), world)


def refused(shards: Shards, t: Training, world: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_impossible(t, shards, world)
    return str(caught.value)


def change(**fields: object) -> Training:
    return Training.model_validate({**FITS.model_dump(), **fields})


def test_crops_that_no_frame_fills_are_warned_of(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    refuse_impossible(change(crop_px=(64, 96)), shards)
    (line,) = caplog.messages
    assert line.startswith(
        "training.crop_px: crops of 64x96 reach beyond frames of 48x96: 22 % of what they show is pad"
    )


def test_what_can_be_trained_is_neither_refused_nor_warned_of(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    for t in (FITS, change(crop_px=(48, 96)), change(crop_px=(17, 17)), change(batch_size=8, accumulate=2)):
        refuse_impossible(t, shards)
    refuse_impossible(change(batch_size=8, accumulate=2), shards, 2)
    assert not caplog.records


def test_all_problems_are_told_in_one_error(shards: Shards) -> None:
    none = replace(shards, class_pixels={"train": [500, 0, 0, 40]}, shards={"train": shards.shards["train"]})
    text = refused(none, change(crop_px=(512, 512), batch_size=5, accumulate=1, patience=3), world=2)
    assert text.startswith("4 things that can't be trained:\n")
    assert "training.crop_px: 9" in text and "frames are 48x96 (most of them) and scaled by 0.5 to 2" in text
    assert "set at most 48 96, or raise training.augment.scale" in text
    assert (
        "training.batch_size: 5 samples can't be shared evenly by 2 processes; expected a multiple of 2; set 4" in text
    )
    assert "data: only class road has a pixel in train" in text
    assert "they become (data.taxonomy; for source folder the YAML that data.labels names)" in text
    assert "training.patience: it watches the split val, which does not exist (besides train: none)" in text
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
        refuse_whatever_the_data(change(epochs=None, **values))
    refuse_impossible(change(epochs=None, **{**values, "patience": most}), shards)


def test_crops_of_later_phases_are_looked_at_too(shards: Shards) -> None:
    phases = (Phase(after=0.5, crop_px=(256, 256)), Phase(after=0.8, output_stride=32, crop_px=(32, 20)))
    text = refused(shards, change(phases=phases))
    assert "crops of 256x256 show would be padding" in text
    assert "a crop of 32x20 is one cell of the map at output stride 32; set sides of 128 or more, as far" in text


def test_phases_without_a_step_are_refused(shards: Shards) -> None:
    phases = (Phase(after=0.1, crop_px=(32, 64)), Phase(after=0.8, crop_px=(48, 96)))
    said = refused(shards, change(steps=2, phases=phases))
    assert "the part before the first phase has none of the 2 steps" in said
    assert "phase 2 has none of the 2 steps" in said and "phase 1" not in said
    with pytest.raises(ConfigError, match=r"phase 2 has none of the 2 steps"):
        refuse_whatever_the_data(change(steps=2, phases=phases))
    few = change(epochs=1, phases=phases)  # six frames, so two steps: the data says that
    assert "phase 2 has none of the 2 steps" in refused(shards, few)
    refuse_whatever_the_data(few)
    refuse_impossible(change(steps=10, phases=phases), shards)


def test_frames_that_are_always_enlarged_may_be_smaller_than_the_crop(shards: Shards) -> None:
    t = change(crop_px=(128, 256))
    assert "would be padding" in refused(shards, t)
    enlarged = change(crop_px=(128, 256), augment=Augment(scale=(2.0, 4.0)))
    refuse_impossible(enlarged, shards)


@pytest.mark.parametrize("crop_px", [(48, 96), (100, 64), (300, 500)])
def test_the_share_of_image_is_that_of_draws(crop_px: tuple[int, int]) -> None:
    sizes = Counter({(48, 96): 3, (200, 100): 1})
    shares = []
    for number in range(4000):
        height, width = list(sizes.elements())[number % 4]
        inner = sample_params(Augmentation(crop_px, (0.5, 2.0)), generator(1, number), height, width).inner
        shares.append(inner[2] * inner[3] / (crop_px[0] * crop_px[1]))
    assert image_share(sizes, crop_px, (0.5, 2.0)) == pytest.approx(np.mean(shares), abs=0.01)


def test_absent_classes_are_named_and_trained_without(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    some = replace(shards, class_pixels={"train": [500, 0, 60, 40]})
    refuse_impossible(FITS, some)
    (record,) = caplog.records
    assert record.message.startswith(
        "no pixel of train is sky, which therefore can't be learned; add frames that show it"
    )
    caplog.clear()
    val = replace(some, class_pixels={"train": [500, 0, 60, 40], "val": [0, 7, 0, 0]})
    text = refused(val, FITS)
    assert "can't be learned and count 0 where they are scored (val has sky); add frames" in text
    assert text.endswith("data.allow class-missing")
    refuse_impossible(FITS, val, allow=("class-missing",))
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
        refuse_impossible(t, shards, world)


def test_one_cell_of_one_image(shards: Shards) -> None:
    assert refused(shards, change(batch_size=1, crop_px=(16, 16))).startswith("2 things that can't be trained")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world", "advised"),
    [(6, 1, 2, "4 or 8"), (2, 1, 2, "4"), (9, 1, 3, "6 or 12"), (18, 3, 2, "12 or 24"), (10, 5, 2, "20")],
)
def test_class_mix_between_processes_is_refused(batch_size: int, accumulate: int, world: int, advised: str) -> None:
    t = change(batch_size=batch_size, accumulate=accumulate, augment=Augment(class_mix=0.5))
    with pytest.raises(ConfigError) as caught:
        refuse_whatever_the_data(t, world)
    assert str(caught.value) == (
        "1 thing that can't be trained:\n"
        f"  training.batch_size: {batch_size} samples are {batch_size // world} for each of {world} processes; "
        "expected an even number for each, as class_mix pastes between neighbors; "
        f"set {advised}, or training.augment.class_mix 0"
    )
    for fitting in map(int, advised.split(" or ")):
        refuse_whatever_the_data(t.model_copy(update={"batch_size": fitting}), world)
    refuse_whatever_the_data(t.model_copy(update={"augment": Augment()}), world)
    refuse_whatever_the_data(t.model_copy(update={"batch_size": 9, "accumulate": 1}), 1)


# ── out of memory ───────────────────────────────────────────────────────────────────────────────
