"""Parameters and multiply-adds of every form of the network, beside the reference project's.

    python benchmarks/model_table.py [--size 512x1024] [--classes 19]

Multiply-adds are those of convolutions and matrix products, counted by torch's FlopCounterMode (two
operations each) on meta tensors; parameters are the inference network's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from reference_model import ReferenceModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from roadseg.model import Architecture, build
from roadseg.model.sk_fusion import FUSIONS, HEADS

# Figures that others (or an earlier trial) gave for the form in the row, parameters in millions and
# GMAC at 512x1024, 19 classes.
PUBLISHED = {
    ("concat", "dense", 256): (5.82, 52.6),
    ("concat", "separable", 256): (2.72, 11.2),
    ("dense", "dense", 256): (65.0, 269.7),
    ("sknet", "separable", 256): (4.09, 16.5),
    ("skfusion", "separable", 256): (2.46, 10.3),
}


def gmac(network: nn.Module, height: int, width: int) -> float:
    network = network.eval().to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, height, width, dtype=torch.uint8, device="meta"))
    return counter.get_total_flops() / 2e9


def rows(num_classes: int) -> Iterator[tuple[str, tuple[str, str, int] | None, nn.Module]]:
    """Name, key in PUBLISHED, network."""
    yield "reference model", None, ReferenceModel(num_classes)
    for channels, low_levels in ((128, (8, 4)), (256, (4,))):
        for fusion in FUSIONS:
            for head in HEADS:
                a = Architecture(
                    num_classes=num_classes, fusion=fusion, head=head, channels=channels, low_levels=low_levels
                )
                name = f"{fusion}, {head}, C={channels}, low levels {'+'.join(map(str, low_levels))}"
                yield name, (fusion, head, channels), build(a, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x1024", help="height x width")
    parser.add_argument("--classes", type=int, default=19)
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    print(f"| mobilenetv2_100, {arguments.classes} classes | parameters | GMAC at {height}x{width} | published |")
    print("|---|---|---|---|")
    for name, key, network in rows(arguments.classes):
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        published = PUBLISHED.get(key) if key else (72.5, None)
        beside = f"{published[0]}M" + (f", {published[1]}" if published[1] else "") if published else ""
        print(f"| {name} | {parameters:.2f}M | {gmac(network, height, width):.1f} | {beside} |")


if __name__ == "__main__":
    main()
