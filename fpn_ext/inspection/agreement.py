"""How closely two detectors agree: stage by stage on the same inputs, and end to end.

Rounding in an early stage may decide, many stages later, which of two boxes is kept. So every stage
of the model gets the output of the control's previous stage, and its own output is compared: the
model's ``forward`` runs with its modules' outputs replaced on the way. The end-to-end detections of
both models are compared too, box by box.
"""

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

NEAR = 1.0  # pixels: max distance at which boxes of the same class match

# Stage names, and the module whose output is the stage; each of them for a module list.
MODULES = {
    "backbone": "backbone",
    "RPN head": "proposal_generator.rpn_head",
    "anchors": "proposal_generator.anchor_generator",
    "proposals": "proposal_generator",
    "pooled box features": "roi_heads.box_pooler",
    "box head": "roi_heads.box_head",
    "box predictor": "roi_heads.box_predictor",
    "detections": "roi_heads._forward_box",  # a method, of StandardROIHeads
    "pooled mask features": "roi_heads.mask_pooler",
    "masks": "roi_heads.mask_head",
    "pooled keypoint features": "roi_heads.keypoint_pooler",
    "keypoint heat maps": "roi_heads.keypoint_head",
}
# One row per box: a model may process boxes in chunks.
BY_ROWS = ("pooled box features", "box head", "box predictor")
PARTS = {
    "RPN head": ("objectness logits", "anchor deltas"),
    "box predictor": ("class logits", "box deltas"),
}
BOXES_AND_SCORES = {
    "proposals": ("proposal_boxes", "objectness_logits"),
    "detections": ("pred_boxes", "scores"),
}
FIELDS = {"masks": "pred_masks", "keypoint heat maps": "pred_keypoint_heatmaps"}


@dataclass(frozen=True)
class Tolerance:
    """Tolerances within which two models count as equal.

    Args:
        values: max difference of a stage's values, relative to the control's largest value.
        boxes: max difference of a stage's boxes, in pixels of the network input.
        scores: max difference of detection scores.
        found_again: min fraction of end-to-end detections that the other model has too.
    """

    values: float
    boxes: float
    scores: float
    found_again: float


TO_THE_BIT = Tolerance(values=0.0, boxes=0.0, scores=0.0, found_again=1.0)
# As enforced by tests/test_parity.py, tests/test_pooler.py and tests/test_optimize.py.
TO_ROUNDING = Tolerance(values=2e-5, boxes=1e-3, scores=1e-5, found_again=0.98)


@dataclass
class Difference:
    """Max absolute difference over pairs of tensors, and the control's max absolute value."""

    largest: float = 0.0
    of: float = 0.0
    comparable: bool = True  # same shapes, NaN at the same positions

    def add(self, own: torch.Tensor | None, control: torch.Tensor | None) -> None:
        if own is None or control is None or own.shape != control.shape:
            self.comparable = False
        elif own.numel():
            own, control = own.float(), control.float()
            self.of = max(self.of, control.abs().max().item())
            if not torch.equal(own, control):
                difference = (own - control).abs().max().item()
                self.comparable &= difference == difference
                self.largest = max(self.largest, difference)

    def row(self, what: str, tolerance: float | None) -> dict[str, Any]:
        """A report row; ``within`` is None without a tolerance."""
        within = self.comparable and tolerance is not None and self.largest <= tolerance
        return {
            "what": what,
            "difference": self.largest if self.comparable else None,
            "relative": self.largest / self.of if self.comparable and self.of else None,
            "largest": self.of,
            "tolerance": tolerance,
            "within": None if tolerance is None else within,
        }


@dataclass
class Matches:
    """Matches of the control's boxes to a model's nearest boxes of the same class."""

    count: int = 0
    count_control: int = 0
    found_again: int = 0  # of the control's boxes
    others: int = 0  # boxes missing from the control
    boxes: Difference = field(default_factory=Difference)
    scores: Difference = field(default_factory=Difference)

    def add(self, own: Instances, control: Instances, boxes: str, scores: str) -> None:
        """Add the boxes of one image, from the fields of these names."""
        self.count += len(own)
        self.count_control += len(control)
        own_boxes, control_boxes = own.get(boxes).tensor, control.get(boxes).tensor
        own_scores, control_scores = own.get(scores), control.get(scores)
        distance = (control_boxes[:, None] - own_boxes).abs().amax(dim=2)
        if own.has("pred_classes") and control.has("pred_classes"):
            distance[control.pred_classes[:, None] != own.pred_classes] = torch.inf
        near = distance <= NEAR
        found = near.any(dim=1)
        self.found_again += int(found.sum())
        self.others += int((~near.any(dim=0)).sum())
        if found.any():
            # Two levels may propose the same box: the score distinguishes them.
            cost = distance + (control_scores[:, None] - own_scores).abs()
            nearest = cost.masked_fill(~near, torch.inf)[found].argmin(dim=1)
            self.boxes.add(own_boxes[nearest], control_boxes[found])
            self.scores.add(own_scores[nearest], control_scores[found])

    @property
    def share(self) -> float:
        """Fraction of both models' boxes that the other has too; 1.0 if there are no boxes."""
        both = self.count + self.count_control
        return (self.found_again + self.count - self.others) / both if both else 1.0

    def rows(
        self, what: str, boxes: float | None, scores: float | None, share: float
    ) -> list[dict[str, Any]]:
        """Report rows for the boxes and their scores.

        Args:
            what: name of the matched quantity.
            boxes: tolerance for matched boxes, in pixels, or None.
            scores: tolerance for their scores, or None.
            share: min fraction of boxes to match; used only with a tolerance for boxes.
        """
        row = self.boxes.row(f"{what}, boxes", boxes)
        row |= {"found_again": self.found_again, "of": self.count_control, "others": self.others}
        row["within"] = row["within"] and self.share >= share
        return [row, self.scores.row(f"{what}, scores", scores)]


class StageByStage:
    """Compares the stages of a model with a control's, image by image.

    ``results`` accumulates the differences by quantity; ``left_out`` names the stages that only one
    of the two models has.

    Args:
        control: a Detectron2 model in eval mode.
        model: another one, whose stages are given the control's outputs.
    """

    def __init__(self, control: nn.Module, model: nn.Module):
        self.control, self.model = control, model
        self.results: dict[str, Difference | Matches] = {}
        self.stages = [s for s in MODULES if _owners(control, s) and _owners(model, s)]
        self.left_out = [s for s in MODULES if bool(_owners(control, s)) != bool(_owners(model, s))]

    def compare(self, control_inputs: list[dict], inputs: list[dict]) -> list[dict]:
        """Run both models on one batch, and return the control's output.

        Args:
            control_inputs: the control's inputs, in Detectron2's format.
            inputs: the model's inputs for the same images.
        """
        recorded: dict[str, list] = defaultdict(list)

        def record(stage: str, output: Any) -> None:
            recorded[stage].append(copy.deepcopy(output))

        def exchange(stage: str, own: Any) -> Any:
            control = _next(recorded[stage], own, stage in BY_ROWS)
            self._add(stage, own, control)
            return in_form_of(own, control)

        with torch.no_grad():
            with _observed(self.control, self.stages, record):
                outputs = self.control(control_inputs)
            with _observed(self.model, self.stages, exchange):
                self.model(inputs)
        for stage, rest in recorded.items():
            for control in rest:  # what the model did not reach
                self._add(stage, None, control)
        return outputs

    def _add(self, stage: str, own: Any, control: Any) -> None:
        result: Any
        if stage in BOXES_AND_SCORES:
            result = self.results.setdefault(stage, Matches())
            images = itertools.zip_longest(_instances(own), _instances(control))
            for own_boxes, control_boxes in images:
                if own_boxes is None or control_boxes is None:
                    result.boxes.comparable = False
                else:
                    result.add(own_boxes, control_boxes, *BOXES_AND_SCORES[stage])
            return
        own_parts, control_parts = _parts(stage, own), _parts(stage, control)
        for name in {**control_parts, **own_parts}:
            result = self.results.setdefault(name, Difference())
            tensors = itertools.zip_longest(own_parts.get(name, []), control_parts.get(name, []))
            for own_tensor, control_tensor in tensors:
                result.add(own_tensor, control_tensor)

    def rows(self, tolerance: Tolerance | None) -> list[dict[str, Any]]:
        """One row per compared quantity; see :meth:`Difference.row`, :meth:`Matches.rows`."""
        rows: list[dict[str, Any]] = []
        for what, result in self.results.items():
            if isinstance(result, Difference):
                rows.append(result.row(what, tolerance.values * result.of if tolerance else None))
            elif tolerance is None:
                rows += result.rows(what, None, None, 1.0)
            else:
                logits = what == "proposals"  # unbounded scores
                scores = tolerance.values * result.scores.of if logits else tolerance.scores
                rows += result.rows(what, tolerance.boxes, scores, 1.0)
        return rows


def end_to_end_rows(matches: Matches, tolerance: Tolerance | None) -> list[dict[str, Any]]:
    """As :meth:`StageByStage.rows`, for the end-to-end detections of both models.

    Rounding tolerated in a stage may decide here between two boxes that overlap by almost exactly
    the NMS threshold, so the criterion is the fraction of matched boxes.
    """
    what = "end-to-end detections"
    if tolerance is None:
        return matches.rows(what, None, None, 1.0)
    if tolerance == TO_THE_BIT:
        return matches.rows(what, 0.0, 0.0, 1.0)
    return matches.rows(what, NEAR, None, tolerance.found_again)


def in_form_of(own: Any, reference: Any) -> Any:
    """The values of ``reference`` in the dtype and memory layout of ``own``.

    For tensors, and lists, tuples and dicts of them; if shapes, lengths or keys differ, returns
    ``own``. For anything else, returns ``reference``.
    """
    if isinstance(own, torch.Tensor):
        if not isinstance(reference, torch.Tensor) or own.shape != reference.shape:
            return own
        form = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device)
        return form.copy_(reference)
    if reference is None:
        return own
    if isinstance(own, dict):
        return {key: in_form_of(value, reference.get(key)) for key, value in own.items()}
    if isinstance(own, list | tuple):
        if len(own) != len(reference):
            return own
        return type(own)(map(in_form_of, own, reference))
    return reference


def _owners(model: Any, stage: str) -> list:
    """The modules (or the method) whose output is the stage; [] if the model has none."""
    owner = model
    for name in MODULES[stage].split("."):
        owner = getattr(owner, name, None)
    if owner is None:
        return []
    return list(owner) if isinstance(owner, nn.ModuleList) else [owner]


@contextlib.contextmanager
def _observed(model: Any, stages: list[str], observe: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within the block, replace each stage's output by ``observe(stage, output)``."""
    with contextlib.ExitStack() as undo:
        for stage in stages:
            for owner in _owners(model, stage):
                if isinstance(owner, nn.Module):
                    handle = owner.register_forward_hook(_hook(observe, stage))
                    undo.callback(handle.remove)
                else:
                    path, _, name = MODULES[stage].rpartition(".")
                    setattr(model.get_submodule(path), name, _method(observe, stage, owner))
                    undo.callback(delattr, model.get_submodule(path), name)
        yield


def _hook(observe: Callable[[str, Any], Any], stage: str) -> Callable:
    return lambda module, inputs, output: observe(stage, output)


def _method(observe: Callable[[str, Any], Any], stage: str, method: Callable) -> Callable:
    def observed(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        instead = observe(stage, output)
        return output if instead is None else instead

    return observed


def _next(recorded: list, own: Any, by_rows: bool) -> Any:
    """Pop the counterpart of ``own`` from ``recorded``; None if nothing is left."""
    if not recorded:
        return None
    if not by_rows:
        return recorded.pop(0)
    if isinstance(own, torch.Tensor):
        rows = torch.cat(recorded)
        taken, rest = rows[: len(own)], rows[len(own) :]
        recorded[:] = [rest] if len(rest) else []
        return taken
    columns = [torch.cat(column) for column in zip(*recorded, strict=True)]
    count = len(own[0])
    recorded[:] = [tuple(c[count:] for c in columns)] if len(columns[0]) > count else []
    return tuple(c[:count] for c in columns)


def _instances(output: Any) -> list[Instances]:
    """The Instances of each image; an RPN also returns losses."""
    return list(output[0] if isinstance(output, tuple) else output or [])


def _parts(stage: str, output: Any) -> dict[str, list[torch.Tensor]]:
    """A stage's output, by the names used in reports."""
    if output is None:
        return {}
    if isinstance(output, dict):  # feature maps by name
        return {name: [tensor] for name, tensor in output.items()}
    if stage in PARTS:
        return {
            name: [part] if isinstance(part, torch.Tensor) else list(part)
            for name, part in zip(PARTS[stage], output, strict=True)
        }
    if isinstance(output, torch.Tensor):
        return {stage: [output]}
    if stage in FIELDS:
        return {stage: [instances.get(FIELDS[stage]) for instances in output]}
    return {stage: [x.tensor if isinstance(x, Boxes) else x for x in output]}
