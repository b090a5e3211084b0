"""Training: the trainer, its steps, order of images, checkpoints, processes, what goes wrong."""

from .. import components as components
