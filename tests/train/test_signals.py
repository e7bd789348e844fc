"""Signals that are told at once."""

import os
import signal
import threading

import pytest

from roadseg.errors import Interrupted
from roadseg.train.signals import stopped_at_once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_during_what_it_came_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with (
        pytest.raises(Interrupted, match=f"stopped by {number.name} while x was written; run again to go on") as caught,
        stopped_at_once("while x was written"),
    ):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except Exception:  # as libraries do that wrap errors
            pytest.fail("it was taken for an error")
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_that_something_swallows_is_told_in_the_end() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM now"), stopped_at_once("now"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except BaseException:  # as destructors and callbacks of C do
            pass


def test_ctrl_c_of_another_origin_is_let_through() -> None:
    with pytest.raises(KeyboardInterrupt), stopped_at_once("now"):
        raise KeyboardInterrupt


def test_in_a_thread_handlers_stay() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with stopped_at_once("now"):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]
