"""Comparing data profiles: equal ones are the same, differences are named."""

from __future__ import annotations

import numpy as np
import pytest

from roadseg.errors import DataError
from roadseg.labels import CAMVID, CITYSCAPES
from roadseg.review.data_profile import FRAMES, QUANTITIES, Profile, make_profile, sampled_indexes, shrink
from roadseg.review.drift import compare, psi, separability, table, verdict


def frames(seed: int, count: int = 120, brightness: float = 1.0, blur: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        image = rng.integers(0, 200, (24, 48, 3)) * rng.uniform(0.8, 1.2) * brightness
        if blur:
            image = np.repeat(np.repeat(image[::4, ::4], 4, axis=0), 4, axis=1)
        out.append(np.clip(image, 0, 255).astype(np.uint8))
    return out


def embed(image: np.ndarray) -> np.ndarray:
    grid = image[:24, :48].reshape(2, 12, 2, 24, 3).mean(axis=(1, 3))
    return np.concatenate([grid.ravel(), image.std(axis=(0, 1))]).astype(np.float32)


def profile(images: list[np.ndarray], pixels: list[int] | None = None, by: str = "n") -> Profile:
    pixels = pixels or [1000] * 11 + [50]
    return make_profile("t", images, len(images), pixels, CAMVID, embed if by else None, by)


def by_name(a: Profile, b: Profile) -> dict[str, str]:
    return {r.quantity: r.verdict for r in compare(a, b)}


def test_two_halves_of_one_population_are_the_same() -> None:
    found = [compare(profile(frames(2 * i)), profile(frames(2 * i + 1))) for i in range(20)]
    assert sum(verdict(rows) == "same" for rows in found) >= 17
    assert all(verdict(rows) != "different" for rows in found)


def test_a_darker_set_differs_in_exposure_and_embedding_only() -> None:
    found = by_name(profile(frames(0)), profile(frames(1, brightness=0.4)))
    assert found["exposure"] == found["backbone's view"] == "different"
    assert found["classes"] == "same"


def test_blur_lowers_sharpness() -> None:
    assert by_name(profile(frames(0)), profile(frames(1, blur=True)))["sharpness"] == "different"


def test_classes_that_moved_are_named_with_their_shares() -> None:
    moved = [1000] * 11
    moved[3] = 20_000
    row = compare(profile(frames(0)), profile(frames(1), moved))[0]
    assert row.verdict == "different" and row.note.startswith("road 9.1% to 66.7%")


def test_classes_of_one_set_only_are_named() -> None:
    other = make_profile("t", frames(1), 120, [1000] * 19, CITYSCAPES, embed, "n")
    row = compare(profile(frames(0)), other)[0]
    assert row.verdict != "same" and "in one of the two only" in row.note and "bicyclist" in row.note


def test_few_frames_and_different_networks_are_not_compared() -> None:
    found = by_name(profile(frames(0, 5)), profile(frames(1, 5)))
    assert found["exposure"] == found["backbone's view"] == "not compared"
    assert by_name(profile(frames(0), by="m"), profile(frames(1), by="n"))["backbone's view"] == "not compared"
    assert by_name(profile(frames(0), by=""), profile(frames(1), by=""))["backbone's view"] == "not compared"


def test_psi_against_its_definition() -> None:
    a, b = np.array([10.0, 30, 60]), np.array([20.0, 20, 60])
    p, q = (a + 0.5) / 101.5, (b + 0.5) / 101.5
    assert psi(a, b) == pytest.approx(sum((y - x) * np.log(y / x) for x, y in zip(p, q, strict=True)))
    assert psi(a, a) == 0 and np.isfinite(psi(a, np.array([100.0, 0, 0])))


def test_separability_of_equal_and_distinct_sets() -> None:
    rng = np.random.default_rng(0)
    same = [separability(rng.normal(size=(100, 8)), rng.normal(size=(60, 8))) for _ in range(10)]
    assert abs(np.mean(same) - 0.5) < 0.06
    assert separability(rng.normal(size=(100, 8)), rng.normal(size=(60, 8)) + 4) > 0.99


def test_a_profile_survives_json() -> None:
    import json

    before = profile(frames(0, 30))
    after = Profile.from_json(json.loads(json.dumps(before.to_json())))
    assert after.class_pixels == before.class_pixels and after.images == 30
    for name in QUANTITIES:
        np.testing.assert_allclose(after.values[name], before.values[name], atol=1e-3)
    np.testing.assert_allclose(after.embeddings, before.embeddings, rtol=1e-3)
    assert compare(before, after)[1].verdict == "same"


@pytest.mark.parametrize("broken", [{}, {"schema": 1}, {"schema": 99}, []])
def test_a_broken_profile_is_refused(broken: object) -> None:
    with pytest.raises(DataError) as e:
        Profile.from_json(broken)  # type: ignore[arg-type]
    assert e.value.todo


def test_resolution_is_not_drift() -> None:
    big = np.random.default_rng(0).integers(0, 256, (512, 1024, 3)).astype(np.uint8)
    assert shrink(big).shape == (256, 512, 3)
    assert sampled_indexes(3) == [0, 1, 2] and len(set(sampled_indexes(10_000))) == FRAMES


def test_the_table_ends_with_one_verdict() -> None:
    text = table(compare(profile(frames(0)), profile(frames(1, brightness=0.4))), "a.yaml", "b.yaml")
    assert text.splitlines()[-1].startswith("verdict  different: ")
    assert "exposure" in text
