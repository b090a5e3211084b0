"""Proposal files for Fast R-CNN: sources, format, checks."""

from .. import components as components
