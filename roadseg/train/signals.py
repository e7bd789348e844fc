"""SIGTERM and SIGINT: recorded between steps, raised at once where there is nothing to save.

Python lets only the main thread handle signals; elsewhere they stay as they are.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from roadseg.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and SIGINT are only noted; the yielded function returns the signal, or 0."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    old = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in STOPPING}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def stopped_at_once(during: str = "") -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise Interrupted. during: what was going on, for the message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def stop(number: int, _: object) -> None:
        caught.append(number)
        raise KeyboardInterrupt  # libraries let it through where they would wrap an error

    old = {s: signal.signal(s, stop) for s in STOPPING}
    try:
        try:
            yield
        except KeyboardInterrupt:
            if not caught:
                raise
        if caught:  # also where a destructor or a callback swallowed it
            name = signal.Signals(caught[0]).name
            text = " ".join(filter(None, ("stopped by", name, during)))
            raise Interrupted(f"{text}; run again to go on", signal_number=caught[0]) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
