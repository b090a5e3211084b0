"""Whole detectors as files of other runtimes, proved equal before they are written."""

from .. import components as components
