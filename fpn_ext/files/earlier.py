"""What a command found before is kept, where it finds something else now: ``results-1.json``."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .atomic import write_text


@contextlib.contextmanager
def earlier_kept(files: Iterable[Path], say: Callable[[str], object]) -> Iterator[None]:
    """A block that writes text files anew, at whose end those that have changed are there twice.

    What was in ``results.json`` before is then in ``results-1.json``, or ``-2``, ..., under the
    first number that is free. It is copied before the block begins, so that a kill loses none.

    Args:
        files: those that are not there do not matter.
        say: is told of each that has changed, in a sentence.
    """
    copies = [(file, _copied(file)) for file in files if file.is_file()]
    try:
        yield
    finally:
        for file, copy in copies:
            if file.read_bytes() == copy.read_bytes():
                copy.unlink()
            else:
                say(f"{file} is of this command now; what was there before is in {copy}")


def _copied(file: Path) -> Path:
    names = (file.with_name(f"{file.stem}-{n}{file.suffix}") for n in itertools.count(1))
    copy = next(name for name in names if _is_taken_first(name))
    write_text(copy, file.read_text())
    return copy


def _is_taken_first(name: Path) -> bool:
    """Whether there was no such file, which is empty now: another command may look for one, too."""
    try:
        name.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
