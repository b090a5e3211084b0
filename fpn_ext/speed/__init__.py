"""The same results sooner: models made for inference or training on this machine."""

from .. import components as components
