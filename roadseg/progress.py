"""Progress with rate and time left: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A stream that writes each redraw of the bar as a new line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = "ascii"

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(total: int, what: str, unit: str, initial: int = 0) -> tqdm[Any]:
    """A progress bar on stderr, shown after two seconds. Among training ranks only rank 0 shows it."""
    hidden = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(
            total=total, desc=what, unit=f" {unit}", initial=initial, delay=2, dynamic_ncols=True, disable=hidden
        )
    form = "{desc} {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}"
    lines: Any = _Lines(sys.stderr)
    return tqdm(
        total=total, desc=what, unit=f" {unit}", initial=initial, delay=2, mininterval=10, maxinterval=30,
        bar_format=form, file=lines, leave=False, disable=hidden,
    )  # fmt: skip


@contextmanager
def quiet(*names: str, below: int = logging.ERROR) -> Iterator[None]:
    """Suppress messages of these loggers below this level."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
