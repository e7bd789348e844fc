import re

import numpy as np
import pytest

from roadseg.report.distributions import histograms, location_map


def rectangles(path):
    """(x, y, width, height) of the boxes of a path that are drawn from their lower left corner."""
    parts = re.findall(r"M([\d.]+) ([\d.]+)v-([\d.]+)h([\d.]+)V[\d.]+z", path)
    return [(float(x), float(y) - float(h), float(w), float(h)) for x, y, h, w in parts]


def test_histograms_share_an_axis_and_count_like_numpy():
    rng = np.random.default_rng(0)
    rows = [("train", rng.normal(100, 20, 500).tolist()), ("val", rng.normal(160, 5, 50).tolist())]
    chart = histograms(rows, label="b", x_label="luma", bins=20)
    low, high = min(map(min, (v for _, v in rows))), max(map(max, (v for _, v in rows)))
    drawn = [rectangles(p) for p in re.findall(r'class="fill s\d" d="([^"]*)"', chart)]
    assert len(drawn) == 2
    for boxes, (_, values) in zip(drawn, rows, strict=True):
        counts = np.histogram(values, 20, (low, high))[0]
        assert [round((x - 8) / (404 / 20)) for x, *_ in boxes] == np.flatnonzero(counts).tolist()
        heights = np.array([h for *_, h in boxes])
        assert np.abs(heights - np.maximum(2, 44 * counts[counts > 0] / counts.max())).max() < 0.06
    assert drawn[1][0][1] > drawn[0][0][1]  # val stands below train


def test_ticks_of_a_histogram_stand_where_their_values_are():
    for log, values in ((False, [0.0, 10.0]), (True, [1.0, 100.0])):
        chart = histograms([("a", values)], label="a", x_label="x", log=log)
        at = {float(t.replace(",", "")): float(x) for x, t in re.findall(r'x="([\d.]+)"[^>]*>([\d.,]+)</text>', chart)}
        middle = 10.0 if log else 5.0
        ends = [at[v] for v in values] if not log else [at[1.0], at[100.0]]
        assert ends == [8, 412] and abs((at[middle] if middle in at else (at[4] + at[6]) / 2) - 210) < 0.2


def test_histograms_of_zeros_of_one_value_and_of_nothing():
    assert histograms([("a", []), ("b", [])], label="a", x_label="x") == ""
    assert histograms([("a", [0.0])], label="a", x_label="x", log=True) == ""
    for log in (False, True):
        assert "NaN" not in (same := histograms([("a", [3.0, 3.0])], label="a", x_label="x", log=log)) and same
    boxes = rectangles(histograms([("a", [0.0, 1.0, 100.0])], label="a", x_label="x", log=True, bins=10))
    assert [h for *_, h in boxes] == [44.0, 22.0]  # 0 counts with the smallest above it


def test_names_in_histograms_are_escaped():
    chart = histograms([("<script>", [1.0, 2.0])], label='"><img src=x>', x_label="<b>")
    assert "<script" not in chart and "<img" not in chart and "<b>" not in chart


@pytest.mark.parametrize("seed", range(4))
def test_a_place_map_covers_exactly_where_something_lies(seed):
    rng = np.random.default_rng(seed)
    shares = rng.random((16, 32)) * (rng.random((16, 32)) < 0.4) * 0.01
    drawn = np.zeros((16, 32))
    for opacity, path in re.findall(r'fill-opacity="([\d.]+)" d="([^"]*)"', location_map(shares, "road", 2.0)):
        for x, y, n in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            assert not drawn[int(y), int(x) : int(x) + int(n)].any()
            drawn[int(y), int(x) : int(x) + int(n)] = float(opacity)
    assert np.array_equal(drawn > 0, shares > 0)
    assert np.abs(drawn - shares / shares.max())[shares > 0].max() <= 1 / 6 + 0.01  # six steps, rounded up


def test_a_place_map_of_nothing_is_blank():
    chart = location_map(np.zeros((16, 32)), "road", 1.5)
    assert "<path" not in chart and "aspect-ratio: 1.500" in chart
