"""Does pretraining on the rendered town help on a CamVid drive that was not seen? Short runs, one table.

    python benchmarks/town_pretraining.py --data CAMVID [--drives 0001TP 0006R0] [--seeds 1] [--state DIR]

Rows: the base; stronger photometric augmentation; weights pretrained on the town; both. Base: `configs/camvid.yaml`
with coarser maps (PROXY), 4,000 steps, the drive held out, no class offsets. Scores are the training loop's own at its
last step. Runs that are in STATE/town_pretraining.json are not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import roadseg
from roadseg.config.sections import Config, load_config
from roadseg.data.shards.index import Shards
from roadseg.files import read_json, read_json_lines, write_json
from roadseg.sweep.run import forget
from roadseg.train import stage

CONFIG = Path(__file__).parents[1] / "configs" / "camvid.yaml"
PROXY = {"early_strides": [1, 2], "output_stride": 8, "low_levels": [4], "atrous_rates": [6, 12, 18]}
PHOTOMETRIC = {"brightness": 0.7, "contrast": 0.5, "blur": 0.5}
TOWN = {"seed": 1, "train": 2400, "val": 16, "width_px": 480, "height_px": 360}
ROWS = {"base": (False, False), "photometric": (False, True), "town": (True, False), "town, photometric": (True, True)}


def training(steps: int, decay: float, **more: Any) -> dict[str, Any]:
    every = {"steps": steps, "validate_every": steps, "checkpoint_every": steps, "weight_decay": decay}
    return {**every, "pictures": 0, "class_offsets": False, **more}


def config(data: dict[str, Any], settings: dict[str, Any]) -> Config:
    return load_config(CONFIG, {"data": data, "model": PROXY, "training": settings})


def trained(c: Config, workspace: Path, work: Path) -> dict[str, float]:
    """The last scores by split. Nothing is exported; the checkpoint stays in `work`."""
    shards = Shards.load(roadseg.run(c, until="transform", workspace=workspace).outputs["transform"].folder)
    work.mkdir(parents=True, exist_ok=True)
    with patch.object(stage, "write_candidate", lambda *_: None):
        stage.train_candidate(c, shards, work)
    forget()
    return {row["split"]: 100 * row["miou"] for row in read_json_lines(work / "history.jsonl") if "split" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--drives", nargs="+", default=["0001TP", "0006R0"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--state", type=Path, default=Path("workspace/town_pretraining"))
    a = parser.parse_args()
    a.state.mkdir(parents=True, exist_ok=True)
    path, workspace = a.state / "town_pretraining.json", a.state / "workspace"
    found: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
    town = a.state / "town"
    for seed in range(a.seeds):
        for drive in a.drives:
            for name, (pretrained, photometric) in ROWS.items():
                if (key := f"{name}, {drive} held out, seed {seed}") in found:
                    continue
                if pretrained and not list(town.glob("checkpoints/*.safetensors")):
                    settings = training(3 * a.steps // 4, 0.9)
                    print(
                        "town:",
                        trained(config({"source": "town", "town": TOWN}, settings), workspace, town),
                        flush=True,
                    )
                more: dict[str, Any] = {"seed": seed}
                if pretrained:
                    more["weights_from"] = str(max(town.glob("checkpoints/*.safetensors")))
                if photometric:
                    more["augment"] = PHOTOMETRIC
                began = time.monotonic()
                c = config({"root": a.data, "holdout_sequences": [drive]}, training(a.steps, 0.7, **more))
                found[key] = trained(c, workspace, a.state / key.replace(", ", "-").replace(" ", "_"))
                write_json(path, found)
                scores = ", ".join(f"{split} {miou:.2f}" for split, miou in sorted(found[key].items()))
                print(f"{key}: {scores} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
