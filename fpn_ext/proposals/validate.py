"""Validate every value of a proposal file, also against a dataset."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from detectron2.data import get_detection_dataset_dicts

from ..reporting.findings import CountedFinding, Status
from .detectron2_pickle import open_proposals
from .file import ImageId, ProposalFile, Proposals, first_ids

# Pixels that a box may extend beyond its image: float32 rounding of XYWH is smaller.
OUTSIDE_TOLERANCE = 0.01


@dataclass
class ProposalReport:
    """The result of :func:`inspect_proposals`.

    Attributes:
        file: the checked file.
        dataset: the dataset it was checked against.
        images: number of images with an entry.
        boxes: total number of boxes.
        coverage: fraction of the dataset's images that have proposals, 0 to 1.
        findings: each an ``"error"``, or a ``"note"`` on what may be intended.
    """

    file: str
    dataset: str
    images: int = 0
    boxes: int = 0
    coverage: float = 0.0
    findings: list[CountedFinding] = field(default_factory=list)

    def add(
        self,
        status: Status,
        subject: str,
        text: str,
        count: int = 1,
        image_ids: Sequence[ImageId] = (),
    ) -> None:
        self.findings.append(
            CountedFinding(status, subject, text, count=count, image_ids=tuple(image_ids))
        )

    @property
    def problems(self) -> list[CountedFinding]:
        return [finding for finding in self.findings if finding.status == "error"]

    @property
    def notes(self) -> list[CountedFinding]:
        return [finding for finding in self.findings if finding.status == "note"]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values for :func:`fpn_ext.reporting.json_files.write_json`."""
        return {"valid": not self.problems, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.images} images, {self.boxes} boxes; proposals for "
            f"{self.coverage:.1%} of the images of {self.dataset!r}"
        ]
        lines += [f"  note: {_with_images(note)}" for note in self.notes]
        lines += [f"  PROBLEM: {_with_images(problem)}" for problem in self.problems]
        lines.append(f"{len(self.problems)} problem(s)" if self.problems else "no problems")
        return "\n".join(lines)


def _with_images(finding: CountedFinding) -> str:
    if not finding.image_ids:
        return finding.text
    return f"{finding.text}: {first_ids(finding.image_ids)}"


def inspect_proposals(file: str | os.PathLike, dataset_name: str) -> ProposalReport:
    """Check every value of a proposal file, ours or Detectron2's ``.pkl``, against a dataset.

    Errors: an unreadable file, checksum mismatches, missing or unknown image ids, NaN and infinite
    values, boxes without area or outside their image, unsorted scores. Notes: images without
    proposals, another dataset's name in the file, images whose size is not in the dataset.
    """
    report = ProposalReport(os.fspath(file), dataset_name)
    try:
        proposals = open_proposals(file)
    except ValueError as error:
        report.add("error", "unreadable", str(error))
        return report
    report.images, report.boxes = len(proposals), proposals.num_boxes
    if isinstance(proposals, ProposalFile):
        for name in proposals.damaged_tensors():
            text = f"the bytes of {name!r} are not those that were written (CRC-32)"
            report.add("error", "checksum", text)
    sizes = {
        str(record["image_id"]): (record["image_id"], record.get("width"), record.get("height"))
        for record in get_detection_dataset_dicts(
            dataset_name, filter_empty=False, check_consistency=False
        )
    }
    _check_ids(report, proposals, [image_id for image_id, *_ in sizes.values()])
    _check_values(report, proposals, sizes)
    return report


def _check_ids(report: ProposalReport, proposals: Proposals, image_ids: list[ImageId]) -> None:
    known = set(map(str, image_ids))
    missing = [image_id for image_id in image_ids if image_id not in proposals]
    unknown = [image_id for image_id in proposals if str(image_id) not in known]
    for check, ids, what in (
        ("missing_ids", missing, f"images of {report.dataset!r} have no entry"),
        ("unknown_ids", unknown, f"entries are for images that are not in {report.dataset!r}"),
    ):
        if ids:
            report.add("error", check, f"{len(ids)} {what}", len(ids), ids)
    if proposals.dataset not in ("", report.dataset):
        text = f"it was made for dataset {proposals.dataset!r}"
        report.add("note", "dataset", text)


def _check_values(report: ProposalReport, proposals: Proposals, sizes: dict[str, tuple]) -> None:
    counts: dict[str, dict[ImageId, int]] = {check: {} for check in _VALUE_CHECKS}
    empty: list[ImageId] = []
    unsized: list[ImageId] = []
    for image_id, (boxes, scores) in proposals.items():
        _, width, height = sizes.get(str(image_id), (image_id, None, None))
        if str(image_id) in sizes and not len(boxes):
            empty.append(image_id)
        if str(image_id) in sizes and not (width and height):
            unsized.append(image_id)
        for check, (faulty, _) in _VALUE_CHECKS.items():
            count = int(faulty(boxes, scores, (width or np.inf, height or np.inf)).sum())
            if count:
                counts[check][image_id] = count
    for check, (_, what) in _VALUE_CHECKS.items():
        if counts[check]:
            total, ids = sum(counts[check].values()), list(counts[check])
            text = f"{total} {what}, in {len(ids)} images"
            report.add("error", check, text, total, ids)
    covered = sum(image_id in proposals for image_id, *_ in sizes.values()) - len(empty)
    report.coverage = covered / len(sizes)
    if empty:
        text = f"{len(empty)} images have an entry without boxes"
        report.add("note", "empty", text, len(empty), empty)
    if unsized:
        text = f"{len(unsized)} images have no width and height in the dataset; whether boxes are "
        text += "outside of them is unknown"
        report.add("note", "unsized", text, len(unsized), unsized)


def _not_finite(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    finite: np.ndarray = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    return ~finite


def _no_area(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    # Not "not >": NaN has a separate finding.
    return np.less_equal(boxes[:, 2:], boxes[:, :2]).any(axis=1)


def _outside(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    low, high = -OUTSIDE_TOLERANCE, np.array([*size, *size]) + OUTSIDE_TOLERANCE
    finite = np.isfinite(boxes).all(axis=1)
    return finite & ((boxes < low) | (boxes > high)).any(axis=1)


def _out_of_order(boxes: np.ndarray, scores: np.ndarray, size: tuple) -> np.ndarray:
    return scores[1:] > scores[:-1]


_VALUE_CHECKS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "not_finite": (_not_finite, "boxes have a coordinate or score that is NaN or infinite"),
    "no_area": (_no_area, "boxes have no area"),
    "outside": (_outside, "boxes stick out of their image"),
    "order": (_out_of_order, "boxes have a higher score than the one before"),
}
