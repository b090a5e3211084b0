"""When a training meets NaN or infinity: which module, tensor, image and level were first, and why.

:class:`NonFiniteGuard` is a hook for Detectron2's trainers. While all is finite it looks at the
gradients once per step and does nothing else. Otherwise it saves the batch and the weights, runs
the batch again with a look at every module, and ends the training with what it has found.
"""

import logging
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from .json_files import write_json
from .names import own_keys
from .unwrap import unwrapped

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
# Detectron2's 1x recipes: SOLVER.BASE_LR 0.02 for 16 images, after 1000 iterations of warm-up.
RECIPE_LR, RECIPE_BATCH, RECIPE_WARMUP = 0.02, 16, 1000
EXPLODED_WEIGHT = 1e3  # no trained detector has weights as large
# Seconds that a process whose batch was not to blame waits before it ends: a launcher reports the
# first to end and stops the others, and the one with the batch runs every image again.
OTHERS_FIRST = 30.0
_NOT_AGAIN = "not found by running this process's batch again"
# What may stand in an Instances; each is made of what its attribute holds.
FIELD_TYPES: dict[str, tuple[type, str]] = {
    "Boxes": (Boxes, "tensor"),
    "BitMasks": (BitMasks, "tensor"),
    "Keypoints": (Keypoints, "tensor"),
    "PolygonMasks": (PolygonMasks, "polygons"),
}


@dataclass
class FirstTensor:
    """The first tensor, in order of computation, that held NaN or infinity."""

    module: str  # its name in the model, "" for the model itself
    kind: str  # the module's class
    tensor: str  # "output['p3']", "input[0]", "gradient of output[0]"
    level: int | None  # k of P_k or C_k, if the tensor belongs to one
    num_nan: int
    num_inf: int
    numel: int
    dtype: str

    @property
    def is_input(self) -> bool:
        """Whether it came with the batch, before anything was computed."""
        return self.module == "" and self.tensor.startswith("input")

    def __str__(self) -> str:
        where = f"{self.tensor} of {self.module or 'the model'} ({self.kind})"
        level = f", level {self.level}" if self.level is not None else ""
        return (
            f"{where}{level}: {self.num_nan} NaN and {self.num_inf} infinite among {self.numel} "
            f"values, {self.dtype}"
        )


@dataclass
class Diagnosis:
    """What running a batch again has shown."""

    first: FirstTensor | None = None
    images: list[str] = field(default_factory=list)  # those that go wrong alone
    batch_faults: list[str] = field(default_factory=list)
    weight_faults: list[str] = field(default_factory=list)
    finite_in_float32: bool = False  # with autocast it fails, without it does not


class NonFiniteGuard(HookBase):
    """Ends a training that has met NaN or infinity with what, where and why; register it last.

    Losses are looked at by Detectron2's trainers themselves (FloatingPointError); this adds the
    gradients, before the optimiser's step can spoil the weights. It writes to
    ``OUTPUT_DIR/nonfinite/iteration_N``: ``batch.pth`` (see :func:`load_batch`), ``model.pth`` (a
    checkpoint of the weights as they met the batch; BatchNorm's running statistics have met it)
    and ``report.json``.

    Raises:
        FloatingPointError: from the training loop, with the report.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self._handles: list[Any] = []
        self._batch: Batch = []
        self._random_state: list[torch.Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "NonFiniteGuard":
        # A copy of the model, made to infer with, has this hook too: it must not copy the trainer.
        return self

    def before_train(self) -> None:
        model = unwrapped(self.trainer.model)
        self._handles = [
            model.register_forward_pre_hook(self._keep_batch),
            self.trainer.optimizer.register_step_pre_hook(self._check_gradients),
        ]

    def _keep_batch(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if model.training and torch.is_grad_enabled():
            self._batch = args[0]
            self._random_state = _random_state()

    def _check_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # The largest absolute value: NaN and infinity stay what they are, nothing else becomes one.
        largest = torch._foreach_norm(gradients, math.inf) if gradients else ()
        if largest and not torch.stack([n.float() for n in largest]).isfinite().all():
            raise FloatingPointError("a gradient became infinite or NaN")

    def after_train(self) -> None:
        # Detectron2 calls this in a `finally`, with the error that ends the training under way.
        for handle in self._handles:
            handle.remove()
        error = sys.exc_info()[1]
        # Of what NaN breaks, Detectron2 asserts some without a word; so any assertion is looked at.
        suspicious = isinstance(error, AssertionError) or says_non_finite(error)
        if error is None or not suspicious or not self._batch:
            return
        model = unwrapped(self.trainer.model)
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        with _random_numbers(self._random_state):
            found = diagnose(model, self._batch, amp_dtype(self.cfg))
        if found.first is None and not isinstance(error, FloatingPointError):
            return
        report = self._report(error, found, weights)
        if found.first is None and comm.get_world_size() > 1:
            time.sleep(OTHERS_FIRST)
        raise FloatingPointError(report) from error

    def _report(
        self, error: BaseException, found: Diagnosis, weights: dict[str, torch.Tensor]
    ) -> str:
        """Say what was found, and write it beside the batch and the weights."""
        cfg, iteration = self.cfg, self.trainer.iter
        causes = list(_seen_causes(found))
        if not (found.first and found.first.is_input):
            causes += _solver_causes(cfg, self.trainer.optimizer, iteration)
            causes += _history_causes(self.trainer.storage)
        rank = f"_rank_{comm.get_rank()}" if comm.get_world_size() > 1 else ""
        folder = Path(cfg.OUTPUT_DIR, "nonfinite", f"iteration_{iteration}{rank}")
        content = {
            "iteration": iteration,
            "error": _first_line(error),
            **asdict(found),
            "likely_causes": causes,
            "batch": [_image_name(record, i) for i, record in enumerate(self._batch)],
        }
        try:
            save(folder, self._batch, weights, content)
            saved = f"saved: {folder}/batch.pth, model.pth, report.json"
        except (OSError, RuntimeError) as failure:  # a full disk is PyTorch's RuntimeError
            saved = f"not saved: {failure}"
        return "\n".join(
            [
                f"training met NaN or infinity in iteration {iteration}: {_first_line(error)}",
                f"first: {found.first or _NOT_AGAIN}",
                f"images that go wrong alone: {_listed(found.images) or 'none'}",
                "likely causes:",
                *(f"  - {cause}" for cause in causes or ["none that can be seen from here"]),
                saved,
            ]
        )


def says_non_finite(error: BaseException | None) -> bool:
    """Whether an error of a training step says that a number was NaN or infinite.

    Detectron2's trainers and RPN raise FloatingPointError, its Boxes an AssertionError, PyTorch's
    sampling a RuntimeError.

    >>> says_non_finite(AssertionError("Box tensor contains infinite or NaN!"))
    True
    >>> says_non_finite(RuntimeError("CUDA out of memory"))
    False
    """
    if isinstance(error, AssertionError | RuntimeError):
        return bool(re.search(r"\bnan\b", str(error), re.I))
    return isinstance(error, FloatingPointError)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The dtype that ``SOLVER.AMP`` makes a training compute in; None for float32."""
    return getattr(torch, own_keys(cfg).AMP_DTYPE) if cfg.SOLVER.AMP.ENABLED else None


# ------------------------------------------------------------------------------- diagnosis


def diagnose(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> Diagnosis:
    """Run a batch through a model in training mode, and find where NaN or infinity starts.

    The whole batch, forward and, if that is finite, backward; then every image alone. Gradients
    and running statistics of the model change. A model with SyncBatchNorm is not run in one of
    several processes: it would wait for the others.
    """
    found = Diagnosis(
        batch_faults=list(batch_faults(batch)), weight_faults=list(_weight_faults(model))
    )
    synchronised = any("Sync" in type(module).__name__ for module in model.modules())
    if synchronised and comm.get_world_size() > 1:
        return found
    found.first = _first_in(model, batch, autocast)
    if found.first is None:
        return found
    if autocast is not None:
        found.finite_in_float32 = _first_in(model, batch, None) is None
    found.images = [
        _image_name(record, i)
        for i, record in enumerate(batch)
        if _first_in(model, [record], autocast) is not None
    ]
    return found


def _first_in(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> FirstTensor | None:
    """The first tensor of a forward and backward pass to hold NaN or infinity."""
    watch = _Watch(model)
    device = next(model.parameters()).device.type
    context: AbstractContextManager[Any] = (
        nullcontext() if autocast is None else torch.autocast(device, autocast)
    )
    model.zero_grad()
    with watch, EventStorage():  # a storage of its own: the training's must not count this
        try:
            with context:
                losses = model(batch)
            # Not scaled up: what overflows now would at any scale that float16's GradScaler tries.
            if watch.first is None:
                sum(losses.values()).backward()
        except Exception as error:  # what NaN leads to; the watch has seen where it started
            if watch.first is None:
                logger.warning("the batch could not be run again: %s", _first_line(error))
    return watch.first or _first_gradient(model)


def _first_gradient(model: nn.Module) -> FirstTensor | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            owner, _, last = name.rpartition(".")
            kind = type(model.get_submodule(owner)).__name__
            return _first_tensor(owner, kind, f"gradient of {last}", parameter.grad, None)
    return None


class _Watch:
    """Hooks on every module that note the first tensor with NaN or infinity in it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.first: FirstTensor | None = None
        self._calls: Counter[str] = Counter()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            before, after = self._looks(name)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _looks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any) -> None:
            self._look(name, module, "input", args)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._look(name, module, "output", output)
            self._calls[name] += 1

        return before, after

    def _look(self, name: str, module: nn.Module, place: str, value: Any) -> None:
        if self.first is not None:
            return
        level = self._level_of_call(name)
        for path, tensor in tensors_in(value, place):
            if not tensor.detach().isfinite().all():
                self._note(name, module, path, tensor, level)
                return
            if place == "output" and tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._look_back(name, module, path, level))

    def _look_back(
        self, name: str, module: nn.Module, path: str, level: int | None
    ) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if self.first is None and not gradient.isfinite().all():
                self._note(name, module, f"gradient of {path}", gradient, level)

        return look

    def _note(
        self, name: str, module: nn.Module, path: str, tensor: torch.Tensor, level: int | None
    ) -> None:
        found = _level_named(path)
        level = found if found is not None else level
        self.first = _first_tensor(name, type(module).__name__, path, tensor, level)

    def _level_of_call(self, name: str) -> int | None:
        """Of a module named after its level, or of an RPN's layer, which is called per level."""
        level = _level_named(name)
        head, _, _ = name.partition(".rpn_head")
        if level is None and head != name:
            maps = getattr(self.model.get_submodule(head), "in_features", [])
            if self._calls[name] < len(maps):
                level = _level_named(f"['{maps[self._calls[name]]}']")
        return level


def _level_named(text: str) -> int | None:
    """Level k in a name.

    >>> _level_named("backbone.fpn_lateral4"), _level_named("output['p3']")
    (4, 3)
    >>> _level_named("backbone.bottom_up.res5.0.conv1"), _level_named("roi_heads.box_head.fc1")
    (5, None)
    """
    found = re.search(r"fpn_(?:lateral|output)(\d+)|\bres(\d)\b|'(?:p|c|res)(\d)'", text)
    return int(next(filter(None, found.groups()))) if found else None


def _first_tensor(
    name: str, kind: str, path: str, tensor: torch.Tensor, level: int | None
) -> FirstTensor:
    return FirstTensor(
        name,
        kind,
        path,
        level,
        int(tensor.isnan().sum()),
        int(tensor.isinf().sum()),
        tensor.numel(),
        str(tensor.dtype).removeprefix("torch."),
    )


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor in nested containers and Detectron2's structures, with its path.

    >>> [path for path, _ in tensors_in({"p2": torch.zeros(1), "x": [torch.ones(2), None]}, "out")]
    ["out['p2']", "out['x'][0]"]
    """
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{number}]")
    elif isinstance(value, Instances):
        for key, item in value.get_fields().items():
            yield from tensors_in(item, f"{path}.{key}")
    elif isinstance(getattr(value, "tensor", None), torch.Tensor):  # Boxes, ImageList, BitMasks
        yield from tensors_in(value.tensor, path)


# ----------------------------------------------------------------------------------- causes


def batch_faults(batch: Batch) -> Iterable[str]:
    """What is wrong with the pixels and the ground truth of a batch, image by image."""
    for i, record in enumerate(batch):
        name = _image_name(record, i)
        image = record["image"]
        if not image.float().isfinite().all():
            yield f"{name}: a pixel is NaN or infinite; look at the file and at your augmentations"
        instances = record.get("instances")
        if instances is None or not instances.has("gt_boxes") or not len(instances):
            continue
        boxes = instances.gt_boxes.tensor
        x0, y0, x1, y1 = boxes[:, :4].unbind(dim=1)
        height, width = image.shape[-2:]
        inverted = "a side is 0 or negative: no area, or written as (x, y, width, height)"
        for fault, bad in (
            ("NaN or infinite", ~boxes.isfinite().all(dim=1)),
            (inverted, (x1 <= x0) | (y1 <= y0)),
            ("it reaches beyond the image", (x1 > width + 1) | (y1 > height + 1)),
        ):
            for number in bad.nonzero().flatten().tolist()[:1]:
                values = ", ".join(f"{value:.6g}" for value in boxes[number].tolist())
                more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
                yield (
                    f"{name}: box {number}{more} is [{values}], {fault}; "
                    "run python -m fpn_ext.data_check"
                )


def _weight_faults(model: nn.Module) -> Iterable[str]:
    """Not of BatchNorm's running statistics: the batch itself has spoilt them."""
    floating = [(name, p.detach()) for name, p in model.named_parameters() if p.numel()]
    bad = [name for name, tensor in floating if not tensor.isfinite().all()]
    if bad:
        yield (
            f"{len(bad)} weights hold NaN or infinity before the batch, the first is {bad[0]}: "
            "start again from an earlier checkpoint"
        )
        return
    largest, name = max(((float(t.abs().max()), name) for name, t in floating), default=(0.0, ""))
    if largest > EXPLODED_WEIGHT:
        yield (
            f"the weights have exploded: {name} holds {largest:.3g}; start again, with a lower "
            "SOLVER.BASE_LR or with SOLVER.CLIP_GRADIENTS.ENABLED True"
        )


def _seen_causes(found: Diagnosis) -> Iterable[str]:
    yield from found.weight_faults
    yield from found.batch_faults
    if found.finite_in_float32:
        yield (
            "float16 overflow: in float32 the same batch is finite; set MODEL.FPN_EXT.AMP_DTYPE "
            "bfloat16, which reaches as far as float32, or SOLVER.AMP.ENABLED False"
        )
    if found.first is None and comm.get_world_size() > 1:
        yield (
            f"another of the {comm.get_world_size()} processes had the batch: Detectron2 averages "
            "their losses and gradients; its report is beside this one"
        )


def _solver_causes(cfg: CfgNode, optimizer: torch.optim.Optimizer, iteration: int) -> Iterable[str]:
    solver = cfg.SOLVER
    batches = own_keys(cfg).ACCUMULATE
    fitting = RECIPE_LR * solver.IMS_PER_BATCH * batches / RECIPE_BATCH
    if isinstance(optimizer, torch.optim.SGD) and 1.5 * fitting < solver.BASE_LR:
        yield (
            f"SOLVER.BASE_LR {solver.BASE_LR:g} for SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}"
            + (f" x MODEL.FPN_EXT.ACCUMULATE {batches}" if batches > 1 else "")
            + f" is {solver.BASE_LR / fitting:.3g} times that of Detectron2's recipes "
            f"({RECIPE_LR} for {RECIPE_BATCH}); try {fitting:g}"
        )
    if iteration < RECIPE_WARMUP and solver.WARMUP_ITERS < RECIPE_WARMUP / 2:
        yield (
            f"iteration {iteration}, and SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}: "
            f"Detectron2's recipes warm up for {RECIPE_WARMUP}"
        )
    resnets = cfg.MODEL.RESNETS
    if not cfg.MODEL.WEIGHTS and resnets.NORM == "FrozenBN":
        yield (
            "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM is FrozenBN, whose statistics come from "
            'a checkpoint alone; train from scratch with "BN" or "GN"'
        )
    if 0 in cfg.MODEL.PIXEL_STD:
        yield f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD} divides by 0"


def _history_causes(storage: EventStorage) -> Iterable[str]:
    if "total_loss" not in storage.histories():
        return
    losses = [value for value, _ in storage.history("total_loss").values()][-20:]
    usual = statistics.median(losses)
    if len(losses) >= 3 and losses[-1] > 10 * usual > 0:
        yield (
            f"the loss was growing: {losses[-1]:.3g} in the last iteration, {usual:.3g} in the "
            f"median of {len(losses)}; training has diverged, this batch is not to blame"
        )


# ----------------------------------------------------------------------------------- saving


def save(
    folder: Path, batch: Batch, weights: Mapping[str, torch.Tensor], report: Mapping[str, Any]
) -> None:
    """Write ``batch.pth`` and ``model.pth``, of tensors and plain values alone, and the report."""
    write_json(folder / "report.json", report)
    torch.save([_plain(record) for record in batch], folder / "batch.pth")
    torch.save({"model": dict(weights)}, folder / "model.pth")


def load_batch(file: str | Path) -> Batch:
    """A batch that was saved, ready for ``model(batch)``. Nothing in the file is run."""
    return [_restored(record) for record in torch.load(file, weights_only=True)]


def _plain(value: Any) -> Any:
    """A batch's values in types that ``torch.load(..., weights_only=True)`` takes."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, Instances):
        fields = {name: _plain(item) for name, item in value.get_fields().items()}
        return {"type": "Instances", "size": list(value.image_size), "fields": fields}
    for name, (kind, attribute) in FIELD_TYPES.items():
        if type(value) is kind:
            return {"type": name, "value": _plain(getattr(value, attribute))}
    if hasattr(value, "__array__"):  # NumPy's arrays and scalars
        return torch.as_tensor(value)
    return repr(value)


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Instances":
        fields = {name: _restored(item) for name, item in value["fields"].items()}
        return Instances(tuple(value["size"]), **fields)
    if value.get("type") in FIELD_TYPES:
        return FIELD_TYPES[value["type"]][0](_restored(value["value"]))
    return {key: _restored(item) for key, item in value.items()}


# ------------------------------------------------------------------------------------ pieces


def _image_name(record: Mapping[str, Any], number: int) -> str:
    return str(record.get("file_name", f"image {number} of the batch"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _random_state() -> list[torch.Tensor]:
    """Of the CPU, and of the current GPU if one is in use."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


class _random_numbers:
    """Draws the random numbers of the failed step again, then goes on as before."""

    def __init__(self, state: list[torch.Tensor]):
        self.state = state

    def __enter__(self) -> None:
        self.before = _random_state()
        _set_random_state(self.state)

    def __exit__(self, *_: object) -> None:
        _set_random_state(self.before)


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
