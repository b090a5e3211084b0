"""What the names in a config stand for."""

from .. import components as components
