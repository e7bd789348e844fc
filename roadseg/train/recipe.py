"""Recipe of a training: the config's model and training sections as plain values, all defaults resolved."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from roadseg.config.sections import Config
from roadseg.config.training import Loss, Training
from roadseg.data.augment.cpu import Augmentation
from roadseg.model.deeplab import Architecture
from roadseg.train.loop import LoopSettings
from roadseg.train.losses.criterion import Terms

COMPILED_FROM_STEPS = 2000  # compilation takes a minute or two
ENOUGH_STEPS = 1_000_000  # stands for a length that depends on a data set that is not known yet


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps first..last-1 of the run. crop_px: height and width."""

    first: int
    last: int
    crop_px: tuple[int, int]
    output_stride: int


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How batches are drawn and where crops are made; meanings as in the config's training section."""

    batch_size: int
    accumulate: int
    class_uniform: float
    class_mix: float
    augment_device: str
    frames_on_gpu: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the criterion and the distillation are built from; meanings as in the config's training section."""

    main: Terms
    auxiliary: Terms
    auxiliary_weight: float
    class_weights: str
    label_smoothing: float
    ohem_threshold: float
    ohem_keep: float
    focal_gamma: float
    boundary_px: int
    distill_weight: float
    distill_temperature: float

    @property
    def terms_used(self) -> set[str]:
        """Names of the terms that have a weight in any head's loss."""
        heads = [self.main, *([self.auxiliary] if self.auxiliary_weight else [])]
        return {f.name for terms in heads for f in fields(terms) if getattr(terms, f.name)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the train stage does, apart from the data.

    architecture: of the first phase, with its auxiliary heads. augmentation: of the first phase's crops.
    """

    architecture: Architecture
    phases: tuple[Phase, ...]
    loop: LoopSettings
    loss: LossOptions
    batches: BatchPlan
    augmentation: Augmentation
    backbone_weights: str
    weights_from: str
    freeze: tuple[str, ...]
    sync_batch_norm: bool
    activation_checkpointing: bool
    deterministic: bool
    class_offsets: bool
    pictures: int
    trackers: tuple[str, ...]

    @property
    def shipped_architecture(self) -> Architecture:
        """The inference network's: at the last phase's output stride, without auxiliary heads."""
        return replace(self.architecture.at_output_stride(self.phases[-1].output_stride), auxiliary=False)


def recipe_of(config: Config, *, num_classes: int, device_type: str, frames: int | None = None) -> Recipe:
    """The config's training of a network for `num_classes` classes.

    device_type: "cpu", "cuda" or "mps", which precision and compilation depend on. frames: images of train; None before
    they are known, when a run that counts epochs is taken to be long.
    """
    m, t = config.model, config.training
    steps = t.steps or (ENOUGH_STEPS if frames is None else -(-(t.epochs or 60) * frames // t.batch_size))
    own = {f.name: getattr(t.augment, f.name) for f in fields(Augmentation) if f.name in type(t.augment).model_fields}
    return Recipe(
        architecture=Architecture(
            num_classes=num_classes,
            backbone=m.backbone,
            output_stride=m.output_stride,
            fusion=m.fusion,
            head=m.head,
            channels=m.channels,
            atrous_rates=m.atrous_rates,
            low_levels=m.low_levels,
            auxiliary=t.auxiliary_weight > 0,
            dropout=m.dropout,
            backbone_options=m.backbone_options,
            early_strides=m.early_strides,
        ),
        phases=_phases(t, steps, m.output_stride),
        loop=_loop(t, steps, device_type),
        loss=LossOptions(
            main=_terms(t.loss),
            auxiliary=_terms(t.auxiliary_loss),
            auxiliary_weight=t.auxiliary_weight,
            class_weights=t.class_weights,
            label_smoothing=t.label_smoothing,
            ohem_threshold=t.ohem_threshold,
            ohem_keep=t.ohem_keep,
            focal_gamma=t.focal_gamma,
            boundary_px=t.boundary_px,
            distill_weight=t.distill_weight,
            distill_temperature=t.distill_temperature,
        ),
        batches=BatchPlan(
            batch_size=t.batch_size,
            accumulate=t.accumulate,
            class_uniform=t.class_uniform,
            class_mix=t.augment.class_mix,
            augment_device=t.augment_device,
            frames_on_gpu=t.frames_on_gpu,
            workers=t.workers,
        ),
        augmentation=Augmentation(t.crop_px, **own),
        backbone_weights=m.backbone_weights,
        weights_from=t.weights_from,
        freeze=t.freeze,
        sync_batch_norm=t.sync_batch_norm,
        activation_checkpointing=t.activation_checkpointing,
        deterministic=t.deterministic,
        class_offsets=t.class_offsets,
        pictures=t.pictures,
        trackers=t.mirrors,
    )


def _phases(t: Training, steps: int, output_stride: int) -> tuple[Phase, ...]:
    """The run cut where a phase of the config begins; a phase keeps what it does not change."""
    bounds = [0, *(round(phase.after * steps) for phase in t.phases), steps]
    crop_px, phases = t.crop_px, []
    for number, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if number:
            crop_px = t.phases[number - 1].crop_px or crop_px
            output_stride = t.phases[number - 1].output_stride or output_stride
        phases.append(Phase(first=first, last=last, crop_px=crop_px, output_stride=output_stride))
    return tuple(phases)


def _loop(t: Training, steps: int, device_type: str) -> LoopSettings:
    same = {f.name: getattr(t, f.name) for f in fields(LoopSettings) if f.name in Training.model_fields}
    cuda = device_type == "cuda"
    worth_compiling = cuda and steps >= COMPILED_FROM_STEPS and not t.deterministic
    return LoopSettings(
        **{
            **same,
            "steps": steps,
            "bf16": t.precision == "bf16" or (t.precision == "auto" and cuda),
            "validate_every": t.validate_every or max(1, -(-steps // 10)),
            "compiled": t.compile == "always" or (t.compile == "auto" and worth_compiling),
        }
    )


def _terms(loss: Loss) -> Terms:
    return Terms(**loss.model_dump())
