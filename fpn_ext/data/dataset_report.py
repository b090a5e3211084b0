"""The report on a dataset: its problems by kind, as text and as JSON values."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..reporting.findings import totals
from .dataset_contents import KINDS, Contents, Problem, printable

EXAMPLES = 3  # per kind of problem in the printed report


class DatasetReport:
    """The problems of a dataset, most severe first."""

    def __init__(self, contents: Contents, problems: Iterable[Problem]):
        self.source = contents.source
        self.num_images = len(contents.pictures)
        boxes = Counter(box.category for picture in contents.pictures for box in picture.boxes)
        self.boxes_per_class = {name: boxes[name] for name in contents.classes}
        by_kind: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        for problem in problems:
            by_kind[problem.kind].append(problem)
        order = ("error", "warning", "note")
        kinds = sorted(by_kind, key=lambda kind: order.index(KINDS[kind][0]))
        self.problems_of = {kind: by_kind[kind] for kind in kinds if by_kind[kind]}

    def count(self, severity: str) -> int:
        """Number of problems of severity ``"error"``, ``"warning"`` or ``"note"``."""
        return sum(number(p) for kind, p in self.problems_of.items() if KINDS[kind][0] == severity)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values for :func:`fpn_ext.reporting.json_files.write_json`."""
        return {
            "source": self.source,
            "images": self.num_images,
            "boxes_per_class": self.boxes_per_class,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "notes": self.count("note"),
            "kinds": {
                kind: {
                    "severity": KINDS[kind][0],
                    "meaning": KINDS[kind][1],
                    "count": number(problems),
                    "images": images_of(problems),
                }
                for kind, problems in self.problems_of.items()
            },
            "problems": [
                {
                    "kind": kind,
                    "severity": problem.severity,
                    "image": problem.image,
                    "annotation": problem.annotation,
                    "detail": problem.detail,
                    "count": problem.count or 1,
                }
                for kind, problems in self.problems_of.items()
                for problem in problems
            ],
        }

    def __str__(self) -> str:
        boxes = sum(self.boxes_per_class.values())
        first = f"{printable(self.source)}: {self.num_images} images, {boxes} boxes"
        if self.boxes_per_class:
            classes = ", ".join(f"{printable(n)} {c}" for n, c in self.boxes_per_class.items())
            first += f" ({classes})"
        lines = [first]
        for kind, problems in self.problems_of.items():
            severity, meaning = KINDS[kind]
            images = images_of(problems) or 0
            where = f" on {images} images" if images > 1 else ""
            # Those that were counted are of several kinds themselves: each has its line.
            shown = [p for n, p in enumerate(problems) if n < EXAMPLES or p.count is not None]
            lines += [
                "",
                f"{severity.upper():8}{kind}: {number(problems)}{where}",
                f"        {meaning}",
            ]
            lines += [f"          {_line(problem)}" for problem in shown]
            if len(problems) > len(shown):
                more = len(problems) - len(shown)
                lines.append(f"          and {more} more (--json lists all)")
        statuses = [
            severity for severity in ("error", "warning") for _ in range(self.count(severity))
        ]
        return "\n".join([*lines, "", totals(statuses)])


def number(problems: Sequence[Problem]) -> int:
    """How many problems there are, those that were counted together each for itself."""
    return sum(1 if problem.count is None else problem.count for problem in problems)


def images_of(problems: Sequence[Problem]) -> int | None:
    """On how many images problems are; None where some were counted without their images."""
    if any(problem.count is not None for problem in problems):
        return None
    return len({p.image for p in problems if p.image is not None})


def _line(problem: Problem) -> str:
    places = []
    if problem.image is not None:
        places.append(printable(problem.image))
    if problem.annotation is not None:
        places.append(f"annotation {printable(str(problem.annotation))}")
    text = ": ".join(filter(None, [", ".join(places), printable(problem.detail)]))
    return text if problem.count is None else f"{problem.count} {text}"
