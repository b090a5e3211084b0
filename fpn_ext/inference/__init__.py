"""A trained model on images, videos and datasets."""

from .. import components as components
