"""Scores: evaluators by dataset, average recall of proposals."""

from .. import components as components
