import re

import numpy as np
import pytest

from roadseg.report import charts


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.00037), (1, 5000), (-3, 7), (99.9, 100.1)])
def test_ticks_are_round_and_cover(low, high):
    ticks = charts.ticks(low, high)
    steps = np.diff(ticks)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 3 <= len(ticks) <= 9
    assert np.allclose(steps, steps[0])
    lead = steps[0] / 10 ** np.floor(np.log10(steps[0] * 1.0001))
    assert min(abs(lead - m) for m in (1, 2, 5)) < 1e-6


def test_lines_put_points_where_the_axes_say():
    chart = charts.lines([charts.Line("a", [(0, 0.0), (100, 1.0)])], label="a", x_label="step", percent=True)
    (left, bottom), (right, top) = (
        map(float, p.split()) for p in re.search(r'd="M([\d. L]+)"/></svg>', chart)[1].split("L")
    )
    tick_y = {t: float(y) for y, t in re.findall(r'y="([\d.]+)" dy="4" text-anchor="end">(\d+%)', chart)}
    assert (bottom, top) == (tick_y["0%"], tick_y["100%"]) and bottom > top  # y grows downwards
    tick_x = {t: float(x) for x, t in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', chart)}
    assert (left, right) == (tick_x["0"], tick_x["100"]) and left < right


def test_one_point_and_no_point():
    assert "dot s0" in charts.lines([charts.Line("a", [(5, 2.0)])], label="a", x_label="step")
    assert charts.lines([charts.Line("a", [])], label="a", x_label="step") == ""


def test_bars_stand_one_below_the_other_and_none_draws_nothing():
    drawn = charts.bars([0.25, None, 1.0])
    assert re.findall(r'class="s(\d)" y="(\d+)" width="([\d.]+)"', drawn) == [
        ("0", "0", "25.00"),
        ("2", "16", "100.00"),
    ]
    assert 'viewBox="0 0 100 22"' in drawn
