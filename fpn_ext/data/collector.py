"""Python's garbage collector, paused where millions of objects are made and kept."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """A block, or as a decorator a function, in which the collector does not run.

    It goes through all objects again and again while their number grows, for a quarter of the time
    that reading a large dataset takes, and finds nothing.

    >>> with paused_collector():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    was_running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_running:
            gc.enable()
