"""Resolves the component names in a config."""

from .. import components as components
