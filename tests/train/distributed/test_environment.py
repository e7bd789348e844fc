"""Where a process finds its rank, and a host its cluster."""

import json
from pathlib import Path

import pytest

from roadseg.errors import UsageError
from roadseg.train.distributed.environment import ALONE, Cluster, cluster_from_environment, sagemaker_hosts

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


def test_torchruns_variables() -> None:
    assert cluster_from_environment(TORCHRUN) == Cluster(rank=5, world=8, local_rank=1)
    assert cluster_from_environment({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}).local_world == 4
    assert cluster_from_environment({}) == cluster_from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": ""}, "RANK is missing"),
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"RANK": "99"}, "RANK is '99'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_incomplete_variables_are_refused(changes: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError) as e:
        cluster_from_environment({**TORCHRUN, **changes})
    assert named in e.value.found and e.value.where == "the environment" and e.value.exit_code == 2


def test_hosts_of_a_sagemaker_cluster(tmp_path: Path) -> None:
    path = tmp_path / "resourceconfig.json"
    assert sagemaker_hosts(path) == (0, [])
    path.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"], "network": "eth0"}))
    assert sagemaker_hosts(path) == (1, ["algo-1", "algo-2"])
    path.write_text("{")
    with pytest.raises(UsageError) as e:
        sagemaker_hosts(path)
    assert e.value.where == str(path)
