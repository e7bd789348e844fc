"""Where the package's log lines go: the terminal, and log.jsonl of a run."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = logging.getLogger("roadseg")


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How a process logs, for its children to do alike. file: log.jsonl of the run, "" for none."""

    level: int
    console: bool
    file: str


class JsonLines(logging.Handler):
    """One object a line with time, level, logger and message."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        row = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as f:  # the terminal has it too
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def log_to_console(stream: Any, prefix: str = "") -> None:
    """Log the package's lines to `stream` and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(prefix.replace("%", "%%") + "%(message)s"))
    PACKAGE.handlers[:] = [handler]
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False


def current_log_settings() -> LogSettings:
    files = [str(handler.path) for handler in PACKAGE.handlers if isinstance(handler, JsonLines)]
    console = any(isinstance(handler, logging.StreamHandler) for handler in PACKAGE.handlers)
    return LogSettings(level=PACKAGE.getEffectiveLevel(), console=console, file=files[0] if files else "")


def log_as(settings: LogSettings, prefix: str = "") -> None:
    """Log as another process does. With a prefix, which names this process, only warnings."""
    log_to_console(sys.stderr, prefix)
    if not settings.console:
        PACKAGE.handlers.clear()
    if settings.file:
        PACKAGE.addHandler(JsonLines(Path(settings.file)))
    PACKAGE.setLevel(max(settings.level, logging.WARNING) if prefix else settings.level)
