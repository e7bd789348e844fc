"""What ranks tell one another, with the store of keys in this process and each rank's connection to it."""

import json
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from roadseg.errors import ConfigError, DataError, Interrupted, RoadsegError
from roadseg.train.distributed import rendezvous as room
from roadseg.train.distributed.environment import Place
from roadseg.train.distributed.rendezvous import PeerLost, Words, answered, packed, unpacked


@pytest.fixture
def two() -> tuple[Words, Words]:
    """Of two ranks without a launcher: rank 0 keeps the store."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return Words(Place(0, 2, port=port), "run 0"), Words(Place(1, 2, port=port), "run 0")


def test_the_others_hear_where_rank_0_stands(two: tuple[Words, Words]) -> None:
    main, other = two
    main.tell("training")
    assert other.wait("training", "trained") == "training"
    assert other.wait("trained", within=timedelta(seconds=0.3)) == ""
    assert Words(other.here, "run 1").wait("training", within=timedelta(seconds=0.3)) == ""  # of another run
    main.finish(await_others=False)
    assert other.wait("trained") == "trained"


def test_a_failure_reaches_who_waits_and_rank_0_stays_until_it_has(two: tuple[Words, Words]) -> None:
    main, other = two
    ended: list[float] = []

    def fails() -> None:
        with pytest.raises(DataError), main.present():
            raise DataError("bad frame", where="x.png", todo="look")
        ended.append(time.monotonic())

    thread = threading.Thread(target=fails)
    thread.start()
    time.sleep(0.6)  # it comes late
    assert not ended
    asked = time.monotonic()
    with pytest.raises(DataError, match="x.png: bad frame; look"):
        other.wait("training")
    thread.join(10)
    assert ended and asked < ended[0] < asked + 5
    other.fail(ValueError("a consequence"))
    assert isinstance(main.failure(), DataError)  # the first counts


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39287. Bye!",
         "Connection closed by peer [127.0.0.1]:39287"),
        ("NCCL communicator was aborted on rank 1.\nMore", "NCCL communicator was aborted on rank 1."),
        ("[Rank 0] a message [1, 2] without an address", "[Rank 0] a message [1, 2] without an address"),
    ],
)  # fmt: skip
def test_a_lost_peer_is_told_without_the_place_in_somebody_elses_source(said: str, plain: str) -> None:
    with pytest.raises(PeerLost) as caught, answered():
        raise RuntimeError(said)
    assert caught.value.found == f"another rank no longer answers ({plain})"


def test_a_systems_error_arrives_as_one() -> None:
    error = unpacked(json.loads(json.dumps(packed(OSError(28, "No space left on device", "/w/x"), 1))))
    assert isinstance(error, OSError) and (error.errno, error.filename) == (28, "/w/x")
    assert "No space left on device" in error.__notes__[0]
    other = unpacked(json.loads(json.dumps(packed(ValueError("no"), 1))))
    assert isinstance(other, RuntimeError) and str(other) == "ValueError in rank 1: no"


def test_rank_0_goes_once_all_have_heard(two: tuple[Words, Words]) -> None:
    main, other = two
    main.tell("training")
    other.heard()
    began = time.monotonic()
    main.finish(await_others=True)
    assert time.monotonic() - began < 3


def test_a_rank_that_does_not_come_is_named(
    two: tuple[Words, Words], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "MEET_WITHIN", timedelta(seconds=0.5))
    monkeypatch.setattr(room, "QUIET", timedelta(seconds=0.2))
    with pytest.raises(PeerLost, match="rank 1 of 2 did not come; expected all .*same command"):
        two[0].meet()
    here = two[0].here
    assert caplog.messages == [f"waiting at {here.address}:{here.port} for rank 1 of 2"]
    monkeypatch.setattr(room, "MEET_WITHIN", timedelta(seconds=20))
    late = threading.Thread(target=two[1].meet)
    late.start()
    two[0].meet()
    late.join(20)
    assert not late.is_alive()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MEET_WITHIN", timedelta(seconds=1))
    monkeypatch.setattr(room, "SILENCE", timedelta(seconds=3))  # a busy machine may be late
    for name in ("BEAT_EVERY_S", "FAILURE_HEARD_WITHIN_S", "HEARD_WITHIN_S"):
        monkeypatch.setattr(room, name, 0.2)
    monkeypatch.setattr(room, "QUIET", timedelta(seconds=0.2))


@pytest.mark.parametrize("error", [ConfigError("3 samples can't be shared"), Interrupted("no", signal_number=15)])
def test_an_error_is_not_hidden_nor_held_up_where_nobody_can_be_told(
    two: tuple[Words, Words], hasty: None, monkeypatch: pytest.MonkeyPatch, error: RoadsegError
) -> None:
    monkeypatch.setattr(room, "MEET_WITHIN", timedelta(seconds=60))
    began = time.monotonic()
    with pytest.raises(type(error)) as caught, two[1].present():
        raise error
    assert caught.value is error and time.monotonic() - began < 10


def test_rank_0_can_be_asked_while_it_makes_its_data(two: tuple[Words, Words], hasty: None) -> None:
    main, other = two
    with main.present():
        assert other.wait("training", within=timedelta(seconds=2)) == ""  # longer than it takes to give up
        main.tell("training")
        assert other.wait("training") == "training"


def test_who_needs_nobody_is_not_held_up(two: tuple[Words, Words]) -> None:
    began = time.monotonic()
    with two[1].present():
        pass
    assert time.monotonic() - began < 10


def test_a_rank_that_lives_is_waited_for(two: tuple[Words, Words], hasty: None) -> None:
    main, other = two

    def makes_data() -> None:
        with other.present():
            time.sleep(4)
            other.meet()

    thread = threading.Thread(target=makes_data)
    with main.present():
        thread.start()
        main.meet()
        thread.join(10)
        assert not thread.is_alive()


def test_a_rank_that_is_killed_over_its_data_is_named(two: tuple[Words, Words], hasty: None) -> None:
    main, other = two
    with other.present(), main.present():
        assert main.wait("life of 1", within=timedelta(seconds=10))
    with pytest.raises(PeerLost, match="rank 1 of 2 is gone without a word; expected a sign of life within 3 s"):
        main.meet()


def test_what_ended_rank_0_is_told_also_once_it_is_gone(
    two: tuple[Words, Words], hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FAILURE_HEARD_WITHIN_S", 10)
    main, other = two
    with other.present():
        with pytest.raises(DataError), main.present():
            raise DataError("bad frame", where="x.png", todo="look")
        assert main.store.check(["heard by 1"])  # while the other makes its data
    room._stores[main.here].delete_key(f"roadseg/0/{main.name}/{room.FAILED}")
    with pytest.raises(DataError, match="x.png: bad frame; look"):
        other.wait("training", within=timedelta(seconds=5))


def test_the_first_machine_stays_for_one_that_still_makes_its_data(two: tuple[Words, Words], hasty: None) -> None:
    main, other = (Words(replace(words.here, host=True), words.name) for words in two)

    def makes_data() -> None:
        with other.present():
            time.sleep(4)
            assert other.wait("training", "trained") == "trained"
            other.heard()

    thread = threading.Thread(target=makes_data)
    with main.present():
        thread.start()
        main.finish(await_others=False)
        assert main.store.check(["heard by 1"])
        thread.join(10)
    began = time.monotonic()
    Words(main.here, "run 1").finish(await_others=False)  # nobody comes
    assert 0.9 < time.monotonic() - began < 5


def test_an_error_of_the_connection_is_a_lost_rank() -> None:
    with pytest.raises(PeerLost, match="no longer answers .Connection closed"), answered():
        raise RuntimeError("Connection closed by peer")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        here = Place(0, 2, 0, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(RoadsegError, match=f"127.0.0.1:{here.port}: the processes can't meet.*MASTER_PORT"):
            Words(here, "x").tell("word")
