"""Files of proposals for Fast R-CNN: where they come from, their format, their checks."""

from .. import components as components
