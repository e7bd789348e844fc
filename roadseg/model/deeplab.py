"""DeepLabv3+ with selective kernel fusion, on any timm backbone.

Shapes: B images, K classes, H x W pixels of the image, h x w pixels at the decoder's stride.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.model.aspp import ASPP
from roadseg.model.backbone import EARLY_STRIDES, create_backbone, level, load_backbone_weights
from roadseg.model.decoder import Decoder
from roadseg.model.dropout import Dropout
from roadseg.model.sk_fusion import FUSIONS, HEADS, SelectionGate, conv_bn_relu

# RGB, 0..255: the statistics that timm's ImageNet weights were trained under
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# Stride of the finer auxiliary head's map: the backbone's third level, with both early halvings.
AUXILIARY_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that decides the network's layers; stored in archives.

    low_levels: strides of the backbone maps that the decoder fuses, coarse to fine; the last one is the
    stride of the logits. atrous_rates: in pixels of the map at output_stride.
    auxiliary: two more heads, for training only. backbone_options: arguments of timm's model.
    early_strides: see create_backbone.
    All strides are in pixels of the image, whatever early_strides is. Raises ConfigError on invalid values; what
    depends on the backbone is checked when it is built.
    """

    num_classes: int
    backbone: str = "mobilenetv2_100"
    output_stride: int = 16
    fusion: str = "skfusion"
    head: str = "dense"
    channels: int = 128
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    low_levels: tuple[int, ...] = (8, 4)
    auxiliary: bool = False
    dropout: float = 0.1
    backbone_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    early_strides: tuple[int, int] = EARLY_STRIDES

    def at_output_stride(self, output_stride: int) -> Architecture:
        """The same network at another output stride.

        Rates are scaled by old / new stride, so that they span the same pixels of the image (Chen et al., ECCV 2018,
        use 6/12/18 at 16 and twice that at 8). Raises ConfigError if a rate would not be a whole number.
        """
        changed = replace(self, output_stride=output_stride)
        scaled = [rate * self.output_stride for rate in self.atrous_rates]
        if any(rate % output_stride for rate in scaled):
            old, new = (
                "/".join(map(str, r)) for r in (self.atrous_rates, [round(r / output_stride, 2) for r in scaled])
            )
            raise ConfigError(
                f"rates {old} at output stride {self.output_stride} would be {new} at {output_stride}",
                expected=f"multiples of {output_stride // self.output_stride}",
                where="model.atrous_rates",
                todo="choose other rates, or keep the output stride",
            )
        return replace(changed, atrous_rates=tuple(rate // output_stride for rate in scaled))

    def __post_init__(self) -> None:
        _require(1 <= self.num_classes <= 255, "num_classes", self.num_classes, "1 to 255 (255 is void)")
        _require(self.output_stride in (8, 16, 32), "output_stride", self.output_stride, "8, 16 or 32")
        early = self.early_strides
        two = len(early) == 2 and all(type(stride) is int and stride in (1, 2) for stride in early)
        _require(two, "early_strides", early, "two of 1 or 2")
        _require(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {', '.join(FUSIONS)}")
        _require(self.head in HEADS, "head", self.head, f"one of {', '.join(HEADS)}")
        _require(1 <= self.channels <= 4096, "channels", self.channels, "1 to 4096")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, below 1")
        rates_fit = len(self.atrous_rates) > 0 and all(1 <= rate <= 256 for rate in self.atrous_rates)
        _require(rates_fit, "atrous_rates", self.atrous_rates, "one or more, each 1 to 256")
        descending = all(a > b for a, b in zip(self.low_levels, self.low_levels[1:], strict=False))
        _require(
            len(self.low_levels) > 0
            and descending
            and self.output_stride >= self.low_levels[0]
            and self.low_levels[-1] >= 1,
            "low_levels",
            self.low_levels,
            f"strides from coarse to fine, none coarser than output_stride {self.output_stride}, such as "
            f"{[s for s in (8, 4) if s <= self.output_stride]}",
        )

    @property
    def logit_stride(self) -> int:
        return self.low_levels[-1]

    @property
    def auxiliary_strides(self) -> tuple[int, int]:
        """Strides of the auxiliary heads' logits."""
        return AUXILIARY_STRIDE * math.prod(self.early_strides) // math.prod(EARLY_STRIDES), self.output_stride

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Architecture:
        """The inverse of to_json. Raises ConfigError on keys or types that it does not write."""
        known = {f.name for f in fields(Architecture)}
        if set(data) != known:
            raise ConfigError(
                f"architecture with keys {', '.join(sorted(data))}", expected=", ".join(sorted(known)), where="model"
            )
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return Architecture(**values)
        except TypeError as e:
            raise ConfigError(f"architecture with a value of the wrong type ({e})", where="model") from e


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(repr(value), expected=expected, where=f"model.{key}")


class TrainingOutput(NamedTuple):
    """What the network returns in training when it has auxiliary heads."""

    logits: Tensor  # [B, K, h, w] at Architecture.logit_stride
    auxiliary: tuple[Tensor, ...]  # [B, K, ., .] at Architecture.auxiliary_strides


class DeepLabV3Plus(nn.Module):
    """Image [B, 3, H, W], RGB, uint8 or float in 0..255, to logits [B, K, h, w].

    h, w = ceil(H / s), ceil(W / s) for s = Architecture.logit_stride; any H, W >= 1. The caller
    upsamples: bilinear, align_corners=False. Normalization happens here, so that everything outside
    handles uint8; mean and std are per channel, in 0..255.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: Architecture,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.backbone = create_backbone(a.backbone, a.output_stride, a.backbone_options, a.early_strides)
        widths = self.backbone.feature_info.channels()  # type: ignore[union-attr,operator]
        self.low_indices = [level(self.backbone, stride, a.backbone) for stride in a.low_levels]
        self.aspp = ASPP(widths[-1], a.channels, a.atrous_rates, a.fusion, a.head)
        # On the coarse map: at the logits' stride it would cost a pass over the largest map.
        self.dropout = Dropout(a.dropout)
        self.decoder = Decoder([widths[i] for i in self.low_indices], a.channels, a.num_classes, a.fusion, a.head)
        self.auxiliary_indices = [level(self.backbone, a.auxiliary_strides[0], a.backbone), -1] if a.auxiliary else []
        self.auxiliary_heads = nn.ModuleList(
            nn.Sequential(
                conv_bn_relu(widths[i], max(a.channels // 2, 1), 3),
                nn.Conv2d(max(a.channels // 2, 1), a.num_classes, 1),
            )
            for i in self.auxiliary_indices
        )
        for part in (self.aspp, self.decoder, self.auxiliary_heads):
            _initialise(part)
        for classifier in [self.decoder.classifier] + [head[-1] for head in self.auxiliary_heads]:  # type: ignore[index]
            nn.init.normal_(classifier.weight, std=0.01)  # the first loss is near log K

    def forward(self, image: Tensor) -> Tensor | TrainingOutput:
        features = self.backbone((image.to(self.mean.dtype) - self.mean) / self.std)
        high = self.dropout(self.aspp(features[-1]))
        logits = self.decoder(high, [features[i] for i in self.low_indices])
        if not (self.training and self.auxiliary_indices):
            return logits
        heads = zip(self.auxiliary_heads, self.auxiliary_indices, strict=True)
        return TrainingOutput(logits, tuple(head(features[i]) for head, i in heads))

    def inference_network(self) -> DeepLabV3Plus:
        """A copy without auxiliary heads, in eval mode, on the same device: what ships."""
        network = copy.deepcopy(self)
        network.architecture = replace(self.architecture, auxiliary=False)
        network.auxiliary_heads, network.auxiliary_indices = nn.ModuleList(), []
        return network.eval()

    def count_parameters(self) -> int:
        """Parameters of the inference network; buffers and auxiliary heads don't count."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("auxiliary_heads."))


def _initialise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            # fan_in is right for depthwise convolutions too; torch's fan_out forgets the groups
            nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    for m in module.modules():
        if isinstance(m, SelectionGate):
            # The gate's input, means of ReLU maps, has no negative entry and points nearly the same way
            # for all images. A filter that happens to be negative there is dead for all of them: turn it.
            with torch.no_grad():
                m.squeeze.weight.mul_(torch.where(m.squeeze.weight.sum((1, 2, 3), keepdim=True) < 0, -1.0, 1.0))


def build(
    architecture: Architecture,
    *,
    seed: int,
    weights: str | Path = "none",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DeepLabV3Plus:
    """Build the network on the CPU; random weights depend on `seed` only, the backbone's come from `weights`.

    weights: see load_backbone_weights. torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DeepLabV3Plus(architecture, mean=mean, std=std)
    load_backbone_weights(network.backbone, weights)
    return network
