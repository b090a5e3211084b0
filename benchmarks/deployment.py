r"""Speed of exported detectors: Faster R-CNN R-50 FPN in PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/deployment.py --rounds 5 --json results/speed-cpu/avx512/deployment.json
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/deployment.py
    python benchmarks/deployment.py --sizes 96x128 --rounds 1 --calibrated-at 192x256 \
        MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64

Sides, all with the same calibrated random weights (calibrated.py), on the same pixels:

- Detectron2, in PyTorch
- optimised: this project after fpn_ext.optimize_for_inference, in PyTorch
- torchvision: fasterrcnn_resnet50_fpn through torch.onnx.export, in both runtimes
- exported: this project's file of `fpn-ext export`, in both, also as of --int8, and in bfloat16
  where OpenVINO says that the processor has it (INFERENCE_PRECISION_HINT)

Each has up to 1000 anchors per level before suppression, 1000 proposals and 100 detections per
image, and leaves out scores under 0.05: Detectron2's defaults, and torchvision's. The table tells
how many of Detectron2's detections each has found; torchvision rounds its anchors and samples RoIs
otherwise. Eight bits are calibrated on images of the benchmark: the score of a trained detector in
eight bits is what `fpn-ext export --int8` and export_ap.py tell.

Mayaku 2.0.1 is no side: its export ends at the pyramid, and proposals, pooling and heads stay in
its Python, so that there is no whole detector to run.

All run in one process, in turn within every round after two that warm up; ratios are taken round by
round. --threads is PyTorch's, INFERENCE_NUM_THREADS and intra_op_num_threads; ONNX Runtime's
threads are told to stop spinning when a call ends, and not to take cores from the next side.

--memory also measures peak memory, of a process of its own for each of Detectron2, optimised and
the exported files (runtime_peak.py, without PyTorch).

With ONEDNN_MAX_CPU_ISA all sides are to be held to it. OpenVINO tells which primitives it runs: if
those of a convolution or a matrix product are above the limit, its sides are left out; what else is
above it (in 2026.4 elementwise kernels of its own) is in the report. Of fully connected layers it
tells nothing in float32 ("undef"). ONNX Runtime's own kernels cannot be held to it, and are left
out. So is what is not installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from calibrated import calibrated_weights  # imports fpn_ext, which comes before detectron2
from detectron2.modeling import build_model
from fpn_ext.export.formats import FORMATS, OPSET
from fpn_ext.export.graph import detector_graph
from fpn_ext.export.int8 import QUANTISERS
from fpn_ext.export.signal_stack import signal_stack_kept
from fpn_ext.reporting.json_files import write_json
from fpn_ext.reporting.measuring import markdown_table, measure, ratio, ratio_text
from fpn_ext.reporting.provenance import commit, hardware, versions
from fpn_ext.speed.optimize import has_bfloat16_convolutions
from sides import LeftOut, build_side, builtin_config, config, found_again, inputs_of
from whole_model import memory, pixels, size_argument

RUNTIMES = {"ONNX Runtime": "onnx", "OpenVINO": "openvino"}
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"
# In the names of OpenVINO's primitives, from the narrowest; jit_avx512 counts for all of AVX-512.
ISAS = ("sse", "avx", "avx2", "avx512", "amx")
LAYERS = ("Convolution", "FullyConnected", "MatMul")
CALIBRATION_IMAGES = 4

Call = Callable[[list[dict]], list]


class Writer:
    """Exported files in a folder, each written once.

    Args:
        weights: state dict of Detectron2's model.
        opts: ``KEY VALUE`` of all sides.
        size: of the images to record with and to calibrate on.
    """

    def __init__(self, folder: Path, weights: dict, opts: list[str], size: tuple[int, int]):
        self.folder, self.weights, self.opts, self.size = folder, weights, opts, size

    def file(self, what: str, format_name: str, int8: bool) -> Path:
        suffix = FORMATS[format_name].suffix
        file = self.folder / f"{what}_{format_name}{'_int8' if int8 else ''}{suffix}"
        if file.exists():
            return file
        if int8:
            save = QUANTISERS[format_name].quantise(self.file(what, format_name, False), self)
            save(file, "")
        elif what == "torchvision":
            self._torchvision(file, format_name)
        else:
            model = build_model(config("faster_rcnn_R_50_FPN_1x.yaml", "cpu", self.opts)).eval()
            model.load_state_dict(self.weights)
            form = FORMATS[format_name]
            graph = detector_graph(model, form.suppression()).eval()
            images = torch.stack([x["image"] for x in inputs_of(2, self.size)])
            form.write(graph, (images,), file, "")
        return file

    def _torchvision(self, file: Path, format_name: str) -> None:
        model = build_side("torchvision", self.weights, "cpu", self.opts).model
        onnx_file = file.with_suffix(".onnx")
        (entry,) = inputs_of(1, self.size)
        with torch.no_grad():
            torch.onnx.export(
                model,
                ([entry["image"]],),
                str(onnx_file),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["boxes", "labels", "scores"],
                dynamic_axes={"image": {1: "height", 2: "width"}},
            )
        if format_name == "openvino":
            import openvino

            converted = openvino.convert_model(str(onnx_file))
            openvino.save_model(converted, str(file), compress_to_fp16=False)

    def __len__(self) -> int:
        return CALIBRATION_IMAGES

    def __iter__(self) -> Any:
        return ((x["image"][None].numpy(),) for x in inputs_of(CALIBRATION_IMAGES, self.size))


def in_onnx_runtime(file: Path, threads: int) -> Callable[[Any], list]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def in_openvino(
    file: Path, threads: int, precision: str, report: dict[str, Any]
) -> Callable[[Any], list]:
    """How a file is run; what it runs of goes to ``report``.

    Raises:
        LeftOut: a layer is above ``ONEDNN_MAX_CPU_ISA``; OpenVINO cannot compile the file.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    try:
        with signal_stack_kept():
            compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    except RuntimeError as error:  # under a limit, in 2026.4: pooling in eight bits
        raise LeftOut(
            f"OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}"
        ) from error
    primitives = primitives_of(compiled)
    above = above_limit(primitives, os.environ.get(ISA_LIMIT, ""))
    layers = sorted({primitive for layer, primitive in above if layer in LAYERS})
    if layers:
        raise LeftOut(f"OpenVINO is not held to {ISA_LIMIT}: layers by {', '.join(layers)}")
    report["layers"] = _counts({k: n for k, n in primitives.items() if k[0] in LAYERS})
    report["above_the_limit"] = _counts(above)

    def run(array: Any) -> list:
        found = compiled([array])
        return [found[output] for output in compiled.outputs]

    return run


def primitives_of(compiled: Any) -> Counter:
    """How often OpenVINO runs each (layer type, primitive) of a model that it has compiled."""

    def text(node: Any, key: str) -> str:
        value = node.get_rt_info()[key]
        return str(getattr(value, "value", value))

    nodes = compiled.get_runtime_model().get_ordered_ops()
    return Counter((text(node, "layerType"), text(node, "primitiveType")) for node in nodes)


def above_limit(primitives: dict[tuple[str, str], int], limit: str) -> dict[tuple[str, str], int]:
    """Those whose instructions are wider than a value of ``ONEDNN_MAX_CPU_ISA``; "" is no limit."""
    highest = _isa(limit) if limit and limit.upper() not in ("ALL", "DEFAULT") else len(ISAS)
    return {key: count for key, count in primitives.items() if _isa(key[1]) > highest}


def _isa(name: str) -> int:
    """Its place in ISAS; -1 for none of them."""
    found = [i for i, isa in enumerate(ISAS) if isa in name.lower()]
    return max(found, default=-1)


def _counts(primitives: dict[tuple[str, str], int]) -> dict[str, int]:
    return {f"{layer}: {primitive}": n for (layer, primitive), n in sorted(primitives.items())}


def in_a_runtime(name: str, writer: Writer, threads: int, report: dict[str, Any]) -> Call:
    """A side by its name, ``WHAT, RUNTIME[, int8 | bfloat16]``.

    Raises:
        LeftOut: it cannot be had here.
    """
    what, runtime, *special = name.split(", ")
    format_name, int8 = RUNTIMES[runtime], special == ["int8"]
    packages = {*FORMATS[format_name].packages}
    packages |= {*QUANTISERS[format_name].packages} if int8 else set()
    missing = sorted(p for p in packages if importlib.util.find_spec(p) is None)
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")
    if runtime == "ONNX Runtime":
        if os.environ.get(ISA_LIMIT):
            raise LeftOut(f"ONNX Runtime's kernels cannot be held to {ISA_LIMIT}")
        run = in_onnx_runtime(writer.file(what, format_name, int8), threads)
    else:
        precision = "bf16" if special == ["bfloat16"] else "f32"
        if precision == "bf16" and not has_bfloat16():
            raise LeftOut("OpenVINO says that this processor has no bfloat16")
        run = in_openvino(
            writer.file(what, format_name, int8), threads, precision, report.setdefault(name, {})
        )
    is_torchvision = what == "torchvision"

    def infer(inputs: list[dict]) -> list:
        (entry,) = inputs
        image = entry["image"].numpy()
        found = [torch.from_numpy(x) for x in run(image if is_torchvision else image[None])]
        if is_torchvision:
            return [dict(zip(("boxes", "labels", "scores"), found, strict=True))]
        return [{"boxes": found[0], "scores": found[1], "labels": found[2] + 1}]

    return infer


def has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


EAGER = ("Detectron2", "optimised")
# What a user on a CPU would pick otherwise.
PEER = "torchvision, OpenVINO"
HALF_PEER = "exported, OpenVINO, bfloat16"  # in bfloat16
NAMES = (
    *("Detectron2", "optimised", "optimised, bfloat16"),
    *(f"torchvision, {runtime}" for runtime in RUNTIMES),
    *(f"exported, {runtime}" for runtime in RUNTIMES),
    HALF_PEER,
    *(f"exported, {runtime}, int8" for runtime in RUNTIMES),
)


def build(options: argparse.Namespace, writer: Writer, results: dict[str, Any]) -> dict[str, Call]:
    """The sides that can be had; the others go to ``left_out``, with the reason."""
    weights = writer.weights
    sides: dict[str, Call] = {}
    for name in [name for name in NAMES if name in options.sides]:
        try:
            if name.split(", ")[-1] in RUNTIMES or name.count(", ") == 2:
                threads = torch.get_num_threads()
                sides[name] = in_a_runtime(name, writer, threads, results["primitives"])
            else:
                if name.endswith("bfloat16") and not has_bfloat16_convolutions():
                    raise LeftOut("PyTorch has no convolutions in bfloat16 on this processor")
                sides[name] = build_side(name, weights, "cpu", options.opts).infer
        except LeftOut as reason:
            results["left_out"][name] = str(reason)
            print(f"left out: {name}: {reason}", flush=True)
    return sides


def rows_of(sides: dict[str, Call], size: str, rounds: int) -> list[dict]:
    inputs = inputs_of(1, pixels(size))
    calls = {name: (lambda infer=infer: infer(inputs)) for name, infer in sides.items()}
    times, found = measure(calls, rounds)
    return [
        {"size": size, "side": name, "ms": statistics.median(times[name])}
        | {"ms_range": [min(times[name]), max(times[name])]}
        | ratio(times, name, "Detectron2")
        | against(times, name, PEER)
        | (against(times, name, HALF_PEER, "half_peer_") if name.endswith("bfloat16") else {})
        | found_again(found[name], found["Detectron2"])
        for name in sides
    ]


def memory_rows(
    options: argparse.Namespace, writer: Writer, names: list[str], size: str
) -> list[dict]:
    """MiB of a process with the model, at the peak of inference, and between the two."""
    eager = [name for name in names if name in EAGER]
    rows = memory(writer.weights, "inference", size, eager, options)
    for name in [name for name in names if name not in EAGER]:
        _, runtime, *special = name.split(", ")
        file = writer.file("exported", RUNTIMES[runtime], special == ["int8"])
        command = [sys.executable, str(Path(__file__).with_name("runtime_peak.py")), str(file)]
        command += [size, "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"memory of {name}, {size}:\n{done.stderr}")
        figures = json.loads(done.stdout.splitlines()[-1])
        rows.append({"task": "inference", "size": size, "side": name, **figures})
    for row in rows:
        row["over_model"] = row["peak"] - row["before"]
        row["ratio"] = row["peak"] / rows[0]["peak"]  # of the process
    return rows


def against(
    times: dict[str, list[float]], side: str, peer: str, prefix: str = "peer_"
) -> dict[str, Any]:
    """The speedup over ``peer``, if that is a side."""
    if peer not in times:
        return {}
    return {f"{prefix}{key}": value for key, value in ratio(times, side, peer).items()}


def memory_table(rows: list[dict]) -> str:
    header = ["size", "side", "MiB with the model", "MiB at the peak", "of Detectron2's"]
    cells = [
        [
            *(r["size"], r["side"], f"{r['before']:.0f}", f"{r['peak']:.0f}"),
            f"{r['ratio']:.2f}",
        ]
        for r in rows
    ]
    return markdown_table(header, cells)


def table(rows: list[dict]) -> str:
    header = ["size", "side", "ms (min to max)", "times Detectron2 (min to max)"]
    header += [f"times {PEER} (min to max)"]
    header += ["detections found again", "their scores differ by"]
    cells = [
        [
            *(r["size"], r["side"], f"{r['ms']:.1f} ({r['ms_range'][0]:.1f} to "
            f"{r['ms_range'][1]:.1f})", ratio_text(r), ratio_text(r, "peer_ratio")),
            *(f"{r['found_again']} of {r['detections']}", f"{r['score_difference']:.1e}"),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, cells)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", type=size_argument, default=["480x640", "800x1333"], metavar="HxW")
    add("--calibrated-at", type=size_argument, default="800x1333", metavar="HxW")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, help="of every side; default: what PyTorch takes")
    add("--sides", nargs="+", choices=NAMES, default=NAMES, metavar="SIDE", help="of all: these")
    add("--memory", action="store_true", help="also peak memory")
    add("--json", type=Path, metavar="FILE")
    add("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config of all sides")
    options = parser.parse_intermixed_args(arguments)
    options.device = "cpu"
    options.sides = [NAMES[0], *options.sides]  # the others are compared with Detectron2
    return options


def about(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    words = list(arguments)
    if options.json:
        at = next(i for i, word in enumerate(words) if word.startswith("--json"))
        del words[at : at + (1 if "=" in words[at] else 2)]
    held = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "FPN_EXT_TUNE")
    return {
        "command": " ".join(["python benchmarks/deployment.py", *words]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {**versions(), **_versions_of_runtimes()},
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in held if name in os.environ},
        "rounds": options.rounds,
    }


def _versions_of_runtimes() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {
        **about(options, arguments),
        "primitives": {},
        "left_out": {},
        "rows": [],
        "memory": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        calibrated_at = pixels(options.calibrated_at)
        weights = calibrated_weights(builtin_config("cpu", options.opts), calibrated_at)
        writer = Writer(Path(folder), weights, options.opts, calibrated_at)
        sides = build(options, writer, results)
        for size in options.sizes:
            results["rows"] += rows_of(sides, size, options.rounds)
        print(table(results["rows"]))
        measured = [name for name in sides if name in EAGER or name.startswith("exported")]
        measured = [name for name in measured if not name.endswith("bfloat16")]
        for size in options.sizes if options.memory else ():
            results["memory"] += memory_rows(options, writer, measured, size)
            print(f"\n{memory_table(results['memory'])}")
    for name, report in results["primitives"].items():
        print(f"\n{name}: layers by {report.get('layers')}")
        if report.get("above_the_limit"):
            print(f"above {os.environ[ISA_LIMIT]}: {report['above_the_limit']}")
    if options.json:
        write_json(options.json, results)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
