"""The configuration: one pydantic section for each concern, read from YAML.

Fields marked `OUT` change where or how fast an output is made, never its content; keys leave them out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from roadseg.config.section import OUT, Positive, Section
from roadseg.config.training import Training
from roadseg.config.yaml_file import load_yaml
from roadseg.errors import ConfigError


class Town(Section):
    """The rendered town."""

    seed: int = Field(0, description="seed of every scene")
    train: Positive = Field(200, description="frames in train")
    val: Positive = Field(50, description="frames in val")
    test: Annotated[int, Field(ge=0)] = Field(0, description="frames in test")
    width_px: Annotated[int, Field(ge=64, le=8192)] = Field(512, description="frame width")
    height_px: Annotated[int, Field(ge=32, le=4096)] = Field(256, description="frame height")
    weather: Literal["clear", "night", "fog", "rain"] = Field("clear", description="light and weather")


Source = Literal[
    "cityscapes",
    "cityscapes-coarse",
    "camvid",
    "camvid-32",
    "bdd100k",
    "mapillary-v1.2",
    "mapillary-v2",
    "idd",
    "kitti",
    "acdc",
    "comma10k",
    "folder",
]


class Part(Section):
    """One data set of a mix."""

    source: Source = Field(description="layout of the data set")
    root: Path | None = Field(None, description="folder of the data set", json_schema_extra=OUT)
    labels: Path | None = Field(
        None, description="YAML of classes and folders, for source folder", json_schema_extra=OUT
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="weight of its samples in train, relative to the other parts"
    )
    splits: tuple[str, ...] = Field((), description="use only these splits; empty: all")

    @model_validator(mode="after")
    def _described(self) -> Part:
        if (self.source == "folder") != (self.labels is not None):
            raise ValueError("labels, a YAML of classes and folders, is for source 'folder', which needs it")
        if self.root is None and self.source != "folder":
            raise ValueError(f"source {self.source} needs root, the folder it lies in")
        return self


class Data(Section):
    """The data set: its layout, its folder, and which parts of it are used."""

    source: Literal[Source, "town", "mix"] = Field("town", description="layout of the data set")
    root: Path | None = Field(None, description="folder of the data set; town needs none", json_schema_extra=OUT)
    labels: Path | None = Field(
        None, description="YAML of classes and folders, for source folder", json_schema_extra=OUT
    )
    mix: dict[str, Part] = Field({}, description="for source mix: several data sets by name (YAML only)")
    taxonomy: Literal["auto", "native", "cityscapes"] = Field(
        "auto",
        description="classes to learn: native (the data set's own) or the 19 of Cityscapes that they map to; "
        "auto: native, for a mix cityscapes",
    )
    download: bool = Field(
        False, description="download Cityscapes into data.root first, with your own account", json_schema_extra=OUT
    )
    allow: tuple[str, ...] = Field((), description="codes of errors to accept; the frames they concern are left out")
    forbid: tuple[str, ...] = Field((), description="codes of warnings to treat as errors")
    split: str = Field("val", description="split that evaluation scores", json_schema_extra=OUT)
    holdout_sequences: tuple[str, ...] = Field(
        (), description="sequences moved from train to the split 'holdout', which is scored beside data.split"
    )
    town: Town = Field(Town(), description="the rendered town")
    max_image_pixels: Positive = Field(64_000_000, description="larger images are refused before decoding")
    max_file_bytes: Positive = Field(256_000_000, description="larger files are refused before reading")
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="processes that check and convert frames; 0: one per core", json_schema_extra=OUT
    )

    @model_validator(mode="after")
    def _require_root(self) -> Data:
        if (self.source == "folder") != (self.labels is not None):
            raise ValueError("data.labels, a YAML of classes and folders, is for source 'folder', which needs it")
        if (self.source == "mix") != bool(self.mix):
            raise ValueError("data.mix, data sets by name, is for source 'mix', which needs at least one")
        if wrong := [name for name in self.mix if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            raise ValueError(f"the name {wrong[0]!r} in data.mix; expected letters, digits, - and _")
        return self


class Transform(Section):
    """Shards: train-ready copies of the frames."""

    shard_frames: Positive = Field(64, description="frames per shard")
    format: Literal["raw", "jpeg", "lossless"] = Field(
        "raw", description="storage of images: raw is fastest, jpeg and lossless are smaller"
    )
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = Field(95, description="quality of format jpeg")
    shards: str = Field(
        "",
        description="train from these finished shards (a folder or s3://bucket/prefix) instead of making them",
        json_schema_extra=OUT,
    )


class Model(Section):
    """DeepLabv3+ with selective-kernel fusion."""

    backbone: str = Field("mobilenetv2_100", description="any timm backbone with features_only")
    backbone_options: dict[str, Any] = Field(
        {}, description="arguments of the timm model (YAML only), such as {channels: [48, 96, 144, 192]} for resnet18"
    )
    backbone_weights: str = Field(
        "imagenet", description="imagenet (from timm), none, or a .safetensors file", json_schema_extra=OUT
    )
    early_strides: tuple[Literal[1, 2], Literal[1, 2]] = Field(
        (2, 2), description="strides of the backbone's first two halvings; 1 skips a halving: finer maps, slower"
    )
    output_stride: Literal[8, 16, 32] = Field(16, description="stride of the backbone's last feature map")
    fusion: Literal["skfusion", "mean", "sknet", "dense", "concat"] = Field(
        "skfusion", description="how feature maps are fused in the ASPP and the decoder"
    )
    head: Literal["separable", "dense"] = Field(
        "dense", description="kind of 3x3 convolutions in the ASPP and the decoder"
    )
    channels: Positive = Field(128, description="channels in the ASPP and the decoder")
    atrous_rates: tuple[Positive, Positive, Positive] = Field((6, 12, 18), description="dilation rates of the ASPP")
    low_levels: tuple[Positive, ...] = Field(
        (8, 4), description="strides of the backbone maps that the decoder fuses, coarse to fine"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout rate before the classifier")


class Evaluation(Section):
    """Scoring and the report."""

    scenes: Annotated[int, Field(ge=0, le=50)] = Field(
        4, description="best and worst scenes in the report, this many of each"
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="threads of the runtime; 0: one per core", json_schema_extra=OUT
    )


class Push(Section):
    """The gate."""

    min_gain: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.002, description="mIoU (0..1) by which a candidate must beat the champion"
    )


class StoreSection(Section):
    """The model store."""

    url: str = Field("", description="folder or s3://bucket/prefix of the store; empty: WORKSPACE/store")


class Serve(Section):
    """The server."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="port; 0: a free one")
    max_body_bytes: Positive = Field(25_000_000, description="requests with a larger body get 413")
    max_pixels: Positive = Field(16_777_216, description="larger images get 413")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="threads of the runtime; 0: one per core")
    max_queue: Positive = Field(16, description="requests that may wait; further ones get 503")


class Aws(Section):
    """SageMaker."""

    region: str = Field("", description="AWS region; empty: from the environment")
    endpoint_url: str = Field("", description="address for all AWS calls, for tests")
    role_arn: str = Field("", description="IAM role of the endpoint")
    image_uri: str = Field("", description="serving image in ECR")
    endpoint_name: str = Field("roadseg", description="name of the endpoint")
    instance_type: str = Field("ml.c7i.xlarge", description="instance type of the endpoint")
    instance_count: Positive = Field(1, description="instances at the start")
    max_instance_count: Positive = Field(4, description="most instances of autoscaling")
    capture_percent: Annotated[int, Field(ge=0, le=100)] = Field(0, description="percent of requests captured to S3")


class Config(Section):
    """The whole config."""

    data: Data = Data()
    transform: Transform = Transform()
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    push: Push = Push()
    store: StoreSection = StoreSection()
    serve: Serve = Serve()
    aws: Aws = Aws()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError."""
    value = load_yaml(path, todo="check the path")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"holds a {type(value).__name__}", expected="sections such as data:, training:", where=str(path)
        )
    return value


def load_config(path: Path | str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The config of a YAML file with nested `overrides` laid over it.

    Raises ConfigError that lists every wrong value and unknown key by its path.
    """
    where = " and ".join([str(path)] * bool(path) + ["the overrides"] * bool(overrides)) or "the config"
    return validated(merge(read_yaml(Path(path)) if path else {}, overrides or {}), where)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return out


# pydantic describes these in terms of Python, not of YAML
_EXPECTED = {
    "tuple_type": "expected a list such as [a, b]",
    "too_long": "expected at most {max_length} values",
    "model_type": "expected a section with its own keys",
}


def describe(error: ValidationError, where: str) -> str:
    """One line per error: the key's path, what was found and expected; for an unknown key the most similar one."""
    lines = []
    errors = error.errors()
    # pydantic reports every missing item of a short tuple; the last one gives the expected length.
    short = {e["loc"][:-1]: e["loc"][-1] for e in errors if e["type"] == "missing" and isinstance(e["loc"][-1], int)}
    for e in errors:
        *parents, last = e["loc"]
        key = ".".join(map(str, e["loc"]))
        if e["type"] == "missing" and isinstance(last, int):
            if last == short[tuple(parents)]:
                lines.append(f"  {'.'.join(map(str, parents))}: expected {last + 1} values (found {e['input']!r:.80})")
        elif e["type"] == "extra_forbidden":
            near = near_key(str(last), parents)
            hint = f"; perhaps you meant {near}" if near else ""
            lines.append(f"  {key}: unknown key{hint}")
        else:
            expected = _EXPECTED.get(e["type"])
            text = expected.format(**e.get("ctx", {})) if expected else e["msg"].removeprefix("Value error, ")
            found = "" if isinstance(e["input"], dict | BaseModel) else f" (found {repr(e['input']):.80})"
            lines.append(f"  {key}: {text[:1].lower()}{text[1:]}{found}")
    count = f"{len(lines)} wrong value{'s' if len(lines) > 1 else ''}"
    return f"{count} in {where}:\n" + "\n".join(lines)


def near_key(name: str, parents: Sequence[int | str] = ()) -> str:
    """The key most similar to an unknown one, or "".

    At the top level also `section.key`, joined by " or ", for each section that has a similar key.
    """
    known = _names_at(parents)
    if not parents:
        known += [f"{section}.{key}" for section in known for key in _names_at([section])]
    found = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in known], n=1)
    return " or ".join(key for key in known if key.rpartition(".")[2] in found)


def _names_at(loc: Sequence[int | str]) -> list[str]:
    kind: Any = Config
    for part in loc:
        if get_origin(kind) in (dict, tuple):  # items of a dict or tuple of sections: skip the name or index
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]
        else:
            kind = kind.model_fields[str(part)].annotation
    return list(kind.model_fields)


def validated(raw: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        raise ConfigError(describe(e, where)) from None
