"""The command line: `roadseg` and `python -m roadseg.cli`."""

from roadseg.cli.main import main

__all__ = ["main"]
