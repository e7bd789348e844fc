"""Stage 3: from shards to a candidate archive."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import roadseg
from roadseg.config import Config, Model, Training
from roadseg.data.augment import Augmentation
from roadseg.data.feed import Feed, choose_feed, feed
from roadseg.data.loader import Batch, Crops
from roadseg.data.profile import Profile, make_profile
from roadseg.data.profile import chosen as chosen_frames
from roadseg.data.resident import split_bytes
from roadseg.data.sampler import Batches, Order, Sample
from roadseg.data.shards import Shards, Split
from roadseg.errors import ArchiveError, ConfigError
from roadseg.files import sha256_file
from roadseg.images import encode_jpeg
from roadseg.labels import IGNORE, LabelSet
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, Architecture, DeepLabV3Plus, build
from roadseg.model.embed import backbone_digest, embedder
from roadseg.release.archive import TERMS, WEIGHTS, Release, write_archive
from roadseg.release.export import check_export, export_onnx
from roadseg.train.loop import Settings, train
from roadseg.train.losses import enet_weights
from roadseg.train.temperature import fit_temperature

VERSION = 2
CHECKED_FRAMES = 8  # real frames on which the exported graph is compared with the network
log = logging.getLogger(__name__)


def train_candidate(config: Config, shards: Shards, work: Path, init: Release | None = None) -> None:
    """Train, export, check and pack; or go on with a run that left its checkpoints in `work`.

    Leaves model.tar.gz, history.jsonl, contact_sheet.jpg and the last checkpoint. `init`: the
    release to start from. Raises ConfigError for what can't be trained, ExportError if the exported
    graph is not the network.
    """
    t = config.training
    device = choose_device(t.device)
    frames = shards.split("train") if "train" in shards.shards else None
    if not frames or not len(frames):
        raise ConfigError("the data set has no train split", where="data", todo="evaluate a release on it instead")
    steps = t.steps or -(-(t.epochs or 60) * len(frames) // t.batch_size)
    network = _network(config.model, t, shards, init)
    crops = Crops(frames, _augmentation(t), t.seed, _fill(shards))
    write_contact_sheet(crops, shards.label_set, work / "contact_sheet.jpg")
    order = Order(frames.frames, t.seed, t.class_uniform, shards.part_weights)
    chosen = _feed(t, frames, device)
    log.info("data: %s", chosen.why)

    def batches(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        return feed(chosen, crops, Batches(order, t.batch_size, step, steps), device, stopped)

    validation = {name: shards.split(name) for name in shards.shards if name != "train"}
    weights = enet_weights(shards.class_pixels["train"][:-1]) if t.class_weights == "enet" else None
    average = train(network, batches, validation, shards.label_set, weights, _settings(t, steps, device), device, work)
    assert isinstance(average, DeepLabV3Plus)
    _pack(config, shards, average.inference_network().cpu(), steps, validation or {"train": frames}, init, work)


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Raises ConfigError if a named one is not there."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ConfigError(
            f"device {name!r} is not available here", expected="auto, cpu, cuda, cuda:N or mps", where="training.device"
        ) from e


def _settings(t: Training, steps: int, device: torch.device) -> Settings:
    same = {k: getattr(t, k) for k in Settings.__dataclass_fields__ if k in Training.model_fields}
    bf16 = t.precision == "bf16" or (t.precision == "auto" and device.type == "cuda")
    every = t.validate_every or max(1, -(-steps // 10))
    return Settings(**{**same, "steps": steps, "bf16": bf16, "validate_every": every})


def _feed(t: Training, frames: Split, device: torch.device) -> Feed:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return choose_feed(split_bytes(frames), device, memory, t.augment_device, t.frames_on_gpu, t.workers)


def _augmentation(t: Training) -> Augmentation:
    return Augmentation(t.crop_px, **{k: getattr(t.augment, k) for k in type(t.augment).model_fields})


def _fill(shards: Shards) -> tuple[int, int, int]:
    r, g, b = (round(m) for m in shards.mean)
    return r, g, b


def _network(m: Model, t: Training, shards: Shards, init: Release | None) -> DeepLabV3Plus:
    """The network to train: seeded, then ImageNet's, a file's or a release's weights over it."""
    architecture = Architecture(
        shards.label_set.num_classes,
        m.backbone,
        m.output_stride,
        m.fusion,
        m.head,
        m.channels,
        m.atrous_rates,
        m.low_levels,
        t.auxiliary_weight > 0,
        m.dropout,
    )
    from_scratch = m.backbone_weights == "none"
    mean, std = (shards.mean, shards.std) if from_scratch else (IMAGENET_MEAN, IMAGENET_STD)
    if init is None:
        return build(architecture, seed=t.seed, weights=m.backbone_weights, mean=mean, std=std)
    if init.label_set.names != shards.label_set.names:
        raise ConfigError(
            f"release {init.digest[:12]} knows other classes ({', '.join(init.label_set.names)})",
            expected=", ".join(shards.label_set.names),
            where="training.init_from",
            todo="start from a release of the same classes, or from model.backbone_weights",
        )
    network = build(architecture, seed=t.seed, mean=mean, std=std)
    try:
        state = load_tensors(init.members[WEIGHTS])
    except SafetensorError as e:
        raise ArchiveError(f"{WEIGHTS} is not readable ({e})", where=f"release {init.digest[:12]}") from e
    own = network.state_dict()
    wrong = [k for k in own if not k.startswith("auxiliary_heads.") and k not in state]
    wrong += [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise ConfigError(
            f"release {init.digest[:12]} has another architecture ({len(wrong)} tensors differ, such as {wrong[0]})",
            where="training.init_from",
            todo=f"set the model section to that release's: {json.dumps(init.model.get('architecture'))}",
        )
    network.load_state_dict(state, strict=False)
    return network


def write_contact_sheet(crops: Crops, label_set: LabelSet, path: Path, samples: int = 12) -> None:
    """A JPEG of the first frames as epoch 0 augments them, image over coloured label, at 240 px width."""
    tiles = []
    for index in range(min(samples, len(crops.split))):
        image, label = crops.crop(Sample(0, index))
        width = 240
        size = (width, max(1, round(label.shape[0] * width / label.shape[1])))
        coloured = np.where(label[..., None] == IGNORE, 40, label_set.palette[label]).astype(np.uint8)
        pair = [cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (image, coloured)]
        tiles.append(np.vstack(pair))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 4)
    rows = [np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    path.write_bytes(encode_jpeg(np.vstack(rows), 85))


def _pack(
    config: Config,
    shards: Shards,
    network: DeepLabV3Plus,
    steps: int,
    validation: dict[str, Split],
    init: Release | None,
    work: Path,
) -> None:
    """Export the averaged network, prove the graph equal to it on real frames, and write model.tar.gz."""
    split = validation.get("val") or next(iter(validation.values()))  # a held-out split is for scoring alone
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
        "temperature": fit_temperature(network, split, chosen),
        "architecture": network.architecture.to_json(),
        "parameters": network.count_parameters(),
        "config": {k: config.key_fields()[k] for k in ("model", "training")},
        "training": {
            "source": shards.source,
            "steps": steps,
            "data_fingerprints": shards.fingerprints,
            "started_from": f"release {init.digest}" if init else _weights(config.model.backbone_weights),
        },
        "train_class_pixels": shards.class_pixels["train"],
        "data_profile": _profile(network, shards).to_json(),
        "export_agreement": agreement,
        "package_version": roadseg.__version__,
        "code_commit": _commit(),
    }
    terms = shards.label_set.terms
    if init:
        terms += f"\n\nStarted from release {init.digest}, whose data terms are:\n" + init.members[TERMS].decode()
    write_archive(work / "model.tar.gz", model, onnx_path.read_bytes(), save_tensors(tensors), terms)
    onnx_path.unlink()
    log.info("exported graph agrees with the network on %.4f %% of pixels", 100 * agreement)


def _profile(network: DeepLabV3Plus, shards: Shards) -> Profile:
    """Of what was trained on, as this network sees it: what `roadseg data diff` compares other data with."""
    frames = shards.split("train")
    images = (frames.read(i)[0] for i in chosen_frames(len(frames)))
    title = f"{shards.source} train, {len(frames):,} images"
    pixels = shards.class_pixels["train"]
    return make_profile(
        title, images, len(frames), pixels, shards.label_set, embedder(network), backbone_digest(network)
    )


def _weights(given: str) -> str:
    return given if given in ("none", "imagenet") else f"backbone weights {sha256_file(Path(given))}"


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
