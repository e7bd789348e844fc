"""Read this process's rank from torchrun's variables, and a SageMaker cluster's hosts.

Needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roadseg.errors import UsageError

SAGEMAKER_RESOURCES = Path("/opt/ml/input/config/resourceconfig.json")  # in every training container
PORT = 29500  # torchrun's own default


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Process `rank` of `world`; number `local_rank` of `local_world` on its machine. Alone by default."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


ALONE = Cluster()


def cluster_from_environment(environment: Mapping[str, str] = os.environ) -> Cluster:
    """From the variables that torchrun sets. Raises UsageError if they are incomplete or not numbers."""
    world = environment.get("WORLD_SIZE") or "1"
    if world == "1":
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    numbers = {name: environment.get(name, "") for name in names if name != "MASTER_ADDR"}
    wrong = [f"{name} is {value!r}" for name, value in numbers.items() if value and not value.isdecimal()]
    wrong = wrong or ([] if missing or int(numbers["RANK"]) < int(world) else [f"RANK is {numbers['RANK']!r}"])
    if missing or wrong:
        raise UsageError(
            f"WORLD_SIZE is {world}, but " + (", ".join(wrong) if wrong else f"{', '.join(missing)} is missing"),
            expected="RANK below WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
            where="the environment",
            todo="start the processes with torchrun, or unset WORLD_SIZE",
        )
    rank, _, local_rank, _ = map(int, numbers.values())
    local_world = environment.get("LOCAL_WORLD_SIZE", "1")
    return Cluster(
        rank=rank,
        world=int(world),
        local_rank=local_rank,
        local_world=int(local_world) if local_world.isdecimal() else 1,
    )


def sagemaker_hosts(resources: Path = SAGEMAKER_RESOURCES) -> tuple[int, list[str]]:
    """(this host's number, all hosts in order); (0, []) outside of a SageMaker training container.

    Raises UsageError for a file that can't be understood.
    """
    if not resources.is_file():
        return 0, []
    try:
        content = json.loads(resources.read_bytes())
        hosts = sorted(content["hosts"])
        return hosts.index(content["current_host"]), hosts
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"not readable ({e})", expected="hosts and current_host", where=str(resources)) from e
