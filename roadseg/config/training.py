"""The training section of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from roadseg.config.section import OUT, Fraction, Positive, Section

Weight = Annotated[float, Field(ge=0)]


def _valid_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
    return name


class Augment(Section):
    """What is drawn for every training sample."""

    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random scale")
    rotate_deg: Annotated[float, Field(ge=0, le=45)] = Field(0.0, description="largest rotation, either way")
    flip: Fraction = Field(0.5, description="chance of a left-right flip")
    brightness: Fraction = Field(0.4, description="brightness factor drawn from 1 - b .. 1 + b")
    contrast: Fraction = Field(0.4, description="contrast factor drawn from 1 - c .. 1 + c")
    saturation: Fraction = Field(0.4, description="saturation factor drawn from 1 - s .. 1 + s")
    tint: Fraction = Field(0.0, description="each channel's factor drawn from 1 - t .. 1 + t: another white balance")
    blur: Fraction = Field(0.0, description="chance of a Gaussian blur, sigma 0.1 .. 1.5 px")
    class_mix: Fraction = Field(
        0.0, description="share of crops into which half the classes of another crop of the batch are pasted"
    )

    @model_validator(mode="after")
    def _scale_ordered(self) -> Augment:
        low, high = self.scale
        if not 0.05 <= low <= high <= 20:
            raise ValueError(f"scale is {low}..{high}; expected 0.05 <= low <= high <= 20")
        return self


class Loss(Section):
    """Weights of the terms that are summed; 0 leaves a term out."""

    cross_entropy: Weight = Field(1.0, description="mean over all valid pixels")
    ohem: Weight = Field(0.0, description="cross-entropy of the hardest pixels alone (training.ohem_*)")
    focal: Weight = Field(0.0, description="cross-entropy times (1 - p) ** training.focal_gamma")
    lovasz: Weight = Field(0.0, description="Lovasz-softmax: the Jaccard index's convex extension")
    dice: Weight = Field(0.0, description="soft Dice, mean over the classes of the batch")
    boundary: Weight = Field(0.0, description="cross-entropy of pixels within training.boundary_px of another class")
    rmi: Weight = Field(0.0, description="region mutual information")

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError("all terms have weight 0; expected one above 0")
        return self


class Phase(Section):
    """What changes from a share of the run on; what is not given stays as before."""

    after: Fraction = Field(description="share of the run's steps after which it begins")
    crop_px: tuple[Positive, Positive] | None = Field(None, description="height and width of a training crop")
    output_stride: Literal[8, 16, 32] | None = Field(None, description="of the backbone; the last one reached ships")


class Training(Section):
    """Optimisation. Length is epochs or steps, one of the two; neither means 60 epochs."""

    epochs: Positive | None = Field(None, description="passes over train (60 when steps is not given either)")
    steps: Positive | None = Field(None, description="optimizer steps, instead of epochs")
    batch_size: Positive = Field(8, description="samples a step, over all GPUs and micro-batches")
    accumulate: Positive = Field(1, description="micro-batches that a step's batch is computed in, to save memory")
    crop_px: tuple[Positive, Positive] = Field((512, 512), description="height and width of a training crop")
    phases: tuple[Phase, ...] = Field((), description="later crop sizes and output strides, in YAML")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="optimizer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.001, description="peak learning rate")
    backbone_lr_factor: Annotated[float, Field(ge=0)] = Field(1.0, description="times learning_rate, for the backbone")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="on weights only, not on biases or norms")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    scheduler: Literal["poly", "cosine", "constant"] = Field("poly", description="learning rate over steps")
    poly_power: Annotated[float, Field(gt=0)] = Field(0.9, description="exponent of poly")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear warm-up; at most half the run is used")
    loss: Loss = Field(Loss(), description="terms of the main head's loss")
    auxiliary_loss: Loss = Field(Loss(), description="terms of each auxiliary head's loss")
    auxiliary_weight: Weight = Field(0.4, description="weight of each auxiliary head's loss; 0: no auxiliary heads")
    class_weights: Literal["none", "enet", "median"] = Field(
        "none", description="of the cross-entropy terms: ENet's, or median frequency over each class's"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of cross_entropy, ohem and boundary")
    ohem_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="ohem keeps pixels whose true class has a lower probability"
    )
    ohem_keep: Annotated[float, Field(gt=0, le=1)] = Field(0.0625, description="least share of valid pixels ohem keeps")
    focal_gamma: Weight = Field(2.0, description="exponent of focal")
    boundary_px: Positive = Field(3, description="reach of boundary")
    distill_from: str = Field(
        "", description="a release to learn from (digest, path or s3://): its class scores", json_schema_extra=OUT
    )
    distill_weight: Weight = Field(1.0, description="weight of the divergence from that release")
    distill_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="softens both sides of it")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="of the averaged weights that are reported and shipped; 0: the raw weights"
    )
    class_offsets: bool = Field(
        False, description="after training, shift each class's logit to what scores the best mIoU on frames of train"
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(5.0, description="gradient norm limit; 0: none")
    freeze: tuple[Literal["backbone", "aspp", "decoder", "batch_norm"], ...] = Field(
        (),
        description="parts that keep their weights (class_offsets shifts a frozen decoder's bias all the same); "
        "batch_norm: statistics that keep their values",
    )
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="validations without a better mIoU of val after which training ends; 0: never"
    )
    augment: Augment = Field(Augment(), description="random draws")
    class_uniform: Fraction = Field(
        0.0, description="share of samples that are crops around a class drawn uniformly, instead of a frame"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of initial weights, order and draws")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on CUDA, fp32 elsewhere")
    init_from: str = Field(
        "",
        description="start from this release (digest, path or s3://) instead; a .safetensors counts as weights_from",
        json_schema_extra=OUT,
    )
    weights_from: str = Field(
        "",
        description="start from a .safetensors of segmentation_models.pytorch or VainF's DeepLabv3+, or from a "
        "checkpoint of a training, instead",
        json_schema_extra=OUT,
    )
    validate_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between validations; 0: ten a run")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between checkpoints; 0: every 60 s and at validations", json_schema_extra=OUT
    )
    pictures: Annotated[int, Field(ge=0, le=16)] = Field(
        4, description="frames whose label maps are drawn at validations", json_schema_extra=OUT
    )
    mirrors: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (), description="where losses and scores are written too", json_schema_extra=OUT
    )
    device: Annotated[str, AfterValidator(_valid_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps", json_schema_extra=OUT
    )
    gpus: Annotated[int, Field(ge=0)] = Field(
        1,
        description="processes of this machine, and of each of a SageMaker cluster's, that train together, one a GPU; "
        "0: as many as GPUs",
        json_schema_extra=OUT,
    )
    sync_batch_norm: bool = Field(True, description="of several GPUs: batch norm's statistics over all of them")
    cuda_graph: bool = Field(True, description="on CUDA, forward and backward as one graph", json_schema_extra=OUT)
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile; auto: on CUDA, for runs of 2,000 steps or more", json_schema_extra=OUT
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute the backbone's maps twice instead of keeping them: less memory, a quarter slower",
        json_schema_extra=OUT,
    )
    deterministic: bool = Field(
        False, description="on CUDA too, the same numbers in every run; slower", json_schema_extra=OUT
    )
    augment_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where crops are scaled, turned and coloured; auto: where the training is",
        json_schema_extra=OUT,
    )
    frames_on_gpu: Literal["auto", "never", "always"] = Field(
        "auto", description="hold all of train in GPU memory; auto: if it fits in a quarter", json_schema_extra=OUT
    )
    workers: Annotated[int, Field(ge=-1)] = Field(
        -1, description="loader processes; 0: none, -1: chosen by the machine", json_schema_extra=OUT
    )

    @model_validator(mode="before")
    @classmethod
    def _by_suffix(cls, values: Any) -> Any:
        """A training can start from a checkpoint too, and who has one need not know under which key."""
        if not isinstance(values, dict) or values.get("weights_from"):
            return values
        given = str(values.get("init_from"))
        moved = {**values, "init_from": "", "weights_from": given}
        return moved if given.lower().endswith(".safetensors") else values

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs ({self.epochs}) and steps ({self.steps}) are both set; set one to null")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) does not divide batch_size ({self.batch_size})")
        if self.init_from and self.weights_from:
            raise ValueError("init_from and weights_from are both set; start from one of the two, set the other to ''")
        shares = [phase.after for phase in self.phases]
        if shares != sorted(set(shares)) or any(share in (0, 1) for share in shares):
            raise ValueError(f"phases begin after {shares}; expected rising shares between 0 and 1")
        return self
