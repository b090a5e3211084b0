"""Which way each layer of an optimised model is computed: measured here, or from a table.

No way of :mod:`.layers` is fastest everywhere, so each distinct layer is timed once on the machine
at hand, with maps of the size it gets, and the fastest way is kept in the user's cache folder, by
processor, instructions, torch, threads and kernels. Later models find it there.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files.atomic import replacing
from ..kernels.compiled import build, kernels
from ..keys import declare
from .layers import CONVOLUTIONS, FULLY_CONNECTED, SUMS, FullyConnected, Way, has_relu, is_plain
from .residuals import DirectSum

declare(
    "MODEL.FPN_EXT.TUNE",
    True,
    "Optimising a model for inference on CPU times each layer's ways once, some seconds, and keeps "
    "the fastest in the user's cache folder. False: a table's.",
    "inference",
)

logger = logging.getLogger(__name__)

ROUNDS = 5
MEASURES = 3  # of what was measured in the cache folder: another number is measured anew
# A way other than the plain one must save this share of its time: less may be noise.
LEAST_SAVED = 0.05


class Slot(NamedTuple):
    """A layer of a model that can be computed in several ways.

    Attributes:
        layer: as it is now.
        kind: what it does, ``"3x3"``, ``"1x1"``, ``"1x1, sum"``, ``"fully connected"``, ...
        ways: name -> way, the plain one first; those that serve it here.
        put: replaces the layer wherever it stands in the model.
    """

    layer: Any
    kind: str
    ways: dict[str, Way]
    put: Callable[[nn.Module], None]

    @property
    def computed(self) -> Any:
        """The convolution or fc layer, of a sum too."""
        return getattr(self.layer, "convolution", self.layer)

    @property
    def dtype(self) -> torch.dtype:
        return self.computed.weight.dtype

    def key(self, shape: tuple[int, ...]) -> str:
        """What decides how long each way takes on input of this shape, in words."""
        layer = self.computed
        outputs, inputs = layer.weight.shape[:2]
        dtype = str(self.dtype).removeprefix("torch.")
        relu = ", ReLU" if has_relu(layer) else ""
        stride = layer.stride[0] if hasattr(layer, "stride") else 1
        if getattr(layer, "groups", 1) > 1:
            relu += f", {layer.groups} groups"
        if max(getattr(layer, "dilation", (1,))) > 1:
            relu += f", dilation {layer.dilation}"
        sides = "x".join(map(str, (*shape[:1], *shape[2:])))
        return f"{self.kind}/{stride}, {inputs} to {outputs}{relu}, {dtype}, on {sides}"


def slots_of(model: nn.Module, outside: set[nn.Module]) -> list[Slot]:
    """The layers with more than one way, but for those of ``outside``.

    Args:
        model: with folded norms and :class:`.residuals.ResidualBlock` for residual blocks.
        outside: modules that stay as they are.
    """
    found: dict[nn.Module, Slot] = {}
    for parent in model.modules():
        if parent in outside or isinstance(parent, DirectSum):
            continue
        for child in parent.children():
            if child in found or child in outside:
                continue
            slot = _slot(model, child)
            if slot is not None and len(slot.ways) > 1:
                found[child] = slot
    return list(found.values())


def _slot(model: nn.Module, layer: Any) -> Slot | None:
    if isinstance(layer, DirectSum):
        convolution = layer.convolution
        if not is_plain(convolution):
            return None
        kind = f"{_kernel(convolution)}, sum"
        ways = {name: way for name, way in SUMS.items() if way.serves(convolution)}
    elif isinstance(layer, nn.Conv2d) and is_plain(layer):
        kind = _kernel(layer)
        ways = {name: way for name, way in CONVOLUTIONS.items() if way.serves(layer)}
    elif isinstance(layer, FullyConnected):
        kind = "fully connected"
        ways = {name: way for name, way in FULLY_CONNECTED.items() if way.serves(layer)}
    else:
        return None
    return Slot(layer, kind, ways, partial(replace_module, model, layer))


def _kernel(convolution: nn.Conv2d) -> str:
    return "x".join(map(str, convolution.kernel_size))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in place of another wherever that stands in the model, in place."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):  # under each of its names
            if child is old:
                parent.add_module(name, new)
        # FeaturePyramid and Detectron2's ResNet iterate over plain lists beside their modules.
        for value in vars(parent).values():
            if isinstance(value, list) and any(item is old for item in value):
                value[:] = [new if item is old else item for item in value]


def _made(slot: Slot, name: str) -> nn.Module:
    return slot.ways[name].make(slot.computed).eval()


def from_table(slot: Slot) -> str:
    """The way that is usually fastest, by what held on AVX2 and on AVX-512 (results/speed-cpu)."""
    if "compiled winograd" in slot.ways:
        return "compiled winograd"
    if slot.kind == "3x3, sum" and "compiled" in slot.ways:
        return "compiled"
    if "winograd" in slot.ways and build.instructions() == "AVX512":
        return "winograd"
    return "packed" if "packed" in slot.ways else next(iter(slot.ways))


def choose_by_table(model: nn.Module, outside: set[nn.Module]) -> dict[str, int]:
    """Replace each layer by the table's way, in place; returns how many take which."""
    chosen: Counter[str] = Counter()
    for slot in slots_of(model, outside):
        name = from_table(slot)
        slot.put(_made(slot, name))
        chosen[f"{slot.kind}: {name}"] += 1
    return dict(chosen)


def choose_by_measurement(
    model: nn.Module, outside: set[nn.Module], inputs: str, run: Callable[[], Any]
) -> dict[str, int]:
    """Replace each layer by the fastest way here, in place; returns how many take which.

    Args:
        model: as for :func:`slots_of`.
        outside: modules that stay as they are.
        inputs: what the run computes on, in words: with other inputs it is another choice.
        run: runs the model once on them; not called for a model like one chosen for
            before. Layers that it does not reach take the table's way.
    """
    slots = slots_of(model, outside)
    known = _known()
    like = "; ".join([inputs, *(slot.key(()) for slot in slots)])
    models, layers = known.setdefault("models", {}), known.setdefault("layers", {})
    digest = hashlib.sha256(like.encode()).hexdigest()[:16]
    names = models.get(digest, [])
    fits = len(names) == len(slots)
    if not fits or not all(name in s.ways for name, s in zip(names, slots, strict=True)):
        names = models[digest] = _measured(slots, layers, run)
        _keep(known)
    chosen: Counter[str] = Counter()
    for slot, name in zip(slots, names, strict=True):
        slot.put(_made(slot, name))
        chosen[f"{slot.kind}: {name}"] += 1
    return dict(chosen)


def _measured(
    slots: list[Slot], layers: dict[str, dict[str, float]], run: Callable[[], Any]
) -> list[str]:
    """The fastest way of each; ``layers``, by key, gets the times of those that were not known."""
    shapes = _shapes(slots, run)
    names = []
    for slot in slots:
        shape = shapes.get(slot.layer)
        if shape is None:
            names.append(from_table(slot))
            continue
        key = slot.key(shape)
        if set(layers.get(key, {})) != set(slot.ways):
            layers[key] = _times(slot, shape)
        names.append(fastest(layers[key]))
    return names


def fastest(times: dict[str, float]) -> str:
    """The way of least time, or the first if that saves no more than noise.

    >>> fastest({"direct": 1.0, "winograd": 0.97, "compiled winograd": 1.2})
    'direct'
    >>> fastest({"direct": 1.0, "winograd": 0.7, "compiled winograd": 0.5})
    'compiled winograd'
    """
    plain = next(iter(times))
    best = min(times, key=lambda name: times[name])
    return best if times[best] < (1 - LEAST_SAVED) * times[plain] else plain


def _shapes(slots: list[Slot], run: Callable[[], Any]) -> dict[nn.Module, tuple[int, ...]]:
    """The largest input of each layer in a run of the model."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = tuple(inputs[0].shape)
        shapes[module] = max(shapes.get(module, ()), shape, key=lambda s: torch.Size(s).numel())

    hooks = [slot.layer.register_forward_pre_hook(record) for slot in slots]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: shape for module, shape in shapes.items() if 0 not in shape}


def _times(slot: Slot, shape: tuple[int, ...]) -> dict[str, float]:
    """Least milliseconds of each way, in turn, on random input of this shape.

    Whatever else runs on the machine makes a way slower, never faster.
    """
    made = {name: _made(slot, name) for name in slot.ways}
    x = torch.rand(shape).to(slot.dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            for name, module in made.items():
                inputs = (x, *_shortcut(slot, x))
                start = time.perf_counter()
                module(*inputs)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(min(all_but[1:]), 4) for name, all_but in times.items()}


def _shortcut(slot: Slot, x: torch.Tensor) -> Iterator[Any]:
    """The further arguments of a sum."""
    if not isinstance(slot.layer, DirectSum):
        return
    convolution = slot.computed
    shape = (len(x), convolution.out_channels, *x.shape[2:])
    yield torch.zeros(shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    yield True


def _cache_file() -> Path:
    found = kernels()
    facts = (
        *(_processor(), build.instructions(), torch.__version__, torch.get_num_threads()),
        build.library_file(build.instructions()).name if found else "",
        os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        MEASURES,
    )
    digest = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]
    return build.cache_folder() / f"choices-{digest}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _known() -> dict[str, dict[str, Any]]:
    """What was measured before: times by layer, ways by model. A damaged file counts as none."""
    try:
        known = json.loads(_cache_file().read_text())
        layers, models = known["layers"].items(), known["models"].items()
        return {
            "layers": {key: {name: float(time) for name, time in v.items()} for key, v in layers},
            "models": {key: [str(name) for name in names] for key, names in models},
        }
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def _keep(known: dict[str, dict[str, Any]]) -> None:
    others = _known()
    merged = {part: {**others.get(part, {}), **known[part]} for part in known}
    try:
        with replacing(_cache_file()) as stream:
            stream.write(json.dumps(merged, indent=1).encode())
    except (OSError, RuntimeError) as error:  # a RuntimeError: no home folder
        logger.warning("what was measured is not kept for the next time: %s", error)
