"""A torch checkpoint's tensors as .safetensors, so that training can start from them.

The one place that reads a pickle, and by a reader that makes tensors, containers and numbers only:
torch.load(weights_only=True). Nothing that a file names is imported or called.
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

import roadseg
from roadseg.errors import ArchiveError, UsageError
from roadseg.files import sha256_file, write_atomic

LIMIT_BYTES = 4 << 30  # of the file, of what its members unpack to and of the tensors: a ResNet-101's are 0.24 GB
STATES = ("state_dict", "model_state", "model_state_dict", "model")  # where trainers keep the network's tensors
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
# What lies beside the tensors in the checkpoints of common trainers: a score, a history, the arguments.
# They are read as _Nothing, so that such a file needs no unsafe reader for the sake of what is dropped.
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
    """tensors, parameters: how many. left_out: names of entries beside the network's tensors, sorted."""

    path: Path
    tensors: int
    parameters: int
    left_out: tuple[str, ...]


class _Nothing:
    """Stands for an object that is not wanted; takes whatever the file would have made it of."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def convert_checkpoint(source: Path, out: Path) -> Converted:
    """Write the network's tensors of the torch checkpoint `source` to the new file `out`, names unchanged.

    Of a dictionary with optimizer, epoch and so on only the network's entry is taken, and "module."
    of DataParallel is dropped from all names. The metadata say from which bytes it was made; the same
    bytes give the same file. Raises UsageError if a path won't do, ArchiveError if the file is too
    large, is no checkpoint, or holds what is not tensors and could run code.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}", expected="a path that ends with .safetensors")
    if out.exists():
        raise UsageError(f"{out} exists already", expected="a new file", todo="remove it, or name another with --out")
    if not source.is_file():
        raise UsageError(f"no file {source}", expected="a torch checkpoint (.pth, .pt, .ckpt)")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"no folder {out.absolute().parent}", todo="make it first")
    _check_size(source)
    state, left_out = _network_of(_read(source), source)
    tensors = _plain(state, source)
    origin = f"{source.name}, SHA-256 {sha256_file(source)}, by roadseg {roadseg.__version__}"
    # One entry: safetensors writes several in no fixed order.
    write_atomic(out, save_tensors(tensors, {"converted_from": origin}))
    return Converted(out, len(tensors), sum(t.numel() for t in tensors.values()), left_out)


def _check_size(source: Path) -> None:
    size = source.stat().st_size
    try:
        with zipfile.ZipFile(source) as members:
            size = max(size, sum(member.file_size for member in members.infolist()))
    except (*UNREADABLE, zipfile.BadZipFile):
        pass  # torch's older form; or broken, which torch will say
    if size > LIMIT_BYTES:
        raise _too_large(size, source)


def _too_large(size: int, source: Path) -> ArchiveError:
    return ArchiveError(
        f"holds {size:,} bytes", expected=f"at most {LIMIT_BYTES:,}", where=str(source), todo="do not use it"
    )


def _read(source: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in LEFT_OUT]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what it can't read it refuses
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        named = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise ArchiveError(
            f"it holds {named[1] if named else 'more'} beside tensors, which could run code: it was not read",
            expected="tensors, numbers and text",
            where=str(source),
            todo="ask its makers for a file of the state_dict alone, or for .safetensors",
        ) from e
    except UNREADABLE as e:
        raise ArchiveError(
            f"not readable as a torch checkpoint ({type(e).__name__})",
            expected="what torch.save writes",
            where=str(source),
            todo="fetch it again; a TorchScript archive is no checkpoint",
        ) from e


def _network_of(content: Any, source: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The dictionary with the network's tensors, and what lies beside it."""
    beside: set[str] = set()
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((name for name in STATES if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        beside |= {str(name) for name in content if name != inner}
        content = content[inner]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        shown = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ArchiveError(
            f"no network's tensors in it ({shown or 'nothing'})",
            expected=f"a state dict, alone or under {', '.join(STATES)}",
            where=str(source),
        )
    beside |= {str(name) for name, value in content.items() if not isinstance(value, Tensor)}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, tuple(sorted(beside))


def _plain(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Contiguous copies, none sharing memory; a view may claim more than its storage has."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_quantized:
            raise ArchiveError(
                f"tensor {name} is {tensor.dtype}, {tensor.layout}", expected="dense numbers", where=str(source)
            )
    if (size := sum(t.numel() * t.element_size() for t in state.values())) > LIMIT_BYTES:
        raise _too_large(size, source)
    plain = {
        name.removeprefix("module."): t.detach().clone(memory_format=torch.contiguous_format)
        for name, t in state.items()
    }
    if len(plain) < len(state):
        raise ArchiveError("names that differ in a leading module. alone", expected="each once", where=str(source))
    return plain
