"""Peak memory of ingest with 100 and with 1,000 frames, which must not grow with the number of frames.

Writes a Cityscapes tree of smooth random frames, ingests it in a separate process, and sums the
resident memory of that process and its workers every 20 ms. Linux only. Usage:

    python benchmarks/ingest_memory.py [--frames 100 1000] [--width 512] [--height 256] [--workers 0]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from roadseg.images.decode import encode_label_png

_INGEST = """
import sys
from pathlib import Path
from roadseg.config.sections import Data
from roadseg.ingest.stage import ingest
if __name__ == "__main__":
    data = Data(source="cityscapes", workers=int(sys.argv[3]))
    print(len(ingest(data, Path(sys.argv[1]), Path(sys.argv[2])).samples))
"""


def write_tree(root: Path, frames: int, width: int, height: int) -> None:
    """Write frames with every id in each: four fifths in train, the others in val."""
    rng = np.random.default_rng(0)
    for i in range(frames):
        split = "val" if i % 5 == 4 else "train"
        stem = f"{split}town_{i:06d}_000019"
        image_folder, label_folder = root / f"leftImg8bit/{split}/{split}town", root / f"gtFine/{split}/{split}town"
        image_folder.mkdir(parents=True, exist_ok=True)
        label_folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(image_folder / f"{stem}_leftImg8bit.png"), image)
        ids = cv2.resize(rng.integers(0, 34, (8, 16), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        (label_folder / f"{stem}_gtFine_labelIds.png").write_bytes(encode_label_png(ids))


def tree_rss_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; shared pages count once per process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_rss_bytes(int(c)) for c in children)


def peak(root: Path, frames: int, workers: int) -> tuple[int, float]:
    """(peak bytes, seconds) of ingesting a Cityscapes tree in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        work, script = Path(folder, "work"), Path(folder, "ingest.py")
        work.mkdir()
        script.write_text(_INGEST)
        begin, top = time.perf_counter(), 0
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, str(script), str(root), str(work), str(workers)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while process.poll() is None:
            top = max(top, tree_rss_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        done = process.stdout.read().strip()
        assert process.returncode == 0 and done == str(frames), f"ingest failed: {done}"
        return top, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} processors, frames of {options.width}x{options.height}")
    peaks = []
    for frames in options.frames:
        with tempfile.TemporaryDirectory() as folder:
            write_tree(Path(folder), frames, options.width, options.height)
            top, seconds = peak(Path(folder), frames, options.workers)
        peaks.append(top)
        print(f"{frames:6,d} frames: peak {top / 2**20:.1f} MiB, {seconds:.1f} s, {frames / seconds:.0f} pairs/s")
    print(f"ratio {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
