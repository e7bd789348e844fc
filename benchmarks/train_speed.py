"""Milliseconds of a training step without loading, beside segmentation_models.pytorch and the reference model.

    python benchmarks/train_speed.py [--size 360x480] [--batch 16] [--classes 11] [--steps 30]

A step is all that the loop does between two batches: copy to the device, forward, loss, backward,
clipping, the finite check, AdamW, the average of the weights. Peers get the same loss on logits
upsampled by F.interpolate, under autocast, channels last, and no average. Rounds of all forms are
interleaved; medians are printed. segmentation_models.pytorch is left out where it is not installed.
On CUDA the precision is bf16, elsewhere fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from reference_model import ReferenceModel
from side_by_side import medians_s, print_machine
from torch import nn
from torch.nn import functional as F

from roadseg.data.batches.loader import Batch
from roadseg.labels import IGNORE
from roadseg.model import Architecture, build
from roadseg.train.ema import EMA
from roadseg.train.gradients import EAGER_STEPS, Gradients
from roadseg.train.losses.criterion import Criterion, Terms
from roadseg.train.losses.objective import Objective


def ours(
    architecture: Architecture, batch: Batch, device: torch.device, graph: bool, compiled: bool = False
) -> Callable[[], object]:
    network = build(architecture, seed=0).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=device.type == "cuda")
    average = EMA(network, 0.999)
    weights = torch.ones(architecture.num_classes, device=device)
    objective = Objective(
        Criterion(
            main=Terms(),
            auxiliary=Terms(),
            auxiliary_weight=0.4,
            class_weights_K=weights,
            label_smoothing=0.05,
            ohem_threshold=0.7,
            ohem_keep=0.0625,
            focal_gamma=2.0,
            boundary_px=3,
        )
    )
    gradients = Gradients(network, objective, device, device.type == "cuda", graph, compiled=compiled)

    def step() -> None:
        loss = gradients(batch)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        torch.stack([loss, norm]).tolist()
        optimizer.step()
        average.update(1)

    return step


def peer(network: nn.Module, batch: Batch, device: torch.device) -> Callable[[], object]:
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=device.type == "cuda")

    def step() -> None:
        image = batch.image_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        label = batch.label_BHW.to(device, non_blocking=True).long()
        optimizer.zero_grad()
        rows, columns = (-size % 16 for size in label.shape[1:])  # some networks take no other sizes
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(F.pad(image, (0, columns, 0, rows)))[..., : label.shape[1], : label.shape[2]]
        logits = F.interpolate(logits.float(), size=label.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, label, ignore_index=IGNORE)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()

    return step


def forms(a: argparse.Namespace, batch: Batch, device: torch.device) -> dict[str, Callable[[], object]]:
    heads = Architecture(num_classes=a.classes, auxiliary=True)
    plain = Architecture(num_classes=a.classes)
    made = {"roadseg, two auxiliary heads, eager": ours(heads, batch, device, False)}
    if device.type == "cuda":
        made["roadseg, two auxiliary heads, CUDA graph"] = ours(heads, batch, device, True)
        made["roadseg, no auxiliary heads, CUDA graph"] = ours(plain, batch, device, True)
        made["roadseg, two auxiliary heads, compiled, CUDA graph"] = ours(heads, batch, device, True, True)
        made["roadseg, no auxiliary heads, compiled, CUDA graph"] = ours(plain, batch, device, True, True)
    made["reference model, eager"] = peer(ReferenceModel(a.classes), batch, device)
    try:
        from segmentation_models_pytorch import DeepLabV3Plus
    except ImportError:
        print("segmentation_models.pytorch is not installed: left out")
    else:
        network = DeepLabV3Plus("tu-mobilenetv2_100", encoder_weights=None, classes=a.classes)
        made["segmentation_models.pytorch, same backbone, eager"] = peer(network, batch, device)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="360x480", help="height x width of a crop")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--steps", type=int, default=30, help="steps a round")
    a = parser.parse_args()
    height, width = map(int, a.size.split("x"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_machine(device, f"batch {a.batch} of {a.size}")
    torch.backends.cudnn.benchmark = True
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (a.batch, height, width, 3), dtype=torch.uint8, generator=draw)
    label = torch.randint(0, a.classes, (a.batch, height, width), dtype=torch.uint8, generator=draw)
    if device.type == "cuda":
        image, label = image.pin_memory(), label.pin_memory()
    steps = forms(a, Batch(image, label, ()), device)
    for form, step in steps.items():
        start = time.perf_counter()
        for _ in range(EAGER_STEPS + 5 if device.type == "cuda" else 1):
            step()
        print(f"{form}: first steps with compilation and capture {time.perf_counter() - start:.0f} s", flush=True)
    print("| form | ms a step | images/s |\n|---|---|---|")
    for form, seconds in medians_s(steps, device, a.steps).items():
        print(f"| {form} | {seconds * 1000:.1f} | {a.batch / seconds:.0f} |")


if __name__ == "__main__":
    main()
