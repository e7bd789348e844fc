"""history.jsonl: one row a step and one a validation; no times, so every run writes the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from roadseg.files import read_json_lines, write_atomic
from roadseg.train.checkpoint import not_saved


class History:
    """Writes history.jsonl. Drops rows of later steps that a killed run wrote; writes nothing without a path."""

    def __init__(self, path: Path | None, step: int) -> None:
        self._path, self._new = path, ""
        self._scores: dict[str, list[float]] = {}
        self._validated: set[int] = set()
        if path is None:
            return
        kept = [row for row in read_json_lines(path) if row["step"] <= step]
        for row in kept:
            self._score(row)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, **row: Any) -> None:
        self._score(row)
        if self._path is not None:
            self._new += json.dumps(row) + "\n"

    def _score(self, row: dict[str, Any]) -> None:
        if "split" in row:
            self._scores.setdefault(row["split"], []).append(row["miou"] or 0.0)
            self._validated.add(row["step"])

    def validated(self, step: int) -> bool:
        return step in self._validated

    def validations_without_gain(self, split: str) -> int:
        """How many of the last validations of a split did not beat its best before them."""
        scores = self._scores.get(split, [])
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def flush(self) -> None:
        """Write the rows. Must come before a checkpoint is saved: the rows of its step are never written again."""
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(self._new)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise not_saved(e, self._path, len(self._new), self._path.parent / "checkpoints") from e
        self._new = ""
