"""Dropout that several processes draw together."""

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn

from roadseg.errors import ConfigError
from roadseg.model.backbone import create_backbone
from roadseg.model.deeplab import Architecture, build
from roadseg.model.dropout import Dropout, SharedDropPath, draw_part, refuse_unshared_draws, share_draws
from roadseg.model.surgery import set_output_stride


def dropout() -> nn.Module:
    return Dropout(0.3)


def paths() -> nn.Module:
    made = nn.Sequential(DropPath(0.3))
    share_draws(made)
    return made


@pytest.mark.parametrize("make", [dropout, paths])
def test_several_processes_drop_what_one_would(make: type[nn.Module]) -> None:
    x = torch.ones(600, 4, 3, 3)

    def dropped(part: int, parts: int) -> torch.Tensor:
        module = make()
        draw_part(module, part, parts)
        torch.manual_seed(7)
        out: torch.Tensor = module(x[part * 600 // parts : (part + 1) * 600 // parts])
        return out

    whole = dropped(0, 1)
    for parts in (2, 3):
        assert torch.equal(torch.cat([dropped(part, parts) for part in range(parts)]), whole)
    assert abs(float((whole == 0).float().mean()) - 0.3) < 0.06 and torch.isclose(whole.max(), torch.tensor(1 / 0.7))
    assert torch.equal(make().eval()(x), x)


def test_a_path_is_dropped_whole_and_scaled_as_timm_does() -> None:
    x = torch.rand(64, 3, 5, 7) + 0.5
    for scaled in (True, False):
        ours, timms = nn.Sequential(DropPath(0.4, scaled)), DropPath(0.4, scaled)
        share_draws(ours)
        factors = {round(f, 4) for f in (ours(x) / x).flatten().tolist()}
        assert factors == {round(f, 4) for f in (timms(x) / x).flatten().tolist()}
        assert len((ours(x) / x).flatten(1).round(decimals=4).unique(dim=1).T) == 1  # one factor an image


def test_what_each_process_would_draw_for_itself_is_refused() -> None:
    shared = Architecture(
        num_classes=3, backbone="resnet18", output_stride=16, channels=8, backbone_options={"drop_path_rate": 0.2}
    )
    refuse_unshared_draws(build(shared, seed=0))
    own = Architecture(
        num_classes=3, backbone="resnet18", output_stride=16, channels=8, backbone_options={"drop_block_rate": 0.2}
    )
    with pytest.raises(ConfigError, match=r"model.backbone_options: DropBlock2d \(backbone.*drop_path_rate.*one GPU"):
        refuse_unshared_draws(build(own, seed=0))
    with pytest.raises(ConfigError, match=r"Dropout \(0, 0.1\)"):
        refuse_unshared_draws(nn.Sequential(nn.Dropout(0.1)))
    refuse_unshared_draws(nn.Sequential(nn.Dropout(0.0)))


def test_a_backbones_paths_are_shared_also_at_another_stride() -> None:
    a = Architecture(
        num_classes=3, backbone="resnet18", output_stride=16, channels=8, backbone_options={"drop_path_rate": 0.2}
    )
    net = build(a, seed=0)
    draw_part(net, 1, 2)
    set_output_stride(net, 8)
    found = [m for m in net.modules() if isinstance(m, DropPath)]
    assert found and all(type(m) is SharedDropPath and (m.part, m.parts) == (1, 2) for m in found)
    assert (net.dropout.part, net.dropout.parts) == (1, 2)


def test_a_backbone_without_paths_has_none() -> None:
    assert not [m for m in create_backbone("resnet18", 16).modules() if isinstance(m, DropPath)]
