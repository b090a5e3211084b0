"""``detections.json`` while it is being made: whole at any moment, and kept whatever ends it."""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..reporting.json_files import plain, write_json

PERIOD = 5.0  # seconds between two writes, at least
SHARE = 0.1  # of the time that may go into writing

Entry = Mapping[str, Any]


class KeptResult:
    """A context in which a result grows, picture by picture, and its file with it.

    The file is replaced as a whole: after the first picture, then every few seconds, and where the
    block ends, by an error too, unless no picture was done. A kill that no program is told of costs
    the seconds since. So that a full disk costs nothing, room for the whole file is taken before
    anything else of a picture is written: by a nameless file beside it, with the same text, which
    is given up for the last write.

    Args:
        file: of JSON.
        categories: as in COCO's format.
        count: of pictures to try, to say how far it came.
        about: what it was found with, for COCO's ``info``.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "detections.json")
        >>> with KeptResult(file, [{"id": 1, "name": "cat"}], 2) as kept:
        ...     found = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
        ...     with kept.room_for({"id": 1, "file_name": "a.jpg"}, [found]):
        ...         pass  # what else there is to write of this picture
        ...     kept.skip({"file_name": "b.jpg", "error": "truncated"})
        >>> json.loads(file.read_text()) == kept.result
        True
        >>> kept.result["images"], kept.result["complete"]
        ([{'id': 1, 'file_name': 'a.jpg'}], True)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        file: Path,
        categories: Sequence[Entry],
        count: int,
        about: Mapping[str, str] | None = None,
    ):
        self.file = file
        self.categories = categories
        self.count = count
        self.about = about
        self.complete = False
        # A signal may come between any two statements: a picture and its boxes are added by one.
        self._done: list[tuple[Entry, Sequence[Entry]]] = []
        self._skipped: list[Entry] = []
        self._in_file = 0  # pictures
        self._due = 0.0  # by time.monotonic()

    @property
    def result(self) -> dict[str, Any]:
        """What is written: ``images``, ``categories``, ``annotations``, ``skipped``, ``complete``.

        ``complete`` is whether all pictures were tried.
        """
        return {
            **({"info": self.about} if self.about else {}),
            "images": [entry for entry, _ in self._done],
            "categories": self.categories,
            "annotations": [*itertools.chain(*(annotations for _, annotations in self._done))],
            "skipped": self._skipped,
            "complete": self.complete,
        }

    def __enter__(self) -> "KeptResult":
        self._room = tempfile.TemporaryFile(dir=self.file.parent)
        self._take_room(self.result)
        return self

    @contextlib.contextmanager
    def room_for(self, entry: Entry, annotations: Sequence[Entry]) -> Iterator[None]:
        """A block at whose end a picture is added, with its annotations; not if it fails.

        Raises:
            OSError: there is no room in the file for them; or it was to be written, and cannot be.
        """
        self._take_room(entry, *annotations)
        yield
        self._done.append((entry, annotations))
        began = time.monotonic()
        if began >= self._due:
            self._write()
            ended = time.monotonic()
            self._due = ended + max(PERIOD, (ended - began) / SHARE)

    def skip(self, entry: Entry) -> None:
        """Add a picture that could not be read.

        Raises:
            OSError: there is no room in the file for it.
        """
        self._take_room(entry)
        self._skipped.append(entry)

    def _take_room(self, *entries: Entry) -> None:
        try:
            for entry in entries:
                # Indented as in the file, where an entry is two levels down.
                self._room.write(json.dumps({"": [plain(entry)]}, indent=2).encode("ascii"))
            self._room.flush()
        except OSError as error:
            error.filename = os.fspath(self.file)
            raise

    def _write(self) -> None:
        write_json(self.file, self.result)
        self._in_file = len(self._done)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed was only to take room
            self._room.close()
        if error is None:
            self.complete = True
            self._write()
        elif self._done:
            try:
                self._write()
            except OSError as second:
                print(f"not up to date: {second}", file=sys.stderr)
            print(
                f"ended after {len(self._done)} of {self.count} pictures; {self.file} has "
                f"{self._in_file} of them",
                file=sys.stderr,
            )
