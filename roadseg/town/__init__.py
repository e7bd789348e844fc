"""The rendered town: synthetic street scenes with labels, a pure function of (seed, index)."""

from roadseg.town.frame import WEATHERS, Frame, render
from roadseg.town.tree import write_tree

__all__ = ["WEATHERS", "Frame", "render", "write_tree"]
