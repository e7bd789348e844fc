"""The rendered town: street scenes in perspective with labels, drawn from (seed, index)."""

from roadseg.town.frame import WEATHERS, Frame, render
from roadseg.town.tree import write_tree

__all__ = ["WEATHERS", "Frame", "render", "write_tree"]
