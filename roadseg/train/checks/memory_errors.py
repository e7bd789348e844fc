"""Recognize errors that say that memory was not enough."""

from __future__ import annotations

import torch

from roadseg.errors import RoadsegError

_MESSAGES = ("can't allocate memory", "out of memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough; the CPU and MPS raise plain RuntimeErrors."""
    if isinstance(error, RoadsegError):
        return False
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(message in text for message in _MESSAGES)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class if it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
