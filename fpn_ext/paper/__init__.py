"""The paper's tables, its alternating training, and its published figures."""

from .. import components as components
