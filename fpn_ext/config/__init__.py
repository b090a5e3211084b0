"""From a YAML file to a config that a model can be built from."""

from .. import components as components
