"""Pyramids, heads and poolers beside the paper's: its ablations, and other papers'."""

from .. import components as components
