"""The exceptions of roadseg and their exit codes.

RoadsegError 1
├── UsageError 2          wrong command line
│   └── ConfigError       wrong values in a config
├── DataError 3           refused by a data check
├── GateRefused 4         refused by the gate
├── Busy 5                another run holds what is needed
├── ImageError 1          bytes that are not a usable image or label
├── ArchiveError 1        an invalid model archive
├── StoreError 1          a model store that can't be read or written
│   ├── ReleaseNotFound   no such release is in it
│   └── PointerMoved      the champion changed since it was read
├── ExportError 1         the exported graph differs from the network
├── NonFiniteLoss 1       training diverged
├── PeerLost 1            another process of the training is gone
│   └── PeerFailed        and reported why itself
└── Interrupted 143/130   stopped by a signal, state saved
"""

from __future__ import annotations


class RoadsegError(Exception):
    """An error that a user can act on, in four parts.

    found: the problem. expected: what should be there. where: file, config key or address. todo: what to do next.
    Only `found` is required; str() joins the given parts.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str = "", where: str = "", todo: str = "") -> None:
        self.found, self.expected, self.where, self.todo = found, expected, where, todo
        parts = [f"{where}: {found}" if where else found]
        if expected:
            parts.append(f"expected {expected}")
        if todo:
            parts.append(todo)
        super().__init__("; ".join(parts))


class UsageError(RoadsegError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(RoadsegError):
    exit_code = 3


class GateRefused(RoadsegError):
    exit_code = 4


class Busy(RoadsegError):
    exit_code = 5


class ImageError(RoadsegError):
    pass


class ArchiveError(RoadsegError):
    pass


class StoreError(RoadsegError):
    pass


class ReleaseNotFound(StoreError):
    pass


class PointerMoved(StoreError):
    pass


class ExportError(RoadsegError):
    pass


class NonFiniteLoss(RoadsegError):
    pass


class PeerLost(RoadsegError):
    pass


class PeerFailed(PeerLost):
    pass


class Interrupted(RoadsegError):
    def __init__(self, found: str, *, signal_number: int) -> None:
        super().__init__(found)
        self.exit_code = 128 + signal_number
