"""Looking at a model: its levels, anchors and maps, and how it compares with another."""

from .. import components as components
