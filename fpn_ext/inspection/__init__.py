"""Inspecting a model: its levels, anchors and feature maps, and comparisons with another."""

from .. import components as components
