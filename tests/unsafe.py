"""An object that executes code when unpickled, for tests that files are read safely."""


class Runs:
    """Unpickled, it is ``call(*args)``."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def touches(file):
    """Creates ``file``, whose presence shows that code was executed."""
    return Runs(eval, f"open({str(file)!r}, 'w')")
