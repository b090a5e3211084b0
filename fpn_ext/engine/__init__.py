"""Training: the trainer, its steps, data order, checkpoints, processes, failure diagnosis."""

from .. import components as components
