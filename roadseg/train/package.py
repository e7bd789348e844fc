"""Package a finished training: export, check, describe, write model.tar.gz."""

from __future__ import annotations

import copy
import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from roadseg.data.shards.index import Shards, Split
from roadseg.model.deeplab import DeepLabV3Plus
from roadseg.release.archive import offsets_of, write_archive
from roadseg.release.export import check_export, export_onnx
from roadseg.release.graph import without_weights
from roadseg.review.data_profile import Profile, make_profile, sampled_indexes
from roadseg.review.embedding import backbone_digest, embedder
from roadseg.train.calibration.temperature import fit_temperature
from roadseg.train.checks.memory_errors import is_out_of_memory
from roadseg.version import __version__

CHECKED_FRAMES = 8  # real frames on which the exported graph is compared with the network
log = logging.getLogger(__name__)


def write_candidate(
    config: Mapping[str, Any],
    shards: Shards,
    network: DeepLabV3Plus,
    trained: dict[str, Any],
    split: Split,
    terms: str,
    work: Path,
    device: torch.device,
) -> None:
    """Export the averaged network, prove the graph equal to it on frames of `split`, and write model.tar.gz.

    config: sections model and training, for model.json. network: for inference, on the CPU. trained: how, likewise.
    terms: of the data. device: where the data's profile is made, which takes longest on a CPU. Raises ExportError if
    the exported graph is not the network.
    """
    chosen = np.linspace(0, len(split) - 1, min(CHECKED_FRAMES, len(split))).astype(int)
    samples = [split.read(int(i))[0].copy() for i in chosen]
    onnx_path = work / "model.onnx"
    export_onnx(network, onnx_path)
    agreement = check_export(onnx_path, network, samples)
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()}
    model: dict[str, Any] = {
        "label_set": shards.label_set.to_json(),
        "preprocessing": {
            "input": "image: uint8 [B, 3, H, W], RGB, any size",
            "output": "logits: float32 [B, K, h, w]; upsample bilinearly (align_corners=False) to H x W, then argmax",
            "normalisation": "inside the graph",
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
        },
        "temperature": fit_temperature(network, split, chosen, offsets_of(trained, shards.label_set.names)),
        "architecture": network.architecture.to_json(),
        "parameters": network.count_parameters(),
        "config": dict(config),
        "training": {"source": shards.source, "data_fingerprints": shards.fingerprints, **trained},
        "train_class_pixels": shards.class_pixels["train"],
        "data_profile": _profile(network, shards, device).to_json(),
        "export_agreement": agreement,
        "package_version": __version__,
        "code_commit": _commit(),
    }
    weights = save_tensors(tensors)
    graph = without_weights(onnx_path.read_bytes(), weights)
    write_archive(work / "model.tar.gz", model, graph, weights, terms)
    onnx_path.unlink()
    log.info("exported graph agrees with the network on %.4f %% of pixels", 100 * agreement)


def _profile(network: DeepLabV3Plus, shards: Shards, device: torch.device) -> Profile:
    """Profile of the training data as this network sees it; `roadseg data diff` compares other data with it."""
    try:
        return _profile_on(copy.deepcopy(network).to(device), network, shards)
    except (
        RuntimeError,
        MemoryError,
    ) as e:  # frames may fill the device; a finished training must not fail because of this
        if not is_out_of_memory(e):
            raise
        log.warning("no memory on %s for the data's profile: it is made on the CPU", device)
        return _profile_on(network, network, shards)


def _profile_on(there: DeepLabV3Plus, network: DeepLabV3Plus, shards: Shards) -> Profile:
    frames = shards.split("train")
    images = (frames.read(i)[0] for i in sampled_indexes(len(frames)))
    title = f"{shards.source} train, {len(frames):,} images"
    pixels = shards.class_pixels["train"]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return make_profile(
            title, images, len(frames), pixels, shards.label_set, embedder(there), backbone_digest(network)
        )


def _commit() -> str:
    """The commit of the checkout this package runs from, or "" when it was installed."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
