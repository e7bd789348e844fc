"""The rendered town: street scenes in perspective with labels, drawn from (seed, index)."""

from roadseg.ingest.town.frame import WEATHERS, Frame, render
from roadseg.ingest.town.tree import write_tree

__all__ = ["WEATHERS", "Frame", "render", "write_tree"]
