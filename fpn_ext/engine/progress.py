"""What is seen of a run: progress from the first iteration, a start of one screen, a plain log.

Detectron2 prints the environment, the config file, the whole config and the model at the start, and
nothing more until the twentieth iteration: minutes, on a CPU. All of it belongs into ``log.txt``.
"""

import contextlib
import datetime
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from detectron2.engine import hooks
from detectron2.utils.logger import setup_logger

FIRST = (1, 2, 5, 10)  # iterations of a run that are written, before every PERIOD-th
PERIOD = 20
SILENCE = 15.0  # seconds at most without a line, while an evaluation runs
LONGEST = 3  # lines of a message on the console before training
LOGGERS = {"fvcore": "fvcore", "detectron2": "d2", "fpn_ext": "fpn"}  # and their short names

logger = logging.getLogger(__name__)


class ProgressWriter(hooks.PeriodicWriter):
    """Writes metrics after iterations 1, 2, 5 and 10 of a run, every 20th, and the last.

    Args:
        writers: Detectron2's EventWriters.
    """

    def __init__(self, writers: list[Any]):
        super().__init__(writers, PERIOD)

    def after_step(self) -> None:
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if (
            done in FIRST
            and (self.trainer.iter + 1) % PERIOD
            and self.trainer.iter + 1 < (self.trainer.max_iter)
        ):
            for writer in self._writers:
                writer.write()
        super().after_step()


class WithoutEscapes(logging.Formatter):
    """What another formatter gives, without the codes that colour a terminal.

    >>> WithoutEscapes(logging.Formatter("%(message)s")).format(
    ...     logging.makeLogRecord({"msg": "\\x1b[32mgreen\\x1b[0m"}))
    'green'
    """

    def __init__(self, formatter: logging.Formatter | None):
        super().__init__()
        self.formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.formatter.format(record))


class FirstLineOnly(logging.Formatter):
    """Of a long message its first line, and where the rest is; warnings and errors whole."""

    def __init__(self, formatter: logging.Formatter | None):
        super().__init__()
        self.formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        lines = record.getMessage().splitlines()
        # The table of levels is what this project is about.
        whole = record.levelno >= logging.WARNING or lines[:1] == ["levels:"]
        if len(lines) > LONGEST and not whole:
            first = lines[0].rstrip(" :")
            record = logging.makeLogRecord(record.__dict__)
            record.msg, record.args = f"{first} ({len(lines)} lines, in log.txt)", ()
        return self.formatter.format(record)


def set_up_logging(output: str, rank: int) -> None:
    """Log to the console and to ``output/log.txt``, as Detectron2 does, that file without colours.

    Nor has the console any where it is no terminal. What Detectron2 sets up later is the same.
    """
    for name, short in LOGGERS.items():
        if name == "fpn_ext":
            setup_logger(output=output, distributed_rank=rank, name=name, abbrev_name=short)
        elif name == "fvcore":
            setup_logger(output, distributed_rank=rank, name=name)
        else:
            setup_logger(output, distributed_rank=rank)  # as default_setup calls it: once for all
        for handler in logging.getLogger(name).handlers:
            colored = _is_console(handler) and sys.stdout.isatty()
            if not colored and not isinstance(handler.formatter, WithoutEscapes):
                handler.setFormatter(WithoutEscapes(handler.formatter))


@contextlib.contextmanager
def short_on_console() -> Iterator[None]:
    """Within, the console gets warnings, and of this package's messages the first lines.

    What Detectron2 and fvcore say of less weight, and long messages whole, are in ``log.txt``.
    """
    with contextlib.ExitStack() as stack:
        for name in LOGGERS:
            for handler in filter(_is_console, logging.getLogger(name).handlers):
                stack.callback(handler.setFormatter, handler.formatter)
                stack.callback(handler.setLevel, handler.level)
                handler.setFormatter(FirstLineOnly(handler.formatter))
                if name != "fpn_ext":
                    handler.setLevel(logging.WARNING)
        yield


@contextlib.contextmanager
def only_on_console(*names: str) -> Iterator[None]:
    """Within, the console gets warnings, and what the named loggers say. All is in ``log.txt``.

    Levels of loggers and handlers stay as they are.
    """

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in names

    with contextlib.ExitStack() as stack:
        for name in LOGGERS:
            for handler in filter(_is_console, logging.getLogger(name).handlers):
                handler.addFilter(is_shown)
                stack.callback(handler.removeFilter, is_shown)
        yield


class Countdown:
    """The batches of a loader; where they take long, the log says how far it is and how long yet.

    Args:
        batches: with a length.
        what: is done with them, to begin the line with.
    """

    def __init__(self, batches: Any, what: str):
        self.batches = batches
        self.what = what

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        began = said = time.monotonic()
        for done, batch in enumerate(self.batches):
            now = time.monotonic()
            if now - said >= SILENCE and done:
                left = (now - began) / done * (len(self) - done)
                eta = datetime.timedelta(seconds=round(left))
                logger.info("%s: %d of %d, eta %s", self.what, done, len(self), eta)
                said = now
            yield batch


def _is_console(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
