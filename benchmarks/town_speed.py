"""Frames per second of the rendered town on one core: rendering only, and rendering plus writing five files.

python benchmarks/town_speed.py [--width 512] [--height 256] [--frames 40]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
from machine import cpu_name

from roadseg.town import WEATHERS, Frame, render
from roadseg.town.light import Weather
from roadseg.town.tree import Place, make_folders, write_frame

ROUNDS = 5


def rate(work: Callable[[int], object], frames: int) -> tuple[float, float]:
    """Median and best frames/s (wall time) over ROUNDS rounds of different frames."""
    rates = []
    for r in range(ROUNDS):
        start = time.perf_counter()
        for i in range(frames):
            work(r * frames + i)
        rates.append(frames / (time.perf_counter() - start))
    return statistics.median(rates), max(rates)


def _draw(width_px: int, height_px: int, weather: Weather, index: int) -> Frame:
    return render(1, index, width_px, height_px, weather)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--frames", type=int, default=40)
    a = parser.parse_args()
    cv2.setNumThreads(0)
    render(0, 0, a.width, a.height)  # textures are made once per process
    print(f"{cpu_name()}, one core, {a.width}x{a.height}, {ROUNDS} rounds of {a.frames} frames")
    for weather in WEATHERS:
        median, best = rate(partial(_draw, a.width, a.height, weather), a.frames)
        print(f"render, {weather:5s}      {median:6.1f} frames/s (best {best:.1f})")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folders(root, [("train", "bench")])

        def both(i: int) -> None:
            write_frame(root, Place("train", "bench", f"bench_{i:06d}", i), render(1, i, a.width, a.height))

        median, best = rate(both, a.frames)
        print(f"render and write   {median:6.1f} frames/s (best {best:.1f})")


if __name__ == "__main__":
    main()
