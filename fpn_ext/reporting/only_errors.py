"""Loggers that say nothing but errors for a while."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Restrict these loggers, "" for the root, to errors within the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
