"""Convert a torch checkpoint's tensors to .safetensors without running its pickle.

This is the only place that reads a pickle, with torch.load(weights_only=True), which makes tensors, containers and
numbers only. Nothing that a file names is imported or called.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from roadseg.errors import ArchiveError, UsageError
from roadseg.files import sha256_file, write_atomic
from roadseg.version import __version__

LIMIT_BYTES = 4 << 30  # of the file, of what its members unpack to and of the tensors: a ResNet-101's are 0.24 GB
STATES = ("state_dict", "model_state", "model_state_dict", "model")  # where trainers keep the network's tensors
DEPTH = 4  # such entries one in another; a pickle may hold itself, without end
HEADER = "__metadata__"  # what safetensors itself calls by such a name
WANTED = "ask its makers for a file of the state_dict alone, or for .safetensors"
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
# What torch's reader and zipfile raise on bytes of another form.
UNREADABLE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, NotImplementedError, struct.error,
)  # fmt: skip
# Objects beside the tensors in checkpoints of common trainers: a score, a history, the arguments. They are read as
# _Nothing, so that no unsafe reader is needed for something that is dropped.
LEFT_OUT = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
    "_codecs.encode",
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
)


@dataclass(frozen=True)
class Converted:
    """tensors, parameters: their number. left_out: names of the other entries, sorted."""

    path: Path
    tensors: int
    parameters: int
    left_out: tuple[str, ...]


class _Nothing:
    """Replaces an object that is not needed; accepts any arguments from the file."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def convert_checkpoint(source: Path, out: Path) -> Converted:
    """Write the network's tensors of the torch checkpoint `source` to the new file `out`, names unchanged.

    From a dictionary with optimizer, epoch and so on only the network's entry is used, and DataParallel's
    "module." is removed from names. The metadata name the source's SHA-256; equal bytes give equal files.
    Raises UsageError for an unusable path, ArchiveError if the file is too large, is not a checkpoint, or
    contains objects that could run code.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}", expected="a path that ends with .safetensors")
    if out.exists():
        raise UsageError(f"{out} exists already", expected="a new file", todo="remove it, or name another with --out")
    if not source.is_file():
        found = f"{source} is a folder" if source.is_dir() else f"no file {source}"
        raise UsageError(found, expected="a torch checkpoint (.pth, .pt, .ckpt)")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"no folder {out.absolute().parent}", todo="make it first")
    _check_size(source)
    state, left_out = _network_of(_read(source), source)
    tensors = _plain(state, source)
    name = source.name.encode(errors="replace").decode()  # of a file whose name is no UTF-8
    origin = f"{name}, SHA-256 {sha256_file(source)}, by roadseg {__version__}"
    # One entry: safetensors writes several in no fixed order.
    write_atomic(out, save_tensors(tensors, {"converted_from": origin}))
    return Converted(out, len(tensors), sum(t.numel() for t in tensors.values()), left_out)


def _check_size(source: Path) -> None:
    size = source.stat().st_size
    try:
        with zipfile.ZipFile(source) as members:
            size = max(size, sum(member.file_size for member in members.infolist()))
    except (*UNREADABLE, zipfile.BadZipFile):
        pass  # torch's older format; or broken, which torch reports
    if size > LIMIT_BYTES:
        raise _too_large(size, source)


def _too_large(size: int, source: Path) -> ArchiveError:
    return ArchiveError(
        f"holds {size:,} bytes", expected=f"at most {LIMIT_BYTES:,}", where=str(source), todo="do not use it"
    )


def _read(source: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in LEFT_OUT]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: others are refused
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *UNREADABLE) as e:
        if isinstance(e, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(e))):
            raise ArchiveError(
                f"it holds {_printable(named[1])} beside tensors, which could run code: it was not read",
                expected="tensors, numbers and text",
                where=str(source),
                todo=WANTED,
            ) from e
        raise ArchiveError(
            f"not readable as a torch checkpoint ({type(e).__name__})",
            expected="what torch.save writes",
            where=str(source),
            todo="fetch it again; a plain pickle or a TorchScript archive is no checkpoint",
        ) from e


def _network_of(content: Any, source: Path) -> tuple[dict[Any, Tensor], tuple[str, ...]]:
    """The dictionary with the network's tensors, and the other entries."""
    path = _path_to_tensors(content, DEPTH)
    if path is None:
        shown = ", ".join(map(_printable, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ArchiveError(
            f"no network's tensors in it ({shown or 'nothing'})",
            expected=f"a state dict, alone or under {', '.join(STATES)}",
            where=str(source),
            todo="fetch the file that holds the network",
        )
    beside: set[str] = set()
    for inner in path:
        beside |= {_printable(name) for name in content if name != inner}
        content = content[inner]
    beside |= {_printable(name) for name, value in content.items() if not isinstance(value, Tensor)}
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, tuple(sorted(beside))


def _path_to_tensors(content: Any, depth: int) -> tuple[str, ...] | None:
    """Keys that lead to the network's entry. There may be tensors beside it, such as a best score."""
    if not isinstance(content, dict):
        return None
    for name in STATES if depth else ():
        below = _path_to_tensors(content.get(name), depth - 1)
        if below is not None:
            return (name, *below)
    return () if any(isinstance(value, Tensor) for value in content.values()) else None


def _printable(name: object) -> str:
    """A name from the file in printable form: without control codes and lone surrogates, of limited length."""
    if not isinstance(name, str | int | float):
        return f"a {type(name).__name__}"
    text = str(name)
    return (text if text.isprintable() else ascii(text))[:200]


def _plain(state: dict[Any, Tensor], source: Path) -> dict[str, Tensor]:
    """Contiguous copies that share no memory; a view may claim more than its storage has."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_quantized:
            found = f"tensor {_printable(name)} is {tensor.dtype}, {tensor.layout}"
        elif tensor.device.type != "cpu":
            found = f"tensor {_printable(name)} is on {tensor.device.type}: a shape without numbers"
        else:
            continue
        raise ArchiveError(found, expected="dense numbers", where=str(source), todo=WANTED)
    if (size := sum(t.numel() * t.element_size() for t in state.values())) > LIMIT_BYTES:
        raise _too_large(size, source)
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in zip(_plain_names(state, source), state.values(), strict=True)
    }


def _plain_names(state: dict[Any, Tensor], source: Path) -> list[str]:
    """Without "module."; what is printable can be encoded, too."""
    names: dict[str, object] = {}
    for given in state:
        name = str(given).removeprefix("module.") if isinstance(given, str | int) else ""
        if not name.isprintable() or name in ("", HEADER):
            found, expected = f"a tensor's name is {_printable(given)}", "printable text"
        elif name in names:
            both = " and ".join(sorted(repr(n) for n in (given, names[name])))
            found, expected = f"two tensors would be named {name}: {both}", "each name once"
        else:
            names[name] = given
            continue
        raise ArchiveError(found, expected=expected, where=str(source), todo=WANTED)
    return list(names)
