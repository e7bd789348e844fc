"""Optimizers over parameter groups: backbone or not, decayed or not."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer


def make_optimizer(
    network: nn.Module, kind: str, learning_rate: float, backbone_lr_factor: float, weight_decay: float, momentum: float
) -> Optimizer:
    """sgd, adam or adamw of trainable parameters. Groups have a `peak_lr`; tensors of 2 or more dimensions decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.startswith("backbone."), p.ndim > 1), []).append(p)
    parameters = [
        {
            "params": params,
            "peak_lr": learning_rate * (backbone_lr_factor if backbone else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), params in sorted(groups.items(), key=lambda item: item[0])
    ]
    if kind == "sgd":
        return SGD(parameters, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    fused = next(network.parameters()).is_cuda
    return {"adam": Adam, "adamw": AdamW}[kind](parameters, lr=learning_rate, fused=fused)
