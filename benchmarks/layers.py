"""Where the time of an optimised model goes, and what a matrix product of that size would take.

    python benchmarks/layers.py --json results/speed-cpu/avx512/layers.json
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/layers.py --json results/speed-cpu/avx2-emulated/layers.json

Faster R-CNN R-50 FPN, optimised, with calibrated random weights (calibrated.py). Each layer is
timed where it stands, in whole runs of the model; layers are added up by kind. GFLOP/s counts the
multiplications and additions of the direct sums, also where Winograd's algorithm has fewer. Beside
them is the rate of torch's product of two matrices of 2048 x 2048, measured in every round: what a
1x1 convolution or a fully connected layer cannot exceed by much, whoever computes it.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import fpn_ext
import torch
from calibrated import calibrated_weights
from detectron2.modeling import build_model
from fpn_ext.kernels.winograd import WinogradConv2d
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.provenance import command_line, commit, hardware, versions
from fpn_ext.speed import layers
from fpn_ext.speed.residuals import DirectSum
from sides import builtin_config, config
from torch import nn
from whole_model import pixels, size_argument

CALIBRATED_AT = (800, 1333)
SIDE = 2048  # of the matrices that are multiplied for comparison
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
OTHER, WHOLE = "everything else", "the whole model"


def optimised(size: tuple[int, int]) -> nn.Module:
    cfg = config("faster_rcnn_R_50_FPN_1x.yaml", "cpu", [])
    cfg.MODEL.WEIGHTS = ""
    model = build_model(cfg).eval()
    model.load_state_dict(calibrated_weights(builtin_config("cpu", []), CALIBRATED_AT))
    return fpn_ext.optimize_for_inference(model, typical_size=size)


def layers_of(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[nn.Module]:
    """The outermost modules of these kinds."""
    for child in model.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from layers_of(child, kinds)


def kind_of(layer: nn.Module, x: torch.Tensor, result: torch.Tensor) -> tuple[str, float]:
    """What a layer is, in words, and its direct sums' GFLOP."""
    inner = getattr(layer, "convolution", layer)
    by_winograd = isinstance(inner, layers.CompiledWinograd | WinogradConv2d)
    if x.dim() == 2:
        return "fully connected", 2e-9 * result.numel() * x.shape[1]
    side = 3 if by_winograd else weight_side(inner)
    how = " by Winograd" if by_winograd else ""
    return f"{side}x{side}{how}", 2e-9 * result.numel() * x.shape[1] * side * side


def weight_side(layer: Any) -> int:
    """Of a convolution's filter; 1 where the weights are packed for a matrix product."""
    weight = getattr(layer, "weight", getattr(layer, "packed", None))
    return int(weight.shape[-1]) if weight is not None else 1


@contextlib.contextmanager
def timed(model: nn.Module, into: dict[str, list[float]]) -> Iterator[None]:
    """Within the block, every call of a layer adds milliseconds, GFLOP and 1 to its kind."""
    starts: dict[nn.Module, float] = {}
    own = [v for v in vars(layers).values() if isinstance(v, type) and issubclass(v, nn.Module)]
    computed = [kind for kind in own if kind is not layers.Rows]  # which is a view
    kinds = (*computed, nn.Conv2d, nn.Linear, DirectSum, WinogradConv2d)

    def begin(layer: nn.Module, inputs: Any) -> None:
        starts[layer] = time.perf_counter()

    def end(layer: nn.Module, inputs: Any, result: torch.Tensor) -> None:
        spent = 1e3 * (time.perf_counter() - starts.pop(layer))
        kind, flops = kind_of(layer, inputs[0], result)
        for i, value in enumerate((spent, flops, 1)):
            into[kind][i] += value

    hooks = []
    for layer in set(layers_of(model, kinds)):
        hooks.append(layer.register_forward_pre_hook(begin))
        hooks.append(layer.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def one_round(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{kind: [ms, GFLOP, number of calls]} of a run, with what is left over, and its whole."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    with timed(model, found):
        start = time.perf_counter()
        model(inputs)
        whole = 1e3 * (time.perf_counter() - start)
    number = sum(calls for _, _, calls in found.values())
    found[OTHER] = [whole - sum(ms for ms, _, _ in found.values()), 0.0, 0]
    found[WHOLE] = [whole, sum(flops for _, flops, _ in found.values()), number]
    return dict(found)


def product_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """GFLOP/s of torch's matrix product."""
    start = time.perf_counter()
    torch.mm(a, b)
    return 2e-9 * SIDE**3 / (time.perf_counter() - start)


def measured(size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Medians at a size of input."""
    model = optimised(size)
    image = torch.randint(0, 256, (3, *size)).float()
    inputs = [{"image": image, "height": size[0], "width": size[1]}]
    a, b = torch.rand(2, SIDE, SIDE)
    found, rates = [], []
    with torch.inference_mode():
        for _ in range(1 + rounds):
            found.append(one_round(model, inputs))
            rates.append(product_rate(a, b))
    found, rates = found[1:], rates[1:]
    rows = []
    for kind, (_, flops, calls) in found[0].items():
        ms = statistics.median(of_round[kind][0] for of_round in found)
        row = {"kind": kind, "calls": calls, "ms": ms, "gflop": flops}
        rows.append({**row, "gflops": 1e3 * flops / ms})
    return {
        "product_gflops": statistics.median(rates),
        "rows": sorted(rows, key=lambda row: -row["ms"]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", type=size_argument, default=["480x640", "800x1333"], metavar="HxW")
    add("--rounds", type=int, default=7)
    add("--json", metavar="FILE")
    options = parser.parse_args(argv)
    record = {
        "about": {
            **{"command": command_line(), "commit": commit(), "hardware": hardware()},
            **{"versions": versions(), "threads": torch.get_num_threads()},
            "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
            "rounds": options.rounds,
        },
        "sizes": {size: measured(pixels(size), options.rounds) for size in options.sizes},
    }
    print(json.dumps(record, indent=1))
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    main()
