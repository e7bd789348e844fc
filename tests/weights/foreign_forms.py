"""Other projects' DeepLabv3+ written anew, in the forms and under the names that they gave them."""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from roadseg.model import Architecture

RATES = (2, 3, 4)
WIDTH = 64  # a low level of 48 channels beside it: what comes first shows
RESNET = Architecture(
    num_classes=5,
    backbone="resnet18",
    output_stride=32,
    fusion="concat",
    head="dense",
    channels=WIDTH,
    atrous_rates=RATES,
    low_levels=(4,),
)
MOBILENET = Architecture(
    num_classes=5,
    backbone="mobilenetv2_100",
    output_stride=32,
    fusion="concat",
    head="separable",
    channels=WIDTH,
    atrous_rates=RATES,
    low_levels=(4,),
)


def conv_bn(i: int, o: int, k: int = 1, rate: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(i, o, k, padding=rate * (k // 2), dilation=rate, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(o), nn.ReLU()]


class Body(nn.Module):
    """VainF's separable convolution."""

    def __init__(self, i: int, o: int, rate: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(i, i, 3, rate, i)[0], nn.Conv2d(i, o, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def conv3x3(i: int, o: int, rate: int, kind: str) -> list[nn.Module]:
    dense, norm, act = conv_bn(i, o, 3, rate)
    if kind == "body":
        return [Body(i, o, rate), norm, act]
    if kind == "pair":
        return [nn.Sequential(conv_bn(i, i, 3, rate, i)[0], nn.Conv2d(i, o, 1, bias=False)), norm, act]
    return [dense, norm, act]


class ForeignASPP(nn.Module):
    def __init__(self, i: int, kind: str) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(i, WIDTH))
        branches = [nn.Sequential(*conv3x3(i, WIDTH, rate, kind)) for rate in RATES]
        self.convs = nn.ModuleList([nn.Sequential(*conv_bn(i, WIDTH)), *branches, pool])
        self.project = nn.Sequential(*conv_bn(5 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(x) for conv in self.convs]
        return self.project(torch.cat([m.expand(-1, -1, *x.shape[-2:]) for m in maps], 1))


class VainF(nn.Module):
    """Its DeepLabHeadV3Plus on torchvision's ResNet-18, whose padding is the ordinary one."""

    def __init__(self, kind: str, classes: int = 5) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.ModuleDict({k: m for k, m in resnet.named_children() if k not in ("avgpool", "fc")})
        self.classifier = nn.ModuleDict(
            {
                "project": nn.Sequential(*conv_bn(64, 48)),
                "aspp": ForeignASPP(512, kind),
                "classifier": nn.Sequential(*conv3x3(48 + WIDTH, WIDTH, 1, kind), nn.Conv2d(WIDTH, classes, 1)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        low = None
        for name, m in self.backbone.items():
            x = m(x)
            low = x if name == "layer1" else low
        low = self.classifier["project"](low)
        high = F.interpolate(self.classifier["aspp"](x), size=low.shape[2:], mode="bilinear", align_corners=False)
        return self.classifier["classifier"](torch.cat([low, high], 1))


class SMP(nn.Module):
    """Its DeepLabV3Plus from version 0.3 on: names and layers of the decoder and the head."""

    def __init__(self, encoder: nn.Module, low: int, high: int, kind: str = "pair", classes: int = 5) -> None:
        super().__init__()
        self.encoder = encoder
        pair = conv3x3(WIDTH, WIDTH, 1, "pair")
        self.decoder = nn.ModuleDict(
            {
                "aspp": nn.Sequential(ForeignASPP(high, kind), *pair),
                "block1": nn.Sequential(*conv_bn(low, 48)),
                "block2": nn.Sequential(*conv3x3(WIDTH + 48, WIDTH, 1, "pair")),
            }
        )
        self.segmentation_head = nn.Sequential(nn.Conv2d(WIDTH, classes, 1), nn.Identity())
