"""Findings of a check, each with a status and, if it can be fixed, a remedy."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from .json_files import write_json

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: ``"error"`` if it will not work, ``"warning"`` if it may be intended, ``"note"`` if
            it only informs, ``"ok"``.
        subject: what was checked, in a word or two.
        text: the result.
        remedy: how to fix it; "" if not needed.
    """

    status: Status
    subject: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class CountedFinding(Finding):
    """A finding with several occurrences.

    Attributes:
        count: number of occurrences.
        image_ids: of the affected images; empty if not about images.
    """

    count: int = 1
    image_ids: tuple[int | str, ...] = ()


class Report(Protocol):
    """What a command prints (``str()``) and, with ``--json``, writes."""

    def as_json(self) -> dict[str, Any]: ...


def table(findings: Sequence[Finding]) -> str:
    """One line per finding, each remedy below its finding, and :func:`totals`."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:8}{finding.subject:20}{finding.text}")
        if finding.remedy:
            lines.append(f"{'':28}-> {finding.remedy}")
    return "\n".join([*lines, "", totals(finding.status for finding in findings)])


def totals(statuses: Iterable[str]) -> str:
    """The numbers of errors and warnings.

    >>> totals(["ok", "error", "note", "error"])
    '2 error(s), 0 warning(s)'
    """
    listed = list(statuses)
    return f"{listed.count('error')} error(s), {listed.count('warning')} warning(s)"


def conclude(findings: Sequence[Finding], json_file: Path | None) -> int:
    """Print a command's findings, and write them to ``json_file`` if given.

    Returns:
        The exit code: 1 if there is an error, else 0.
    """
    print(table(findings))
    if json_file:
        write_json(json_file, {"findings": [asdict(finding) for finding in findings]})
    return int(any(finding.status == "error" for finding in findings))
