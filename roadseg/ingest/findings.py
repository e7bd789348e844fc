"""What can be wrong with a data set, each with a code, a severity and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something wrong (error: refuses) or doubtful (warning: goes on) in the data.

    split: where, "train and val" if between two, "" if in none. files: one entry each, beginning with a
    path, what was found there after ": ". count: of what `message` counts, mostly len(files).
    """

    code: str
    severity: Literal["error", "warning"]
    split: str
    files: tuple[str, ...]
    count: int
    message: str
    fix: str


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


