"""How far float32's rounding alone moves a network's gradient: against float64, in one process on the CPU.

    PYTHONPATH=. python benchmarks/gradient_rounding.py [--backbones mobilenetv2_100 lcnet_100] [--size 96] [--batch 8]

The default model with its auxiliary heads at random weights, cross-entropy with class weights, one batch of smooth
images with labels in squares of 8x8. Beside it the relative difference of the logits, and that of the float32 gradient
to itself for the same images in another order, which rounds nearly the same. Where rounding moves a gradient far,
curves of equal computations part within a few steps, on however many GPUs.
"""

from __future__ import annotations

import argparse
import platform

import torch
from machine import cpu_name
from torch import Tensor
from torch.nn import functional as F

from roadseg.model import Architecture, build
from roadseg.train.losses.criterion import Criterion, Terms

CLASSES = 19


def gradient(backbone: str, dtype: torch.dtype, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, the gradient in one vector), both float64."""
    architecture = Architecture(num_classes=CLASSES, backbone=backbone, auxiliary=True, dropout=0.0)
    network = build(architecture, seed=0, mean=(120.0,) * 3, std=(60.0,) * 3).train().to(dtype)
    criterion = Criterion(
        main=Terms(),
        auxiliary=Terms(),
        auxiliary_weight=0.4,
        class_weights_K=torch.linspace(1, 10, CLASSES),
        label_smoothing=0.0,
        ohem_threshold=0.7,
        ohem_keep=0.0625,
        focal_gamma=2.0,
        boundary_px=2,
    )
    output = network(image)
    criterion(output, label, criterion.counts(label), 1).backward()
    gradients = [p.grad.double().flatten() for p in network.parameters() if p.grad is not None]
    return output.logits.detach().double(), torch.cat(gradients)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="*", default=["mobilenetv2_100", "lcnet_100", "test_efficientnet"])
    parser.add_argument("--size", type=int, default=96, help="side of the images")
    parser.add_argument("--batch", type=int, default=8)
    a = parser.parse_args()
    print(
        f"{cpu_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}, {a.batch} x {a.size}x{a.size}"
    )
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(a.batch, 3, a.size // 8, a.size // 8, generator=draw) * 255
    image = F.interpolate(coarse, (a.size, a.size), mode="bilinear").round().byte()
    label = torch.randint(0, CLASSES, (a.batch, a.size // 8, a.size // 8), generator=draw)
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    order = torch.randperm(a.batch, generator=draw)
    print("| backbone | logits, float32 to float64 | gradient, float32 to float64 | gradient, another order |")
    print("|---|---|---|---|")
    for backbone in a.backbones:
        exact, single = (gradient(backbone, dtype, image, label) for dtype in (torch.float64, torch.float32))
        shuffled = gradient(backbone, torch.float32, image[order], label[order])
        cells = (apart(single[0], exact[0]), apart(single[1], exact[1]), apart(shuffled[1], single[1]))
        print(f"| {backbone} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
