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
    """Random augmentation of every training sample."""

    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random scale factor")
    rotate_deg: Annotated[float, Field(ge=0, le=45)] = Field(
        0.0, description="largest rotation in degrees, in both directions"
    )
    flip: Fraction = Field(0.5, description="probability of a left-right flip")
    brightness: Fraction = Field(0.4, description="b: brightness factor between 1 - b and 1 + b")
    contrast: Fraction = Field(0.4, description="c: contrast factor between 1 - c and 1 + c")
    saturation: Fraction = Field(0.4, description="s: saturation factor between 1 - s and 1 + s")
    tint: Fraction = Field(0.0, description="t: factor of each channel between 1 - t and 1 + t (white balance)")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur with sigma 0.1 to 1.5 px")
    class_mix: Fraction = Field(
        0.0, description="share of crops that get half the classes of another crop of the batch pasted in (ClassMix)"
    )

    @model_validator(mode="after")
    def _scale_ordered(self) -> Augment:
        low, high = self.scale
        if not 0.05 <= low <= high <= 20:
            raise ValueError(f"scale is {low}..{high}; expected 0.05 <= low <= high <= 20")
        return self


class Loss(Section):
    """Weights of the loss terms; 0 leaves a term out."""

    cross_entropy: Weight = Field(1.0, description="cross-entropy, mean over all valid pixels")
    ohem: Weight = Field(0.0, description="cross-entropy of the hardest pixels only (training.ohem_*)")
    focal: Weight = Field(0.0, description="cross-entropy times (1 - p) ** training.focal_gamma")
    lovasz: Weight = Field(0.0, description="Lovasz-softmax, which optimizes the IoU")
    dice: Weight = Field(0.0, description="soft Dice, mean over the classes in the batch")
    boundary: Weight = Field(
        0.0, description="cross-entropy of pixels within training.boundary_px pixels of another class"
    )
    rmi: Weight = Field(0.0, description="region mutual information")

    @model_validator(mode="after")
    def _has_a_term(self) -> Loss:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError("all terms have weight 0; expected one above 0")
        return self


class Phase(Section):
    """Settings that change after a share of the run; settings that are not given stay unchanged."""

    after: Fraction = Field(description="share of the steps after which the phase begins, between 0 and 1")
    crop_px: tuple[Positive, Positive] | None = Field(None, description="height and width of a training crop")
    output_stride: Literal[8, 16, 32] | None = Field(
        None, description="output stride of the backbone; the release has the last one reached"
    )


class Training(Section):
    """Training. Set either epochs or steps; with neither it takes 60 epochs."""

    epochs: Positive | None = Field(None, description="passes over train (60 if steps is not set either)")
    steps: Positive | None = Field(None, description="optimizer steps, instead of epochs")
    batch_size: Positive = Field(8, description="samples per step, over all GPUs and micro-batches")
    accumulate: Positive = Field(1, description="micro-batches per step (gradient accumulation), to save memory")
    crop_px: tuple[Positive, Positive] = Field((512, 512), description="height and width of a training crop")
    phases: tuple[Phase, ...] = Field((), description="later crop sizes and output strides (YAML only)")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="optimizer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.001, description="peak learning rate")
    backbone_lr_factor: Annotated[float, Field(ge=0)] = Field(1.0, description="factor of the backbone's learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight decay of weights; biases and norms have none"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    scheduler: Literal["poly", "cosine", "constant"] = Field("poly", description="learning rate schedule")
    poly_power: Annotated[float, Field(gt=0)] = Field(0.9, description="exponent of the poly schedule")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up, at most half the run")
    loss: Loss = Field(Loss(), description="loss of the main head")
    auxiliary_loss: Loss = Field(Loss(), description="loss of each auxiliary head")
    auxiliary_weight: Weight = Field(0.4, description="weight of each auxiliary head's loss; 0: no auxiliary heads")
    class_weights: Literal["none", "enet", "median"] = Field(
        "none", description="class weights of the cross-entropy terms: ENet's, or median frequency balancing"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="label smoothing of cross_entropy, ohem and boundary"
    )
    ohem_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="OHEM keeps pixels whose true class has a lower probability than this"
    )
    ohem_keep: Annotated[float, Field(gt=0, le=1)] = Field(
        0.0625, description="least share of valid pixels that OHEM keeps"
    )
    focal_gamma: Weight = Field(2.0, description="gamma of the focal loss")
    boundary_px: Positive = Field(3, description="width of the boundary term, in pixels")
    distill_from: str = Field(
        "", description="teacher release (digest, path or s3://) whose class scores are learned", json_schema_extra=OUT
    )
    distill_weight: Weight = Field(1.0, description="weight of the distillation loss")
    distill_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="temperature of the distillation loss")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay of the averaged weights (EMA), which are scored and shipped; 0: no averaging"
    )
    class_offsets: bool = Field(
        False, description="after training, fit an offset of each class's logit that maximizes mIoU on frames of train"
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(5.0, description="limit of the gradient norm; 0: none")
    freeze: tuple[Literal["backbone", "aspp", "decoder", "batch_norm"], ...] = Field(
        (),
        description="parts whose weights stay fixed (class_offsets still shifts a frozen decoder's bias); "
        "batch_norm: statistics stay fixed",
    )
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="early stopping: end after this many validations without a better mIoU on val; 0: never"
    )
    augment: Augment = Field(Augment(), description="random augmentation")
    class_uniform: Fraction = Field(
        0.0, description="share of samples that are crops around a class, drawn uniformly over classes"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of initial weights, sample order and augmentation"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on CUDA, fp32 elsewhere")
    init_from: str = Field(
        "",
        description="fine-tune from this release (digest, path or s3://); a .safetensors file counts as weights_from",
        json_schema_extra=OUT,
    )
    weights_from: str = Field(
        "",
        description="start from a .safetensors file: DeepLabv3+ of segmentation_models.pytorch or VainF, or a "
        "checkpoint of roadseg",
        json_schema_extra=OUT,
    )
    validate_every: Annotated[int, Field(ge=0)] = Field(0, description="steps between validations; 0: ten per run")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between checkpoints; 0: every 60 s and at validations", json_schema_extra=OUT
    )
    pictures: Annotated[int, Field(ge=0, le=16)] = Field(
        4, description="frames whose predictions are drawn at every validation", json_schema_extra=OUT
    )
    mirrors: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (), description="also log losses and scores to TensorBoard or MLflow", json_schema_extra=OUT
    )
    device: Annotated[str, AfterValidator(_valid_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps", json_schema_extra=OUT
    )
    gpus: Annotated[int, Field(ge=0)] = Field(
        1,
        description="GPUs of this machine (and of each host of a SageMaker cluster) that train together; "
        "0: all of them",
        json_schema_extra=OUT,
    )
    sync_batch_norm: bool = Field(True, description="on several GPUs, compute batch norm statistics over all of them")
    cuda_graph: bool = Field(
        True, description="on CUDA, run forward and backward as one CUDA graph", json_schema_extra=OUT
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile; auto: on CUDA, for runs of 2,000 steps or more", json_schema_extra=OUT
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute the backbone's activations in backward: less memory, a quarter slower",
        json_schema_extra=OUT,
    )
    deterministic: bool = Field(
        False, description="the same numbers in every run on CUDA too; slower", json_schema_extra=OUT
    )
    augment_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where crops are augmented; auto: on the training device",
        json_schema_extra=OUT,
    )
    frames_on_gpu: Literal["auto", "never", "always"] = Field(
        "auto",
        description="keep all of train in GPU memory; auto: if it takes at most a quarter",
        json_schema_extra=OUT,
    )
    workers: Annotated[int, Field(ge=-1)] = Field(
        -1, description="loader processes; 0: none, -1: chosen for this machine", json_schema_extra=OUT
    )

    @model_validator(mode="before")
    @classmethod
    def _move_checkpoint(cls, values: Any) -> Any:
        """Accept a checkpoint (.safetensors) in init_from as well, and move it to weights_from."""
        if not isinstance(values, dict) or values.get("weights_from"):
            return values
        start = str(values.get("init_from"))
        moved = {**values, "init_from": "", "weights_from": start}
        return moved if start.lower().endswith(".safetensors") else values

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
            raise ValueError(f"phases begin after {shares}; expected increasing shares between 0 and 1")
        return self
