"""From a YAML file to a config ready for building a model."""

from .. import components as components
