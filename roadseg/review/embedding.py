"""A frame as a few numbers, the way a trained backbone sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from roadseg.model.backbone import EARLY_STRIDES
from roadseg.model.deeplab import DeepLabV3Plus

DIMENSIONS = 32


def backbone_digest(network: DeepLabV3Plus) -> str:
    """SHA-256 over the backbone's weights, the normalisation before it, and strides that are not timm's own."""
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
    """uint8 [H, W, 3] RGB to float32 [DIMENSIONS]: the mean of the coarsest map, projected.

    A random projection keeps distances within some percent (Johnson and Lindenstrauss 1984) and a
    tenth of the bytes. It is drawn from a fixed seed, so that all embeddings by one network compare.
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
