import pytest
import torch
from torch import nn

from roadseg.train.ema import EMA


def test_follows_the_recurrence_with_growing_decay() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = EMA(network, 0.9)
    expected = network[0].weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            network[0].weight.add_(torch.randn(2, 2))
        network(torch.randn(4, 2))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[0].weight.detach()
    assert torch.allclose(average.network[0].weight, expected, atol=1e-6)
    assert int(average.network[1].num_batches_tracked) == 30
    assert not average.network[0].weight.requires_grad


@pytest.mark.parametrize("step", [0, 5])
def test_no_decay_is_the_network(step: int) -> None:
    network = nn.Linear(2, 2)
    average = EMA(network, 0.0)
    with torch.no_grad():
        network.weight.fill_(3)
    average.update(step)
    assert torch.equal(average.network.weight, network.weight)
