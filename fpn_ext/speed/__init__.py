"""Speed-ups of inference and training with the same results to rounding."""

from .. import components as components
