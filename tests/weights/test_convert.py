"""Pickles become safetensors without running what they hold."""

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from roadseg.cli.convert import convert, convert_arguments
from roadseg.config.sections import load_config
from roadseg.errors import ArchiveError, UsageError
from roadseg.files import sha256_file
from roadseg.weights import convert as module
from roadseg.weights.convert import convert_checkpoint


def state() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator)
    return OrderedDict(
        {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
            "half": whole.half(),
            "turned": whole.T,
            "row": whole[1],
            "bn.num_batches_tracked": torch.tensor(7),
        }
    )


def saved(content: Any, folder: Path, **options: Any) -> Path:
    path = folder / "model.pth"
    torch.save(content, path, **options)
    return path


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    ("wrap", "left_out"),
    [
        (lambda s: s, ()),
        (lambda s: dict(s), ()),
        (lambda s: {"state_dict": s, "meta": {"CLASSES": ["road"]}, "optimizer": OPTIMIZER}, ("meta", "optimizer")),
        (lambda s: {"model_state": s, "cur_itrs": 9, "best_score": 0.7}, ("best_score", "cur_itrs")),
        (lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}, "arch": "x"}}, ("arch",)),
        (lambda s: {**s, "version": 3}, ("version",)),
        (
            lambda s: {"cur_itrs": 5, "model_state": s, "best_score": torch.tensor(0.5)},
            ("best_score", "cur_itrs"),
        ),
        (
            lambda s: {"loss": torch.ones(2), "model": {"step": torch.tensor(1), "state_dict": s}, "state_dict": {}},
            ("loss", "state_dict", "step"),
        ),
        (lambda s: {**s, "model": {"name": "x"}, "\x1b[2J": 1}, ("'\\x1b[2J'", "model")),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_networks_tensors_and_nothing_else(
    wrap: Any, left_out: tuple[str, ...], zipped: bool, tmp_path: Path
) -> None:
    source, out = saved(wrap(state()), tmp_path, _use_new_zipfile_serialization=zipped), tmp_path / "o.safetensors"
    done = convert_checkpoint(source, out)
    tensors = load_file(out)
    assert tensors.keys() == state().keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in state().items())
    assert (done.tensors, done.parameters, done.left_out) == (5, 108 + 24 + 24 + 6 + 1, left_out)
    with safe_open(out, "pt") as f:
        (line,) = f.metadata().values()
    assert line.startswith(f"model.pth, SHA-256 {sha256_file(source)}, by roadseg ")
    again = tmp_path / "again.safetensors"
    convert_checkpoint(source, again)
    assert again.read_bytes() == out.read_bytes()


class Hook:
    """What an attacker pickles: a call that runs when the file is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_a_planted_call_does_not_run(where: str, zipped: bool, tmp_path: Path) -> None:
    trap, out = tmp_path / "sprung", tmp_path / "out.safetensors"
    hook = Hook(os.mkdir, str(trap))
    content = {"beside": {"state_dict": state(), "meta": hook}, "inside": {**state(), "x": hook}, "alone": hook}[where]
    source = saved(content, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArchiveError) as caught:
        convert_checkpoint(source, out)
    name = f"{os.mkdir.__module__}.mkdir"
    assert caught.value.found == f"it holds {name} beside tensors, which could run code: it was not read"
    assert caught.value.where == str(source)
    assert not trap.exists() and not out.exists()
    torch.load(source, weights_only=False)
    assert trap.exists()  # the trap was a real one


@pytest.mark.parametrize(
    "hook",
    [
        Hook(eval, "__import__('os').mkdir('sprung')"),
        Hook(getattr(np, "load"), "sprung"),  # noqa: B009 (what the pickle names is numpy's own loader)
        Hook(__import__, "antigravity"),
        Hook(argparse.ArgumentParser, "x"),
    ],
)
def test_names_near_those_that_are_left_out_are_refused(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchiveError, match="could run code"):
        convert_checkpoint(saved({"state_dict": state(), "x": hook}, tmp_path), tmp_path / "o.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_scores_histories_and_arguments_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    """numpy's are not rebuilt: a crafted dtype could point anywhere."""
    beside = {
        "best_score": np.float64(0.7),
        "history": np.arange(5.0),
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "count": np.int64(3),
    }
    source = saved({"model_state": state(), **beside}, tmp_path)
    read = module._read(source)
    assert all(type(read[name]) is module._Nothing for name in beside)
    done = convert_checkpoint(source, tmp_path / "o.safetensors")
    assert done.left_out == ("args", "best_score", "count", "history") and done.tensors == 5
    with pytest.raises(pickle.UnpicklingError):  # elsewhere in the process torch is as strict as before
        torch.load(source, weights_only=True)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    junk = tmp_path / "junk.pth"
    for content in (
        *(b"", b"junk" * 99, b"PK\x03\x04" + bytes(99), b"\x80\x02", b"\x80\x04}."),
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        bytes.fromhex("d51f00aa9e77") * 50,
        pickle.dumps(state()),
    ):
        junk.write_bytes(content)
        with pytest.raises(ArchiveError) as caught:
            convert_checkpoint(junk, out)
        assert caught.value.found.startswith("not readable as a torch checkpoint (")
        assert caught.value.todo.startswith("fetch it again")
    cut = saved(state(), tmp_path)
    cut.write_bytes(cut.read_bytes()[:-300])
    with pytest.raises(ArchiveError, match="not readable as a torch checkpoint"):
        convert_checkpoint(cut, out)
    for content, words in (
        ([torch.ones(2)], r"no network's tensors in it \(list\)"),
        ({"optimizer": OPTIMIZER, "epoch": 3}, r"no network's tensors in it \(optimizer, epoch\)"),
        ({"a": torch.ones(2).to_sparse()}, "tensor a is torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor a is torch.complex64"),
        ({"module.a": torch.ones(2), "a": torch.ones(2)}, "two tensors would be named a: 'a' and 'module.a'"),
        ({1: torch.ones(2), "1": torch.ones(3)}, "two tensors would be named 1: '1' and 1"),
        ({"a": torch.ones(2, device="meta")}, "tensor a is on meta: a shape without numbers"),
        ({"a\ud800": torch.ones(2)}, r"a tensor's name is 'a\\ud800'; expected printable text"),
        ({"\x1b[31ma": torch.ones(2)}, r"a tensor's name is '\\x1b\[31ma'; expected printable text"),
        ({"__metadata__": torch.ones(2)}, "a tensor's name is __metadata__"),
        ({(1, 2): torch.ones(2)}, "a tensor's name is a tuple"),
        ({"\x1b[2J": 3}, r"no network's tensors in it \('\\x1b\[2J'\)"),
    ):
        with pytest.raises(ArchiveError, match=words):
            convert_checkpoint(saved(content, tmp_path), out)
    assert not out.exists()


def test_a_dictionary_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3}
    content |= dict.fromkeys(module.STATES, content)
    with pytest.raises(ArchiveError, match="no network's tensors in it"):
        convert_checkpoint(saved(content, tmp_path), tmp_path / "o.safetensors")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file, of what it unpacks to, and of what a few bytes claim to be."""
    monkeypatch.setattr(module, "LIMIT_BYTES", 100_000)
    out = tmp_path / "o.safetensors"
    with pytest.raises(ArchiveError, match="holds 4[0-9]{2},[0-9]{3} bytes; expected at most 100,000"):
        convert_checkpoint(saved({"a": torch.zeros(100_000)}, tmp_path), out)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(200_000))
    assert packed.stat().st_size < 2000
    with pytest.raises(ArchiveError, match="holds 200,000 bytes"):
        convert_checkpoint(packed, out)
    stretched = saved({"a": torch.zeros(1).expand(1 << 40)}, tmp_path)
    assert stretched.stat().st_size < 2000
    with pytest.raises(ArchiveError, match=r"holds 4,398,046,511,104 bytes"):
        convert_checkpoint(stretched, out)
    assert not out.exists()


def test_paths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    source, there = saved(state(), tmp_path), tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    for a, b, words in (
        (source, there, "there.safetensors exists already"),
        (source, tmp_path / "o.pth", "ends with .safetensors"),
        (tmp_path, tmp_path / "o.safetensors", f"{re.escape(str(tmp_path))} is a folder"),
        (tmp_path / "absent.pth", tmp_path / "o.safetensors", "no file .*absent.pth"),
        (source, tmp_path / "no" / "o.safetensors", "no folder .*no;"),
    ):
        with pytest.raises(UsageError, match=words):
            convert_checkpoint(a, b)
    assert there.read_bytes() == b"mine"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    convert_arguments(parser)
    source, out = saved({"state_dict": state(), "epoch": 3}, tmp_path), tmp_path / "o.safetensors"
    assert convert(parser.parse_args([str(source), "--out", str(out)]), load_config(None)) == 0
    printed = capsys.readouterr().out
    assert f"written   {out} (5 tensors, 163 numbers)" in printed and "left out  epoch" in printed
    assert f"roadseg train --training.weights-from {out}" in printed
    one = tmp_path / "one.safetensors"
    convert(parser.parse_args([str(saved({"a": torch.ones(2)}, tmp_path)), "--out", str(one)]), load_config(None))
    assert "(1 tensor, 2 numbers)" in capsys.readouterr().out
