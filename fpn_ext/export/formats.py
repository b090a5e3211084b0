"""The formats of an exported detector: how each file is written, and run by its own runtime."""

import contextlib
import importlib.util
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .graph import DetectorGraph
from .signal_stack import signal_stack_kept
from .suppression import OperatorSuppression, Suppression

METADATA = "fpn_ext"  # what of the file is ours: one JSON text
OPSET = 17  # of ONNX: RoiAlign has its half-pixel coordinates from 16

# Called with an array for each input of the graph; gives one for each output, in its order.
Run = Callable[..., list[np.ndarray]]


class Format(NamedTuple):
    """A file format.

    Attributes:
        suffix: of the file.
        packages: without which it can be neither written nor run beside the model.
        runtime: of them, those that a written file needs.
        extra: of pyproject.toml, that installs them.
        suppression: makes the graph's, for the runtime.
        write: (graph, examples, file, metadata); examples are the graph's inputs, of batch 2.
        load: opens a file and gives how it is run, and its metadata.
    """

    suffix: str
    packages: tuple[str, ...]
    runtime: tuple[str, ...]
    extra: str
    suppression: Callable[[], Suppression]
    write: Callable[[DetectorGraph, tuple[torch.Tensor, ...], Path, str], None]
    load: Callable[[Path], tuple[Run, str]]


def require(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none.
        ImportError: a package is missing, or PyTorch too old; says how to install it.
    """
    if name not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {name!r}")
    form = FORMATS[name]
    check_installed(f"--format {name}", form.packages, form.extra)
    if name == "pt2" and not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ImportError(
            f"--format pt2 needs PyTorch 2.6, whose torch.export finds out how sizes depend on one "
            f"another, got {torch.__version__}: pip install 'torch>=2.6' torchvision"
        )
    return form


def check_installed(option: str, packages: Sequence[str], extra: str) -> None:
    """Raise ImportError, with the line that installs them, unless an option's packages are here."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{option} needs {' and '.join(missing)}, not installed: pip install "
            f"{' '.join(missing)} (pip install -e '.[{extra}]' in a checkout)"
        )


def load_exported(file: Path) -> tuple[Run, dict[str, Any]]:
    """How a file that was exported is run, and what it says of itself.

    Args:
        file: of :func:`fpn_ext.export.write.export`; its suffix tells the format.

    Returns:
        A function of NumPy arrays, one for each of ``metadata["inputs"]``, that returns those of
        ``metadata["outputs"]``; and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the runtime is not installed.
        ValueError: another suffix, or a file that was not exported from here.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    names = {form.suffix: name for name, form in FORMATS.items()}
    if file.suffix not in names:
        raise ValueError(f"{file}: an exported detector ends with {', '.join(names)}")
    form = FORMATS[names[file.suffix]]
    check_installed(str(file), form.runtime, form.extra)
    run, metadata = form.load(file)
    if not metadata:
        raise ValueError(f"{file} was not written by fpn-ext export: it has no metadata of it")
    return run, json.loads(metadata)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """No gradients; what exporters say of branches on shapes, and of their own age, is not shown.

    What was recorded is compared with eager at several sizes, which finds a wrong branch.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def record_onnx(
    module: nn.Module,
    examples: tuple[torch.Tensor, ...],
    file: Path,
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
) -> None:
    """Write a module as ONNX by tracing it, the exporter that takes whole detectors.

    Args:
        inputs: names of the inputs, and of those of their dimensions that vary.
        outputs: the same of the outputs.
    """
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    with _recording():
        torch.onnx.export(
            module,
            examples,
            str(file),
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: axes for name, axes in {**inputs, **outputs}.items() if axes},
            **options,
        )


_INPUTS = {
    "images": {0: "batch", 2: "height", 3: "width"},
    "proposals": {0: "batch", 1: "proposals_per_image"},
}


def _write_onnx(
    graph: DetectorGraph, examples: tuple[torch.Tensor, ...], file: Path, metadata: str
) -> None:
    import onnx

    outputs = {name: {0: "detections"} for name in graph.outputs}
    inputs = {name: _INPUTS[name] for name in graph.inputs}
    record_onnx(graph, examples, file, inputs, outputs)
    model = onnx.load(str(file))
    others = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    assert not others, f"operators of {others}"
    onnx.helper.set_model_props(model, {METADATA: metadata})
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _load_onnx(file: Path) -> tuple[Run, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, arrays, strict=True)))

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA, "")


def _write_openvino(
    graph: DetectorGraph, examples: tuple[torch.Tensor, ...], file: Path, metadata: str
) -> None:
    import openvino

    by_way_of = file.with_suffix(".onnx")
    _write_onnx(graph, examples, by_way_of, metadata)
    model = openvino.convert_model(str(by_way_of))
    by_way_of.unlink()
    model.set_rt_info(metadata, METADATA)
    openvino.save_model(model, str(file), compress_to_fp16=False)


def _load_openvino(file: Path) -> tuple[Run, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(file))
    # Where a CPU has bfloat16, OpenVINO computes in it unless told.
    with signal_stack_kept():
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        found = compiled(list(arrays))
        return [np.array(found[output]) for output in compiled.outputs]

    has_metadata = model.has_rt_info(METADATA)
    return run, str(model.get_rt_info(METADATA).value) if has_metadata else ""


def _write_torchscript(
    graph: DetectorGraph, examples: tuple[torch.Tensor, ...], file: Path, metadata: str
) -> None:
    # By way of memory: where a disk is full, torch (2.15.0) ends the process, with no exception.
    archive = io.BytesIO()
    with _recording():
        traced = torch.jit.trace(graph, examples, check_trace=False)
        torch.jit.save(traced, archive, _extra_files={METADATA: metadata})
    file.write_bytes(archive.getbuffer())


def _load_torchscript(file: Path) -> tuple[Run, str]:
    metadata = {METADATA: ""}
    with _recording():
        module = torch.jit.load(str(file), map_location="cpu", _extra_files=metadata)
    return _run_in_torch(module), _text(metadata[METADATA])


def _write_pt2(
    graph: DetectorGraph, examples: tuple[torch.Tensor, ...], file: Path, metadata: str
) -> None:
    shapes = [dict.fromkeys(_INPUTS[name], torch.export.Dim.DYNAMIC) for name in graph.inputs]
    archive = io.BytesIO()  # as for TorchScript
    with _recording():
        program = torch.export.export(graph, examples, dynamic_shapes=tuple(shapes))
        torch.export.save(program, archive, extra_files={METADATA: metadata})
    file.write_bytes(archive.getbuffer())


def _load_pt2(file: Path) -> tuple[Run, str]:
    metadata = {METADATA: ""}
    with _recording():
        program = torch.export.load(str(file), extra_files=metadata)
    return _run_in_torch(program.module()), _text(metadata[METADATA])


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _run_in_torch(module: Callable[..., Sequence[torch.Tensor]]) -> Run:
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in module(*(torch.from_numpy(a) for a in arrays))]

    return run


FORMATS = {
    "onnx": Format(
        ".onnx",
        ("onnx", "onnxruntime"),
        ("onnxruntime",),
        "onnx",
        lambda: OperatorSuppression(drops_equal=False),
        _write_onnx,
        _load_onnx,
    ),
    "openvino": Format(
        ".xml",
        ("onnx", "openvino"),
        ("openvino",),
        "openvino",
        lambda: OperatorSuppression(drops_equal=True),
        _write_openvino,
        _load_openvino,
    ),
    "torchscript": Format(".pt", (), (), "", Suppression, _write_torchscript, _load_torchscript),
    "pt2": Format(".pt2", (), (), "", Suppression, _write_pt2, _load_pt2),
}
