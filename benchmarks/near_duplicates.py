"""Near-duplicates: share of altered copies and neighboring frames found, and false matches among other scenes.

Rendered town: copies of frames, and the same scene from a camera further ahead, like the second next frame of a
drive (0.93 m: 50 km/h at 30 frames/s; 0.5 m: 27 km/h). CamVid in the SegNet split, with --camvid DIR: copies, true
neighbors two frames apart (0016E5 07959 to 08159), and as other scenes the frames of other drives and those of the
same drive at least 10 s (300 frames) apart, except pairs within 0016E5 04740 to 05700, where the car waits at a
junction and crosses it.

`NEAR` was chosen on town seed 1 and on CamVid's 0006R0 and 0001TP: halfway between the most similar frames of one
drive 10 s apart (0.64) and the value that 95 % of the scenes seen from 0.93 m ahead reach (0.82). The default report
is on town seed 0 and CamVid's 0016E5; --chosen-on reports on the data of the choice.

False matches are counted per frame, not per pair: a frame is false if any frame of another scene matches it.
The peer is pHash, 64 bits of a 32 x 32 cosine transform, near at 10 bits (imagededup's default).

    python benchmarks/near_duplicates.py [--frames 500] [--camvid DIR] [--chosen-on] [--times 30000]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import cv2
import numpy as np
from machine import cpu_name

from roadseg.ingest.checks.near_duplicates import NEAR, alike, near_pairs
from roadseg.ingest.image_stats import DESCRIPTOR_PX, ImageStats, image_stats
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources import camvid
from roadseg.ingest.sources.pairs import Pair
from roadseg.town import frame as town
from roadseg.town.camera import Camera

PHASH_NEAR_BITS = 10
TEN_SECONDS = 300  # frame numbers
Image = np.ndarray


def jpeg(image: Image, quality: int) -> Image:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def scaled(image: Image, factor: float) -> Image:
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)


def cropped(image: Image, left: float, right: float) -> Image:
    h, w = image.shape[:2]
    return np.ascontiguousarray(
        image[round(h * left) : round(h * (1 - right)), round(w * left) : round(w * (1 - right))]
    )


def noisy(image: Image) -> Image:
    return np.clip(image + np.random.default_rng(0).normal(0, 6, image.shape), 0, 255).astype(np.uint8)


COPIES: dict[str, Callable[[Image], Image]] = {
    "JPEG quality 20": lambda i: jpeg(i, 20),
    "JPEG quality 50": lambda i: jpeg(i, 50),
    "JPEG quality 75": lambda i: jpeg(i, 75),
    "resized to half": lambda i: scaled(i, 0.5),
    "resized to double": lambda i: scaled(i, 2),
    "20 % brighter": lambda i: cv2.convertScaleAbs(i, alpha=1.2),
    "20 % darker": lambda i: cv2.convertScaleAbs(i, alpha=0.8),
    "noise of 6 levels": noisy,
    "blur of 1.5 px": lambda i: cv2.GaussianBlur(i, (0, 0), 1.5),
    "2 % cropped a side": lambda i: cropped(i, 0.02, 0.02),
    "4 % cropped right, below": lambda i: cropped(i, 0.0, 0.04),
}


class Compared:
    """Similarity [N, M] between two lists of images, ours and the peer's (negative bits)."""

    def __init__(self, a: Sequence[Image], b: Sequence[Image]) -> None:
        both = [*a, *b]
        small = np.array([np.frombuffer(image_stats(i).descriptor, np.uint8) for i in both])
        ours = np.eye(len(both), dtype=np.float32)
        for i, j, similarity in alike(small.reshape(-1, *DESCRIPTOR_PX[::-1]), -2.0):
            ours[i, j] = ours[j, i] = similarity
        hashes = np.array([phash(i) for i in both])
        self.ours = ours[: len(a), len(a) :]
        self.peer = (hashes[: len(a), None] != hashes[None, len(a) :]).sum(axis=2)


def phash(image: Image) -> np.ndarray:
    """bool [64]: whether each low frequency of luma at 32 x 32 is above their median."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
    return low > np.median(low[1:])


def found(name: str, ours: np.ndarray, peer: np.ndarray) -> None:
    print(f"  {name:42s}{100 * (ours >= NEAR).mean():8.1f} %{100 * (peer <= PHASH_NEAR_BITS).mean():8.1f} %"
          f"{np.quantile(ours, 0.05):14.2f}{len(ours):8,d}", flush=True)  # fmt: skip


def false(name: str, compared: Compared, others: np.ndarray) -> None:
    """others: bool [N, M], the pairs of different scenes."""
    rows = others.any(axis=1)
    ours = np.where(others, compared.ours, -1)[rows].max(axis=1)
    peer = np.where(others, compared.peer, 64)[rows].min(axis=1)
    print(f"  {name:42s}{100 * (ours >= NEAR).mean():8.1f} %{100 * (peer <= PHASH_NEAR_BITS).mean():8.1f} %"
          f"{ours.max():14.2f}{len(ours):8,d}", flush=True)  # fmt: skip


def heading(title: str, last: str) -> None:
    print(f"{title:44s}{'ours':>8s}  {'pHash':>8s}  {last:>12s}{'frames':>8s}")


def ahead(seed: int, index: int, metres: float) -> Image:
    """The scene with the camera moved along the street; nothing else moves."""
    draw = town.draw_camera

    def moved(rng: Random, width_px: int, height_px: int, right_m: float) -> Camera:
        camera = draw(rng, width_px, height_px, right_m)
        return replace(camera, position=camera.position + np.array([0.0, 0.0, metres]))

    town.draw_camera = moved
    try:
        return town.render(seed, index, 512, 256).image
    finally:
        town.draw_camera = draw


def on_town(seed: int, frames: int) -> None:
    images = [town.render(seed, k, 512, 256).image for k in range(frames)]
    some = images[: max(1, frames // 2)]
    heading(f"found, town seed {seed}", "5 % below")
    for name, alter in COPIES.items():
        compared = Compared(some, [alter(i) for i in some])
        found(name, compared.ours.diagonal(), compared.peer.diagonal())
    for metres in (0.5, 0.93):
        compared = Compared(some, [ahead(seed, k, metres) for k in range(len(some))])
        found(f"camera {metres} m ahead", compared.ours.diagonal(), compared.peer.diagonal())
    heading("false", "most alike")
    false("any other scene", Compared(images, images), ~np.eye(frames, dtype=bool))


def on_camvid(root: Path, reported: Callable[[str], bool]) -> None:
    pairs, _ = camvid.pairs(root)
    images = [cv2.cvtColor(cv2.imread(str(root / p.image)), cv2.COLOR_BGR2RGB) for p in pairs]
    drive = np.array([p.sequence for p in pairs])
    number = np.array([int(p.name.rpartition("_")[2].lstrip("f")) for p in pairs])
    rows = np.array([reported(d) for d in drive])
    some = [i for i, kept in zip(images, rows, strict=True) if kept]
    heading(f"found, CamVid {' '.join(sorted(set(drive[rows])))}", "5 % below")
    for name, alter in COPIES.items():
        compared = Compared(some, [alter(i) for i in some])
        found(name, compared.ours.diagonal(), compared.peer.diagonal())
    compared = Compared(images, images)
    same, apart = drive[:, None] == drive, abs(number[:, None] - number)
    neighbours = np.triu(same & (apart == 2)) & rows[:, None]
    if neighbours.any():
        found("neighbours two frames apart", compared.ours[neighbours], compared.peer[neighbours])
    waiting = (drive == "0016E5") & (number >= 4740) & (number <= 5700)
    heading("false", "most alike")
    # Choosing the threshold must not use the reported drive.
    against = rows if not reported("0016E5") else np.ones_like(rows)
    false("any frame of another drive", compared, ~same & rows[:, None] & against)
    far = same & (apart >= TEN_SECONDS) & ~(waiting[:, None] & waiting)
    false("any of the same drive 10 s apart", compared, far & rows[:, None])
    if rows[waiting].any():
        far = same & (apart >= TEN_SECONDS)
        false("... with the frames of the waiting car", compared, far & rows[:, None])


def times(largest: int) -> None:
    image = town.render(0, 0, 2048, 1024).image
    rounds = []
    for _ in range(41):
        start = time.perf_counter()
        image_stats(image)
        rounds.append(time.perf_counter() - start)
    print(f"all statistics of a frame of 2048x1024: {1e3 * statistics.median(rounds):.2f} ms, one core")
    rng = np.random.default_rng(0)
    for train, val in ((3000, 500), (largest, 0)):
        width, height = DESCRIPTOR_PX
        measured = []
        for split, count in (("train", train), ("val", val)):
            for k in range(count):
                small = rng.integers(0, 256, width * height, np.uint8).tobytes()
                stats = ImageStats((0.0,) * 3, (0.0,) * 3, 0.0, 0.0, 0.0, small)  # type: ignore[arg-type]
                pair = Pair(split, str(k), "", f"{split}/{k}.png", "")
                measured.append(MeasuredPair(pair, (), pixels_digest=f"{split}{k}", stats=stats))
        start = time.perf_counter()
        near_pairs(measured)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(measured):,d} frames, each compared with all others: {time.perf_counter() - start:.1f} s; "
              f"peak memory of the process {memory:,.0f} MB", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--chosen-on", action="store_true")
    parser.add_argument("--times", type=int, default=0, metavar="FRAMES")
    a = parser.parse_args()
    cv2.setNumThreads(0)
    print(f"{cpu_name()}; near from a similarity of {NEAR}")
    if a.times:
        times(a.times)
    on_town(1 if a.chosen_on else 0, a.frames)
    if a.camvid:
        on_camvid(a.camvid, lambda drive: (drive != "0016E5") == a.chosen_on)


if __name__ == "__main__":
    main()
