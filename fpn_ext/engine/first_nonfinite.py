"""Find where NaN or infinity starts: rerun a batch, checking every module's tensors."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from .nonfinite_inputs import batch_faults, image_name, weight_faults
from .saved_batches import Batch

logger = logging.getLogger(__name__)


@dataclass
class FirstTensor:
    """The first tensor, in order of computation, to hold NaN or infinity."""

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
        """Whether it was already in the batch, before any computation."""
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
    """The result of rerunning a batch."""

    first: FirstTensor | None = None
    images: list[str] = field(default_factory=list)  # those that fail on their own
    batch_faults: list[str] = field(default_factory=list)
    weight_faults: list[str] = field(default_factory=list)
    finite_in_float32: bool = False  # fails only under autocast


def diagnose(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> Diagnosis:
    """Run a batch through a model in training mode, and find where NaN or infinity starts.

    Runs the whole batch forward and, if that is finite, backward; then each image alone. Changes
    the model's gradients and running statistics. With several processes, a model with SyncBatchNorm
    is not run: it would wait for the others.
    """
    found = Diagnosis(
        batch_faults=list(batch_faults(batch)), weight_faults=list(weight_faults(model))
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
        image_name(record, i)
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
    with watch, EventStorage():  # separate storage: keep this out of the training's metrics
        try:
            with context:
                losses = model(batch)
            # Unscaled: what overflows here overflows at any scale that GradScaler tries.
            if watch.first is None:
                sum(losses.values()).backward()
        except Exception as error:  # a consequence of NaN; the watch has recorded its origin
            if watch.first is None:
                logger.warning("the batch could not be run again: %s", first_line(error))
    return watch.first or _first_gradient(model)


def _first_gradient(model: nn.Module) -> FirstTensor | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            owner, _, last = name.rpartition(".")
            kind = type(model.get_submodule(owner)).__name__
            return _first_tensor(owner, kind, f"gradient of {last}", parameter.grad, None)
    return None


class _Watch:
    """Hooks on every module that record the first tensor holding NaN or infinity."""

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
        """Level of a module named after it, or of an RPN layer, which is called once per level."""
        level = _level_named(name)
        head, _, _ = name.partition(".rpn_head")
        if level is None and head != name:
            maps = getattr(self.model.get_submodule(head), "in_features", [])
            if self._calls[name] < len(maps):
                level = _level_named(f"['{maps[self._calls[name]]}']")
        return level


def _level_named(text: str) -> int | None:
    """The pyramid level k in a name, or None.

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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
