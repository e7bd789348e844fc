"""Embed a frame as a short vector with a trained backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from roadseg.model.backbone import EARLY_STRIDES
from roadseg.model.deeplab import DeepLabV3Plus

DIMENSIONS = 32


def backbone_digest(network: DeepLabV3Plus) -> str:
    """SHA-256 of the backbone's weights, its input normalization, and strides that differ from timm's."""
    digest = hashlib.sha256()
    a = network.architecture
    if a.early_strides != EARLY_STRIDES:
        digest.update(repr((a.early_strides, a.output_stride)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if name.startswith("backbone.") or name in ("mean", "std"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def embedder(network: DeepLabV3Plus) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from uint8 [H, W, 3] RGB to float32 [DIMENSIONS]: the projected mean of the coarsest map.

    A random projection preserves distances within some percent (Johnson and Lindenstrauss 1984) at a tenth of the
    bytes. Its seed is fixed, so that all embeddings by one network are comparable.
    """
    network = network.eval()
    channels = network.backbone.feature_info.channels()[-1]  # type: ignore[union-attr,operator]
    projection = np.random.default_rng(0).normal(size=(channels, DIMENSIONS)).astype(np.float32)
    projection /= np.sqrt(DIMENSIONS)
    device = network.mean.device

    @torch.inference_mode()
    def embed(image: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()
        feature = network.backbone((batch - network.mean) / network.std)[-1]
        mean: np.ndarray = feature.mean((2, 3))[0].float().cpu().numpy()
        return mean @ projection

    return embed
