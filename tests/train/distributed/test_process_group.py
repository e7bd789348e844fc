"""What ranks add up, where a process finds its place, and what several processes' ends are made into."""

import json
import logging
import pickle
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roadseg.config.training import Training
from roadseg.errors import ConfigError, DataError, Interrupted, NonFiniteLoss, RoadsegError, UsageError
from roadseg.train.distributed.environment import Place, place, refuse_uneven
from roadseg.train.distributed.launch import _verdict, launch
from roadseg.train.distributed.process_group import ALONE, Ranks, joined
from roadseg.train.distributed.rendezvous import PeerLost, packed, unpacked
from roadseg.train.distributed.worker import processes
from roadseg.train.losses.criterion import Criterion, Terms

CPU = torch.device("cpu")
TERMS = [f.name for f in fields(Terms)]


def layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def scene() -> tuple[Tensor, Tensor]:
    """Logits [4, 5, 12, 10] and labels [4, 48, 40]: void mostly in the first two, class 3 in the last two alone."""
    draw = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (4, 6, 5), generator=draw).repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[:2, 10:], label[2, :9] = 255, 3
    logits = torch.randn(4, 5, 12, 10, generator=draw)
    logits[1] = 0  # pixels that tie
    return logits, label.to(torch.uint8)


def loss_of_part(name: str, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss of `scene`, and the gradient of its logits."""
    terms = Terms(**{"cross_entropy": 0.0, name: 1.0})
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0])
    criterion = Criterion(terms, terms, 0.0, weights, 0.1, 0.05, 0.7, 2.0, 2, ranks)
    logits, label = (x.chunk(ranks.world)[ranks.rank] for x in scene())
    logits.requires_grad_()
    loss = criterion(logits, label, ranks.sum_(criterion.counts(label)), ranks.world)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def task(ranks: Ranks, folder: str) -> None:
    found: dict[str, Any] = {"ranks": ranks, "threads": torch.get_num_threads()}
    with joined(ranks, CPU):
        found["sum"] = ranks.sum_(torch.tensor([1.0, 10.0]) * (ranks.rank + 1))
        found["whole"] = ranks.sum_(torch.tensor([2**40 + ranks.rank]))
        found["given"] = ranks.from_main({"step": 3} if ranks.main else None)
        found["losses"] = {name: loss_of_part(name, ranks) for name in TERMS}
        found["rows"] = ranks.whole_rows(10 * torch.arange(3)[:, None] + torch.arange(2) + 2 * ranks.rank)
        found["columns"] = ranks.own_columns(found["rows"], 3)
        network = layers(seed=ranks.rank)
        ranks.same_weights(network)
        found["weights"] = {k: v.clone() for k, v in network.state_dict().items()}
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(ranks.rank))
        network.eval()(image).square().sum().backward()
        network[2].bias.grad = None  # as of a frozen part
        layout = network[0].weight.grad.stride()
        found["loss"] = ranks.sum_gradients(network.parameters(), torch.tensor(1.5 + ranks.rank))
        assert network[0].weight.grad.stride() == layout
        found["gradients"] = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        ranks.barrier()
    log = logging.getLogger("roadseg.train.distributed.process_group")
    log.info("rank %d speaks", ranks.rank)
    log.warning("rank %d warns", ranks.rank)
    Path(folder, f"{ranks.rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """What each of two ranks found, and what the process that started them logged."""
    folder, said = tmp_path_factory.mktemp("ranks"), []
    log = logging.getLogger("roadseg")
    handler, level = logging.Handler(logging.INFO), log.level
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign, assignment]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        launch(task, (str(folder),), 2)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)], said


def test_two_ranks_know_themselves_and_share_the_processor(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    assert [f["ranks"] for f in found[0]] == [Ranks(0, 2, 0, 2), Ranks(1, 2, 1, 2)]
    assert all(f["threads"] <= max(1, torch.get_num_threads()) for f in found[0])


def test_sums_over_ranks(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    for f in found[0]:
        assert f["sum"].tolist() == [3, 30]
        assert f["whole"].tolist() == [2**41 + 1]
        assert f["given"] == {"step": 3}


def test_weights_become_those_of_rank_0(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    expected = layers(seed=0).state_dict()
    for f in found[0]:
        assert f["weights"].keys() == expected.keys()
        assert all(torch.equal(f["weights"][k], v) for k, v in expected.items())


def test_gradients_are_those_of_both_batches(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    network = layers(seed=0).eval()
    for rank in (0, 1):
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
        network(image).square().sum().backward()
    for f in found[0]:
        assert f["loss"].shape == () and f["loss"].item() == 4
        assert "2.bias" not in f["gradients"] and "0.weight" in f["gradients"]
        for name, gradient in f["gradients"].items():
            torch.testing.assert_close(gradient, network.get_parameter(name).grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_of_several_ranks_is_that_of_all_their_images(name: str, found: Any) -> None:
    loss, gradient = loss_of_part(name, ALONE)
    shares, gradients = zip(*(f["losses"][name] for f in found[0]), strict=True)
    assert loss > 0.01
    torch.testing.assert_close(sum(shares), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-5, atol=1e-8)


def test_rows_are_shared_out_and_come_back(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    assert [f["rows"].tolist() for f in found[0]] == [
        [[0, 1, 2, 3], [10, 11, 12, 13]],
        [[20, 21, 22, 23], [0, 0, 0, 0]],
    ]
    assert [f["columns"].tolist() for f in found[0]] == [[[0, 1], [10, 11], [20, 21]], [[2, 3], [12, 13], [22, 23]]]


def exchange_task(ranks: Ranks, folder: str) -> None:
    with joined(ranks, CPU):
        own = 10 * torch.arange(5)[:, None] + ranks.rank
        rows = ranks.whole_rows(own)
        assert torch.equal(ranks.own_columns(rows, 5), own)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(rows.tolist()))


def test_rows_that_the_ranks_do_not_divide_are_filled_up(tmp_path: Path) -> None:
    launch(exchange_task, (str(tmp_path),), 3)
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert rows == [[[0, 1, 2], [10, 11, 12]], [[20, 21, 22], [30, 31, 32]], [[40, 41, 42], [0, 0, 0]]]


def test_rank_0_is_heard_and_the_others_when_they_warn(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    assert sorted(found[1]) == ["rank 0 speaks", "rank 0 warns", "rank 1: rank 1 warns"]


def test_alone_nothing_is_sent() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with joined(ALONE, CPU):
        assert ALONE.sum_gradients([parameter], torch.tensor(2.0)).item() == 2
        ALONE.same_weights(nn.Linear(1, 1))
        ALONE.barrier()
        assert ALONE.sum_(torch.ones(1)).item() == 1 and ALONE.from_main("x") == "x" and ALONE.main
    assert parameter.grad.tolist() == [1, 1]


# ---- where a process finds its place --------------------------------------------------------

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


def test_place_of_torchrun(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    assert place(TORCHRUN, nowhere) == Place(5, 8, 1, "node0", 1234)
    assert place({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, nowhere).hosted
    assert place({}, nowhere) == place({"WORLD_SIZE": "1", "RANK": "0"}, nowhere) == Place()
    for broken in (
        {"WORLD_SIZE": "2"}, {**TORCHRUN, "RANK": "first"}, {**TORCHRUN, "RANK": "99"}, {**TORCHRUN, "MASTER_ADDR": ""},
        {**TORCHRUN, "MASTER_PORT": "99999"},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="WORLD_SIZE is .*, but [A-Z_]* is .*torchrun"):
            place(broken, nowhere)
    with pytest.raises(UsageError, match="WORLD_SIZE=two: that is no number"):
        place({"WORLD_SIZE": "two"}, nowhere)


def test_place_of_a_sagemaker_host(tmp_path: Path) -> None:
    config = tmp_path / "resourceconfig.json"
    config.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"], "network": "eth0"}))
    assert place({}, config) == Place(1, 2, 0, "algo-1", host=True)
    assert place(TORCHRUN, config).world == 8  # a launcher inside the container knows more
    config.write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
    assert place({}, config).world == 1
    config.write_text("{")
    with pytest.raises(UsageError, match="hosts and current_host"):
        place({}, config)


# ---- refusals -------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many GPUs there seem to be."""

    def there(count: int, mps: bool = False) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)

    return there


def test_as_many_processes_as_asked_for(gpus: Any) -> None:
    gpus(4)
    assert [processes(Training(gpus=n)) for n in (0, 1, 2, 4)] == [4, 1, 2, 4]
    assert processes(Training(gpus=3, device="cpu", batch_size=6)) == 3
    assert processes(Training(gpus=0, device="cpu")) == 1
    gpus(0)
    assert processes(Training(gpus=0)) == 1
    assert processes(Training(gpus=1, device="mps")) == 1


@pytest.mark.parametrize(
    "there, mps, training, message",
    [
        (2, False, {"gpus": 4}, "training.gpus: 4 GPUs, but this machine has 2; expected 1 to 2, or 0 for all"),
        (0, False, {"gpus": 2}, "this machine has none; expected 1, or 0.*training.device cpu"),
        (0, True, {"gpus": 2}, "2 with training.device auto, which is one"),
        (0, True, {"gpus": 2, "device": "mps"}, "training.device mps, which is one"),
        (4, False, {"gpus": 2, "device": "cuda:1"}, "cuda:1, which is one.*set training.device to cuda"),
        (
            0,
            False,
            {"gpus": 2, "device": "cpu", "batch_size": 3},
            "training.batch_size: 3 .*by 2 processes; expected a multiple of 2; set 2 or 4: it counts",
        ),
        (4, False, {"gpus": 0, "batch_size": 6}, "by 4 processes; expected a multiple of 4; set 4 or 8"),
    ],
)
def test_impossible_numbers_of_gpus_are_refused(
    gpus: Any, there: int, mps: bool, training: dict[str, Any], message: str
) -> None:
    gpus(there, mps)
    with pytest.raises(ConfigError, match=message):
        processes(Training(**training))


@pytest.mark.parametrize(("mps", "device"), [(False, "cuda:1"), (True, "mps"), (True, "auto")])
def test_processes_that_were_started_together_can_t_share_one_device(gpus: Any, mps: bool, device: str) -> None:
    gpus(0 if mps else 4, mps)
    with pytest.raises(
        ConfigError, match=f"training.device: {device}, which is one, for each of 2 processes .*cuda, of"
    ):
        processes(Training(device=device), machines=2)
    assert processes(Training(device="cuda", gpus=1), machines=2) == processes(Training(device="cpu"), machines=2) == 1


def test_micro_batches_count_too() -> None:
    refuse_uneven(Training(batch_size=8, accumulate=2), 4)
    with pytest.raises(ConfigError, match="by 4 processes x 4 micro-batches; expected a multiple of 16; set 16"):
        refuse_uneven(Training(batch_size=8, accumulate=4), 4)


# ---- errors between processes ---------------------------------------------------------------


def test_errors_keep_class_parts_and_exit_code() -> None:
    for error in (
        NonFiniteLoss("loss nan", expected="finite numbers", where="samples 1", todo="look"),
        DataError("bad frame", where="x.png"),
        Interrupted("stopped by SIGTERM after step 3", signal_number=15),
        PeerLost("gone", todo="run again"),
    ):
        again = unpacked(json.loads(json.dumps(packed(error, 1))))
        assert str(again) == str(error) and isinstance(again, RoadsegError) and again.exit_code == error.exit_code
        assert type(again) is type(error)
    try:
        raise KeyError("missing")
    except KeyError as e:
        foreign = unpacked(json.loads(json.dumps(packed(e, 1))))
    assert type(foreign) is RuntimeError and str(foreign) == "KeyError in rank 1: 'missing'"
    assert "raise KeyError" in foreign.__notes__[0]


def heard(done: set[int] = frozenset(), *rows: tuple[int, Exception]) -> Any:  # type: ignore[assignment]
    return SimpleNamespace(done=done, pids={0: 100, 1: 101}, rows=[packed(error, rank) for rank, error in rows])


def test_of_all_ends_the_cause_is_told() -> None:
    lost = PeerLost("another rank no longer answers")
    verdict = partial(_verdict, range(2), others=False)
    stop, echo = (Interrupted(f"stopped by {by}", signal_number=15) for by in ("SIGTERM", "another rank's signal"))
    assert verdict(heard({0, 1}), {}, 0) is None
    assert "bad" in str(verdict(heard(set(), (0, lost), (1, DataError("bad"))), {0: 1}, 0))
    assert "bad" in str(verdict(heard(set(), (0, stop), (1, DataError("bad"))), {1: 1}, 15))
    assert str(verdict(heard(set(), (0, echo), (1, stop)), {}, 0)) == "stopped by SIGTERM"
    early = verdict(heard(), {0: -15}, 15)
    assert isinstance(early, Interrupted) and early.exit_code == 143
    for codes in ({1: -9}, {0: 1, 1: -9}):  # whichever end was seen first
        killed = verdict(heard(set(), (0, lost)), codes, 0)
        assert "rank 1 (process 101) was killed by SIGKILL" in str(killed)
    assert "rank 1 (process 101) ended without a word" in str(verdict(heard(set(), (0, lost)), {0: 1}, 0))
    assert "no longer answers" in str(verdict(heard(set(), (0, lost), (1, lost)), {0: 1}, 0))


def test_of_ends_on_several_machines_the_other_s_is_the_cause_where_nobody_died_here() -> None:
    lost = PeerLost("another rank no longer answers")
    row = packed(lost, 2)
    here = SimpleNamespace(done=set(), pids={2: 100, 3: 101}, rows=[row])
    found = _verdict(range(2, 4), here, {2: 1}, 0, True)
    assert isinstance(found, PeerLost) and str(found) == str(lost)
    killed = _verdict(range(2, 4), here, {2: 1, 3: -9}, 0, True)
    assert "rank 3 (process 101) was killed by SIGKILL" in str(killed)
    nobody = SimpleNamespace(done=set(), pids={2: 100, 3: 101}, rows=[])
    assert "rank 2 (process 100) ended without a word" in str(_verdict(range(2, 4), nobody, {}, 0, True))
