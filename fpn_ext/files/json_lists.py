"""JSON files with lists of millions of entries, read entry by entry.

:func:`json.loads` holds all of a file's text and everything in it at once, some 700 bytes for each
box. Here a list stays in the file, and is read again each time that it is iterated over.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from typing import Any, TextIO

State = tuple[int, int]  # time of the last change in ns, bytes

PIECE = 1 << 18  # characters read at once; more where one entry is longer

_decode = json.JSONDecoder().raw_decode
_space = re.compile(r"[ \t\n\r]*").match
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match


class ListInFile:
    """A list in a JSON file that is never in memory: it can be iterated over, again and again.

    Iterating raises ValueError where the file is not JSON, or has changed since this was made;
    OSError if it cannot be read.
    """

    def __init__(self, file: str | os.PathLike, start: int | None = None):
        """``start``: of its first entry, in characters; None if the whole file is the list."""
        self._file, self._start = os.fspath(file), start
        self._state = state_of(file)

    def __iter__(self) -> Iterator[Any]:
        if state_of(self._file) != self._state:
            raise ValueError(f"{self._file} was changed while it was in use: start again")
        try:
            with _opened(self._file) as stream:
                text = _Text(stream)
                if self._start is None:
                    text.take("[")
                else:
                    text.skip(self._start)
                yield from text.entries()
                if self._start is None:
                    text.take("")
        except _UnreadableError as error:
            with open(self._file, "rb") as content:  # json says what is wrong, and where
                json.loads(content.read())
            raise ValueError(f"{self._file} holds no list") from error


def state_of(file: str | os.PathLike) -> State:
    """What tells that a file was changed."""
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size


def read_json(file: str | os.PathLike, kept_in_file: Collection[str] = ()) -> Any:
    """What a JSON file holds, as :func:`json.loads` gives it, errors included.

    Args:
        kept_in_file: keys of the file's object whose lists become a :class:`ListInFile`, if they
            are not empty.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is not JSON.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "a.json")
    ...     _ = file.write_text('{"images": [{"id": 1}, {"id": 2}], "info": [3]}')
    ...     data = read_json(file, ["images"])
    ...     (data["info"], list(data["images"]))
    ([3], [{'id': 1}, {'id': 2}])
    """
    try:
        with _opened(file) as stream:
            return _Text(stream).object(os.fspath(file), kept_in_file)
    except (_UnreadableError, RecursionError):
        with open(file, "rb") as content:  # json says what is wrong, and where
            return json.loads(content.read())


def _opened(file: str | os.PathLike) -> TextIO:
    """As :func:`json.loads` decodes bytes; line ends are left as they are."""
    with open(file, "rb") as stream:
        encoding = json.detect_encoding(stream.read(4))
    return open(file, encoding=encoding, errors="surrogatepass", newline="")


class _UnreadableError(Exception):
    """Not JSON, or not of the form that is read here."""


class _Text:
    """The text of a JSON file from some place on, of which only a piece is in memory."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.text, self.at = "", 0
        self.before = 0  # characters that were left behind

    def more(self) -> bool:
        """Read on; False at the end of the file. A piece for a long entry is doubled each time."""
        left = len(self.text) - self.at
        try:
            piece = self.stream.read(max(PIECE, left))
        except UnicodeError as error:
            raise _UnreadableError from error
        self.before += self.at
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def skip(self, count: int) -> None:
        """Go on by some characters, before anything else is read."""
        self.before = count
        while count and (piece := self.stream.read(min(count, PIECE))):
            count -= len(piece)

    def next_mark(self) -> str:
        """The next character that is no space, which stays the next; "" at the end."""
        while True:
            self.at = _space(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, *marks: str) -> str:
        """Go past the next character, which must be one of these."""
        mark = self.next_mark()
        if mark not in marks:
            raise _UnreadableError
        self.at += len(mark)
        return mark

    def value(self) -> Any:
        """The next value, and go to the mark behind it."""
        while True:
            try:
                value, end = _decode(self.text, _space(self.text, self.at).end())  # type: ignore[union-attr]
                end = _space(self.text, end).end()  # type: ignore[union-attr]
                # Without a mark behind it, it may be the beginning of a number.
                if self.text[end] in ",]}:":
                    self.at = end
                    return value
            except (ValueError, IndexError):
                pass
            if not self.more():
                raise _UnreadableError

    def entries(self) -> Iterator[Any]:
        """Those of a list, behind its bracket."""
        if self.next_mark() == "]":
            self.take("]")
            return
        while True:
            try:
                value, end = _decode(self.text, self.at)
                comma = _comma(self.text, end)
            except ValueError:
                comma = None
            if comma:  # of nearly all entries
                self.at = comma.end()
                yield value
                continue
            value = self.value()
            mark = self.take(",", "]")
            yield value
            if mark == "]":
                return
            self.next_mark()

    def list(self, file: str, keep: bool) -> Any:
        self.take("[")
        if not keep:
            return list(self.entries())
        start = self.before + self.at
        return ListInFile(file, start) if sum(1 for _ in self.entries()) else []

    def object(self, file: str, kept_in_file: Collection[str]) -> dict[str, Any]:
        """All of a file that is an object."""
        self.take("{")
        found: dict[str, Any] = {}
        mark = self.take("}") if self.next_mark() == "}" else ","
        while mark == ",":
            if self.next_mark() != '"':
                raise _UnreadableError
            key = self.value()
            self.take(":")
            if self.next_mark() == "[":
                found[key] = self.list(file, key in kept_in_file)
            else:
                found[key] = self.value()
            mark = self.take(",", "}")
        self.take("")
        return found
