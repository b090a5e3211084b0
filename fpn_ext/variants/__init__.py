"""Pyramids, heads and poolers from the paper's ablations and from other papers."""

from .. import components as components
