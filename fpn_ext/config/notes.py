"""Notes of the preparation, for the log: a plain string, or a :class:`Caution`."""


class Caution(str):
    """A note to be logged as a warning."""
