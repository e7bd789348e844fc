"""Check that ranks can share a batch. Needs no torch."""

from __future__ import annotations

from roadseg.errors import ConfigError


def refuse_uneven_batch(batch_size: int, accumulate: int, world: int) -> None:
    """Raise ConfigError if `world` ranks can't share a step's batch evenly, micro-batches included."""
    parts = world * accumulate
    if batch_size % parts:
        by = f"{world} process{'es' * (world > 1)}" + f" x {accumulate} micro-batches" * (accumulate > 1)
        raise ConfigError(
            f"{batch_size} samples can't be shared evenly by {by}",
            expected=f"a multiple of {parts}",
            where="training.batch_size",
            todo=f"set {nearest_multiples(batch_size, parts)}: it counts the samples of a step over all of them",
        )


def nearest_multiples(number: int, of: int) -> str:
    """The multiple below, unless that is 0, and the one above."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
