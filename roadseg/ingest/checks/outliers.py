"""Find images unlike the others of their split, and splits of unlike class distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.image_stats import ImageStats
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources.pairs import split_order
from roadseg.labels import LabelSet

FEWEST = 30  # images needed before "far from the others" means anything
MOST = 0.05  # share of a split: what is more frequent is another kind of image, not an outlier
ALL_BLACK, ALL_WHITE = 0.95, 0.95  # shares of pixels
# An outlier is this many robust standard deviations (1.4826 x MAD) from the median and, because frames of one drive
# hardly vary, also differs by an absolute amount. Clean frames of CamVid and of the town stay within 4.5.
DEVIATIONS = 5.0
EXPOSURE_OFF = math.log(2.0)  # natural logarithm of the luma, or of its distance to white
SHARPNESS_OFF = math.log(1.8)  # natural logarithm
CAST_OFF = 0.35  # natural logarithm of red to green, blue to green
ASPECT_OFF = math.log(1.5)
COMMON_SIZE = 0.9  # of a split that has one size
GREY = 0.3  # of 255: a gray image's channels differ by no more
_NO_LIGHT = 8.0  # of 255: added to luma before the logarithm; colors of darker images are not compared
DRIFT = 0.25  # PSI; by the rule of thumb of credit scoring 0.1..0.25 is a moderate shift, above it a large one
_SMALLEST_SHARE = 1e-4  # the share used for a class that a split lacks
_MAX_LISTED_CLASSES = 5


def outliers(measured: Sequence[MeasuredPair]) -> list[Finding]:
    """Warnings for images that are too dark, too bright, blurred, of odd color or size, or rotated by EXIF.

    Images are compared with those of the same split and part, if there are at least `FEWEST`. All-black and
    all-white images and EXIF orientation are reported for any number.
    """
    findings: list[Finding] = []
    for split in split_order({s.pair.split for s in measured}):
        of_split = sorted((s for s in measured if s.pair.split == split and s.stats), key=lambda s: s.pair.image)
        parts = [[s for s in of_split if s.pair.part == part] for part in sorted({s.pair.part for s in of_split})]
        for code, find, what, fix in _KINDS:
            entries = tuple(f"{s.pair.image}: {text}" for part in parts for s, text in find(part))
            if entries:
                message = f"{plural(len(entries), 'image')} of {split} {what}"
                findings.append(Finding(code, "warning", split, entries, len(entries), message, fix))
    return findings


Outliers = Iterator[tuple[MeasuredPair, str]]


def _deviation(values: Sequence[float], least: float) -> np.ndarray:
    """Signed deviations [N] from the median; 0 for values within `least`, within DEVIATIONS, or not rare."""
    array = np.array(values, np.float64)
    if len(array) < FEWEST:
        return np.zeros(len(array))
    off = array - np.median(array)
    spread = 1.4826 * np.median(abs(off))
    far = (abs(off) >= least) & (abs(off) >= DEVIATIONS * spread)
    deviation = np.where(far, off, 0.0)
    for sign in (-1, 1):
        rare = deviation * sign > 0
        if rare.sum() > MOST * len(array):
            deviation[rare] = 0.0
    return deviation


def _dark(measured: Sequence[MeasuredPair]) -> Outliers:
    return _exposed(measured, [_stats(s).dark for s in measured], ALL_BLACK, "black", lambda luma: luma)


def _bright(measured: Sequence[MeasuredPair]) -> Outliers:
    return _exposed(measured, [_stats(s).bright for s in measured], ALL_WHITE, "white", lambda luma: 255 - luma)


def _exposed(
    measured: Sequence[MeasuredPair], shares: Sequence[float], most: float, extreme: str, left: Callable[[float], float]
) -> Outliers:
    """Compares logarithms, since exposure multiplies light."""
    luma = [_stats(s).luma for s in measured]
    deviation = _deviation([math.log(left(v) + _NO_LIGHT) for v in luma], EXPOSURE_OFF)
    for s, value, share, off in zip(measured, luma, shares, deviation, strict=True):
        if share >= most:
            yield s, f"{100 * share:.0f} % of it {extreme}"
        elif off < 0:
            yield s, f"mean luma {value:.0f} of 255, where {float(np.median(luma)):.0f} is usual"


def _blurred(measured: Sequence[MeasuredPair]) -> Outliers:
    sharp = [s for s in measured if _stats(s).sharpness > 0]  # flat images have none and are reported as dark or bright
    logs = [math.log(_stats(s).sharpness) for s in sharp]
    for s, deviation in zip(sharp, _deviation(logs, SHARPNESS_OFF), strict=True):
        if deviation < 0:
            yield s, f"sharpness {_stats(s).sharpness:.2f}, where {math.exp(float(np.median(logs))):.2f} is usual"


def _colour(measured: Sequence[MeasuredPair]) -> Outliers:
    measured = [s for s in measured if _stats(s).luma > 2 * _NO_LIGHT and max(_stats(s).std_rgb) > GREY]
    grey = [_is_grey(s) for s in measured]
    if len(measured) >= FEWEST and sum(grey) <= len(measured) / 2:
        yield from (
            (s, "a grey image among coloured ones") for s, is_grey in zip(measured, grey, strict=True) if is_grey
        )
    coloured = [s for s, is_grey in zip(measured, grey, strict=True) if not is_grey]
    casts = [[math.log((_stats(s).mean_rgb[c] + 1) / (_stats(s).mean_rgb[1] + 1)) for s in coloured] for c in (0, 2)]
    odd = np.any([_deviation(cast, CAST_OFF) != 0 for cast in casts], axis=0)
    middle = [math.exp(float(np.median(cast))) if cast else 1.0 for cast in casts]
    for k in np.flatnonzero(odd).tolist():
        red, blue = math.exp(casts[0][k]), math.exp(casts[1][k])
        usual = f"where {middle[0]:.2f} and {middle[1]:.2f} are usual"
        yield coloured[k], f"red {red:.2f} and blue {blue:.2f} times its green, {usual}"


def _is_grey(s: MeasuredPair) -> bool:
    stats = _stats(s)
    return all(max(v) - min(v) <= GREY for v in (stats.mean_rgb, stats.std_rgb))


def _size(measured: Sequence[MeasuredPair]) -> Outliers:
    """Report rare sizes if nearly all images share one size; otherwise (phones, crops) odd aspect ratios."""
    if len(measured) < FEWEST:
        return
    (width, height), common = Counter((s.width, s.height) for s in measured).most_common(1)[0]
    if common >= COMMON_SIZE * len(measured):
        for s in measured:
            if (s.width, s.height) != (width, height):
                yield s, f"{s.width}x{s.height}, where {width}x{height} is usual"
        return
    aspects = [math.log(s.width / s.height) for s in measured]
    for s, deviation in zip(measured, _deviation(aspects, ASPECT_OFF), strict=True):
        if deviation:
            yield s, f"{s.width}x{s.height}: of another shape than nearly all others"


def _rotated(measured: Sequence[MeasuredPair]) -> Outliers:
    for s in measured:
        if s.orientation != 1:
            yield s, f"EXIF orientation {s.orientation}"


def _stats(s: MeasuredPair) -> ImageStats:
    assert s.stats is not None
    return s.stats


_KINDS = (
    (
        "too-dark", _dark, "far darker than the others",
        "look at them; take out what shows nothing",
    ),
    (
        "too-bright", _bright, "far brighter than the others",
        "look at them; take out what shows nothing",
    ),
    (
        "blurred", _blurred, "far less sharp than the others",
        "look at them: out of focus, shaken, rain on the lens, or enlarged",
    ),
    (
        "odd-color", _colour, "whose colours are far from the others'",
        "look at them: grey, red and blue exchanged, or a camera's white balance",
    ),
    (
        "odd-size", _size, "of another size or shape than nearly all others",
        "look where they come from: thumbnails, crops, another camera",
    ),
    (
        "exif-rotated", _rotated, "stored on their side, turned upright by their EXIF data",
        "see that the masks lie as the upright images do: masks are taken as they are stored",
    ),
)  # fmt: skip


def histogram_drift(measured: Sequence[MeasuredPair], label_set: LabelSet) -> list[Finding]:
    """A warning for each split whose class shares differ from the first split's (train's) by a PSI above `DRIFT`.

    Void is ignored. Splits with fewer than `FEWEST` labeled images are not compared.
    """
    pixels: dict[str, np.ndarray] = {}
    for split in split_order({s.pair.split for s in measured}):
        rows = [
            s.histogram[: label_set.num_classes] for s in measured if s.pair.split == split and any(s.histogram[:-1])
        ]
        if len(rows) >= FEWEST:
            pixels[split] = np.sum(np.array(rows, np.float64), axis=0)
    first, *others = pixels or [""]
    findings = []
    for split in others:
        terms = psi(pixels[first], pixels[split])
        if terms.sum() > DRIFT:
            shares = {s: 100 * pixels[s] / pixels[s].sum() for s in (first, split)}
            order = np.argsort(-terms, kind="stable")[:_MAX_LISTED_CLASSES].tolist()
            names = [
                f"{label_set.names[k]} {shares[first][k]:.2g} % and {shares[split][k]:.2g} %"
                for k in order
                if terms[k] > 0.02 * DRIFT
            ]
            message = (
                f"the classes of {split} are distributed differently than those of {first} "
                f"(PSI {terms.sum():.2f}, above {DRIFT}), most of all {', '.join(names)}"
            )
            fix = f"draw {first} and {split} from the same drives and places, or expect scores on {split} to differ"
            where = f"{first} and {split}"
            findings.append(Finding("class-drift", "warning", where, (), len(names), message, fix))
    return findings


def psi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 [K]: each class's term of the population stability index (PSI) of two counts [K]; the sum is the PSI.

    Shares below 1/10,000 are raised to it, so that a class missing on one side does not make the PSI infinite.
    """
    p, q = (np.maximum(x / x.sum(), _SMALLEST_SHARE) for x in (a, b))
    p, q = p / p.sum(), q / q.sum()
    return (p - q) * np.log(p / q)
