"""Which of several processes this one is, as torchrun or a SageMaker cluster says, and its share. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roadseg.config.training import Training
from roadseg.errors import ConfigError, UsageError

RESOURCES = Path("/opt/ml/input/config/resourceconfig.json")  # SageMaker's, in every training container
PORT = 29500  # where rank 0 is met when nobody says; torchrun's own default


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`; number `local_rank` of `local_world` on its machine.

    address, port: where rank 0 is met. hosted: whether a launcher keeps the store of keys there already;
    otherwise rank 0 does. host: it is a whole machine's only one, and may start one for each of its GPUs.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = PORT
    hosted: bool = False
    local_world: int = 1
    host: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0


def place(environment: Mapping[str, str] = os.environ, resources: Path = RESOURCES) -> Place:
    """From torchrun's variables; else a host of SageMaker's cluster; else alone.

    Raises UsageError if what is there is incomplete or no number.
    """
    if (said := environment.get("WORLD_SIZE") or "1") != "1":
        try:
            if not said.isdecimal():
                raise UsageError("that is no number", where=f"WORLD_SIZE={said}", todo="unset it, or use torchrun")
            world = _number(environment, "WORLD_SIZE", 1)
            if not environment["MASTER_ADDR"]:
                raise KeyError("MASTER_ADDR")
            return Place(
                _number(environment, "RANK", 0, world - 1),
                world,
                _number(environment, "LOCAL_RANK", 0),
                environment["MASTER_ADDR"],
                _number({"MASTER_PORT": str(PORT), **_given(environment)}, "MASTER_PORT", 1, 65535),
                environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                _number({"LOCAL_WORLD_SIZE": "1", **_given(environment)}, "LOCAL_WORLD_SIZE", 1),
            )
        except (KeyError, ValueError) as e:
            raise UsageError(
                f"WORLD_SIZE is {said}, but " + (f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)),
                expected="RANK below WORLD_SIZE, LOCAL_RANK and MASTER_ADDR beside it, numbers but for the last",
                where="the environment",
                todo="start the processes with torchrun, or unset WORLD_SIZE",
            ) from None
    return _of_host(resources) if resources.is_file() else Place()


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if value}


def _number(environment: Mapping[str, str], name: str, least: int, most: int = 1 << 31) -> int:
    """Raises KeyError where it is missing, ValueError with a sentence where it is none or out of bounds."""
    said = environment[name]
    if not said.isdecimal() or not least <= int(said) <= most:
        raise ValueError(f"{name} is {said!r}")
    return int(said)


def _of_host(resources: Path) -> Place:
    try:
        about = json.loads(resources.read_bytes())
        hosts = sorted(about["hosts"])
        return Place(hosts.index(about["current_host"]), len(hosts), address=hosts[0], host=True)
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"it can't be understood ({e})", expected="hosts and current_host", where=str(resources)
        ) from e


def refuse_uneven(t: Training, world: int) -> None:
    """Raise ConfigError if `world` ranks can't share a step's batch evenly."""
    parts = world * t.accumulate
    if t.batch_size % parts:
        by = f"{world} process{'es' * (world > 1)}" + f" x {t.accumulate} micro-batches" * (t.accumulate > 1)
        raise ConfigError(
            f"{t.batch_size} samples can't be shared evenly by {by}",
            expected=f"a multiple of {parts}",
            where="training.batch_size",
            todo=f"set {nearest_multiples(t.batch_size, parts)}: it counts the samples of a step over all of them",
        )


def nearest_multiples(number: int, of: int) -> str:
    """The one below, unless that is 0, and the one above."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
