"""What ranks compute together."""

import json
import logging
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roadseg.files import read_json_lines
from roadseg.logs import JsonLines
from roadseg.train.distributed.launch import launch
from roadseg.train.distributed.process_group import ALONE, Ranks, joined
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
    criterion = Criterion(
        main=terms,
        auxiliary=terms,
        auxiliary_weight=0.0,
        class_weights_K=weights,
        label_smoothing=0.1,
        ohem_threshold=0.05,
        ohem_keep=0.7,
        focal_gamma=2.0,
        boundary_px=2,
        ranks=ranks,
    )
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
        found["rows"] = ranks.gather_rows(10 * torch.arange(3)[:, None] + torch.arange(2) + 2 * ranks.rank)
        found["columns"] = ranks.scatter_columns(found["rows"], 3)
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
    log = logging.getLogger("roadseg.train")
    log.info("rank %d at work", ranks.rank)
    log.warning("rank %d warns", ranks.rank)
    Path(folder, f"{ranks.rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """What each of two ranks computed, and the messages in the run's log."""
    folder = tmp_path_factory.mktemp("ranks")
    log = logging.getLogger("roadseg")
    handler, level = JsonLines(folder / "log.jsonl"), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        launch(task, (str(folder),), 2)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    messages = [row["message"] for row in read_json_lines(folder / "log.jsonl")]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)], messages


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
        rows = ranks.gather_rows(own)
        assert torch.equal(ranks.scatter_columns(rows, 5), own)
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(rows.tolist()))


def test_rows_that_the_ranks_do_not_divide_are_filled_up(tmp_path: Path) -> None:
    launch(exchange_task, (str(tmp_path),), 3)
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert rows == [[[0, 1, 2], [10, 11, 12]], [[20, 21, 22], [30, 31, 32]], [[40, 41, 42], [0, 0, 0]]]


def test_rank_0_logs_everything_and_the_others_their_warnings(found: tuple[list[dict[str, Any]], list[str]]) -> None:
    assert sorted(found[1]) == ["rank 0 at work", "rank 0 warns", "rank 1 warns"]


def test_alone_nothing_is_sent() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with joined(ALONE, CPU):
        assert ALONE.sum_gradients([parameter], torch.tensor(2.0)).item() == 2
        ALONE.same_weights(nn.Linear(1, 1))
        ALONE.barrier()
        assert ALONE.sum_(torch.ones(1)).item() == 1 and ALONE.from_main("x") == "x" and ALONE.main
    assert parameter.grad.tolist() == [1, 1]
