"""Peak memory of evaluation by number of images: python benchmarks/evaluate_memory.py

Renders town frames, exports a small untrained network, and scores each number of frames in a new process.
Prints the peak resident memory of each process and the ratio of the last to the first.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from roadseg.config.sections import Data, load_config
from roadseg.ingest.stage import ingest
from roadseg.town import write_tree

SIZE = 256, 128
CHANNELS = 48


def write_data(folder: Path, frames: int, workers: int) -> None:
    """A tree of `frames` val frames and its manifest below `folder`."""
    write_tree(folder / "tree", {"train": 0, "val": frames}, 0, *SIZE, "clear", workers)
    ingest(Data(source="cityscapes", workers=workers), folder / "tree", folder, ("val",))


def write_model(path: Path) -> None:
    """A release whose weights nobody trained: memory does not depend on their values."""
    from safetensors.torch import save

    from roadseg.labels import TOWN
    from roadseg.model.deeplab import Architecture, build
    from roadseg.release.archive import write_archive
    from roadseg.release.export import export_onnx

    a = Architecture(
        num_classes=TOWN.num_classes, backbone="mobilenetv2_050", channels=CHANNELS, head="separable", auxiliary=False
    )
    network = build(a, seed=0).eval()
    export_onnx(network, path.with_suffix(".onnx"))
    model = {
        "label_set": TOWN.to_json(),
        "temperature": 1.0,
        "architecture": a.to_json(),
        "parameters": network.count_parameters(),
        "training": {"source": "none", "steps": 0, "data_fingerprints": {}},
        "train_class_pixels": [1] * (TOWN.num_classes + 1),
    }
    weights = save({k: v.contiguous() for k, v in network.state_dict().items()})
    write_archive(path, model, path.with_suffix(".onnx").read_bytes(), weights, "none")


def score(folder: Path, release: Path) -> None:
    """Run the evaluation in the measured process and print its peak memory."""
    from roadseg.data.manifest import Manifest
    from roadseg.evaluate.stage import Images, evaluate
    from roadseg.images.decode import Limits
    from roadseg.inference.predictor import Predictor
    from roadseg.release.archive import load_release

    config, work = load_config(), folder / "evaluation"
    work.mkdir(exist_ok=True)
    images = Images(Manifest.load(folder), folder / "tree", Limits())
    result = evaluate(Predictor(load_release(release)), images, ["val"], config.evaluation.scenes, work)
    print(result["images"], peak_bytes())


def peak_bytes() -> int:
    """Peak resident memory of this process. Not ru_maxrss on Linux, which starts at the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--score", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        return score(*options.score)
    print(f"{platform.machine()}, {os.cpu_count()} processors, frames of {SIZE[0]}x{SIZE[1]}")
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        release = Path(temporary) / "model.tar.gz"
        write_model(release)
        for frames in options.frames:
            folder = Path(temporary) / str(frames)
            write_data(folder, frames, options.workers)
            command = [sys.executable, __file__, "--score", str(folder), str(release)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            scored, peak = map(int, done.stdout.split())
            assert scored == frames
            peaks.append(peak)
            print(f"{frames:6,d} frames: peak {peak / 2**20:.1f} MiB")
    print(f"ratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
