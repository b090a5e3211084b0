"""How far two detectors agree: stage by stage on the same inputs, and on what comes out at the end.

Rounding in an early stage may decide, many stages later, which of two boxes is kept. So every stage
of one model is given what the control's stage before it returned, and what it makes of that is
compared: the model's own ``forward`` runs, with the outputs of its modules exchanged on the way.
What both models detect when left alone is compared too, box by box.
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

NEAR = 1.0  # pixels: a box not farther than that from one of the same class is found again

# What a stage is called, and the module whose output it is; all of them, where that is a list.
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
# A row for each box: a model may come to the boxes in chunks.
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
    """Up to where two models count as equal.

    Args:
        values: difference of the values of a stage, as a share of the control's largest value.
        boxes: difference of the boxes of a stage, in pixels of the network input.
        scores: difference of the detections' scores.
        found_again: share of the end-to-end detections that the other model has, too.
    """

    values: float
    boxes: float
    scores: float
    found_again: float


TO_THE_BIT = Tolerance(values=0.0, boxes=0.0, scores=0.0, found_again=1.0)
# What tests/test_parity.py, tests/test_pooler.py and tests/test_optimize.py hold.
TO_ROUNDING = Tolerance(values=2e-5, boxes=1e-3, scores=1e-5, found_again=0.98)


@dataclass
class Difference:
    """Largest absolute difference of pairs of tensors, and the control's largest value."""

    largest: float = 0.0
    of: float = 0.0
    comparable: bool = True  # the same shapes, and no NaN where the other has a number

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
        """For a report; ``within`` is None where there is no tolerance to be within."""
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
    """Boxes of a model, and for each of the control's the nearest of its class among them."""

    count: int = 0
    count_control: int = 0
    found_again: int = 0  # of the control's boxes
    others: int = 0  # boxes that the control has not
    boxes: Difference = field(default_factory=Difference)
    scores: Difference = field(default_factory=Difference)

    def add(self, own: Instances, control: Instances, boxes: str, scores: str) -> None:
        """Those of one image, from the fields of these names."""
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
            # Two levels may propose the same box: the score tells which is which.
            cost = distance + (control_scores[:, None] - own_scores).abs()
            nearest = cost.masked_fill(~near, torch.inf)[found].argmin(dim=1)
            self.boxes.add(own_boxes[nearest], control_boxes[found])
            self.scores.add(own_scores[nearest], control_scores[found])

    @property
    def share(self) -> float:
        """Of the boxes of both models, those that the other one has, too; 1.0 where none are."""
        both = self.count + self.count_control
        return (self.found_again + self.count - self.others) / both if both else 1.0

    def rows(
        self, what: str, boxes: float | None, scores: float | None, share: float
    ) -> list[dict[str, Any]]:
        """For a report: the boxes and their scores.

        Args:
            what: was matched.
            boxes: tolerance of the boxes found again, in pixels, or None.
            scores: tolerance of their scores, or None.
            share: of the boxes, that is to be found again; with a tolerance for the boxes only.
        """
        row = self.boxes.row(f"{what}, boxes", boxes)
        row |= {"found_again": self.found_again, "of": self.count_control, "others": self.others}
        row["within"] = row["within"] and self.share >= share
        return [row, self.scores.row(f"{what}, scores", scores)]


class StageByStage:
    """Compares the stages of a model with a control's, image after image.

    ``results`` holds, by what was compared, what was found so far; ``left_out`` names the stages
    that only one of the two models has.

    Args:
        control: a Detectron2 model in eval mode.
        model: another one, whose stages are given what the control's returned.
    """

    def __init__(self, control: nn.Module, model: nn.Module):
        self.control, self.model = control, model
        self.results: dict[str, Difference | Matches] = {}
        self.stages = [s for s in MODULES if _owners(control, s) and _owners(model, s)]
        self.left_out = [s for s in MODULES if bool(_owners(control, s)) != bool(_owners(model, s))]

    def compare(self, control_inputs: list[dict], inputs: list[dict]) -> list[dict]:
        """What the control returns for one batch, after both models have run on it.

        Args:
            control_inputs: as Detectron2's models take them.
            inputs: of the same images, as the model is to be given them.
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
            for control in rest:  # what the model did not come to
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
        """A row for each quantity compared; see :meth:`Difference.row`, :meth:`Matches.rows`."""
        rows: list[dict[str, Any]] = []
        for what, result in self.results.items():
            if isinstance(result, Difference):
                rows.append(result.row(what, tolerance.values * result.of if tolerance else None))
            elif tolerance is None:
                rows += result.rows(what, None, None, 1.0)
            else:
                logits = what == "proposals"  # scores of any size
                scores = tolerance.values * result.scores.of if logits else tolerance.scores
                rows += result.rows(what, tolerance.boxes, scores, 1.0)
        return rows


def end_to_end_rows(matches: Matches, tolerance: Tolerance | None) -> list[dict[str, Any]]:
    """As :meth:`StageByStage.rows`, of detections of both models left alone.

    Where rounding is tolerated in a stage, it may decide here between two boxes that overlap by
    just the threshold: the share of boxes found again is what counts.
    """
    what = "end-to-end detections"
    if tolerance is None:
        return matches.rows(what, None, None, 1.0)
    if tolerance == TO_THE_BIT:
        return matches.rows(what, 0.0, 0.0, 1.0)
    return matches.rows(what, NEAR, None, tolerance.found_again)


def in_form_of(own: Any, reference: Any) -> Any:
    """The numbers of ``reference`` in the dtype and memory layout of ``own``.

    Of tensors, and of lists, tuples and dictionaries of them; where shapes, lengths or keys differ,
    ``own`` stays. Of anything else: ``reference``.
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
    """The modules (or the method) whose output the stage is; [] where the model has none."""
    owner = model
    for name in MODULES[stage].split("."):
        owner = getattr(owner, name, None)
    if owner is None:
        return []
    return list(owner) if isinstance(owner, nn.ModuleList) else [owner]


@contextlib.contextmanager
def _observed(model: Any, stages: list[str], observe: Callable[[str, Any], Any]) -> Iterator[None]:
    """While it lasts, ``observe(stage, output)`` sees each output; what it returns replaces it."""
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
    """Take out of ``recorded`` what stands beside ``own``; None where nothing is left."""
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
    """Of each image; an RPN returns losses beside them."""
    return list(output[0] if isinstance(output, tuple) else output or [])


def _parts(stage: str, output: Any) -> dict[str, list[torch.Tensor]]:
    """What a stage returned, by the names in a report."""
    if output is None:
        return {}
    if isinstance(output, dict):  # maps, by their names
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
