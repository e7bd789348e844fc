import pytest

from roadseg.train.schedule import lr_factor


def curve(scheduler: str, steps: int = 100, warmup: int = 10) -> list[float]:
    return [lr_factor(s, steps, scheduler, warmup, 0.9) for s in range(steps)]


@pytest.mark.parametrize("scheduler", ["poly", "cosine", "constant"])
def test_warm_up_rises_to_the_peak_and_what_follows_never_rises(scheduler: str) -> None:
    factors = curve(scheduler)
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert all(0 < f <= 1 for f in factors)


def test_the_curves_are_the_textbooks() -> None:
    assert lr_factor(50, 100, "poly", 0, 0.9) == pytest.approx(0.5**0.9)
    assert lr_factor(50, 100, "cosine", 0, 0.9) == pytest.approx(0.5)
    assert lr_factor(99, 100, "constant", 0, 0.9) == 1


def test_a_warm_up_longer_than_the_run_takes_half_of_it() -> None:
    assert lr_factor(4, 10, "constant", 1000, 0.9) == 1
