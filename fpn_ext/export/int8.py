"""An exported file with its network in eight bits, calibrated on pictures.

Layers with learned weights, convolutions and matrix products, compute in eight bits, and so do the
activation functions after them. All else stays in float32: anchors, decoding and clipping of boxes,
level mapping, RoIAlign, suppression. 255 steps over a picture of 1333 pixels are five pixels each,
and a box that is off by so much is another box, or is pooled from another level.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..reporting.only_errors import only_errors
from .formats import METADATA, check_installed
from .signal_stack import signal_stack_kept

# Of ONNX. An activation function joins the layer before it: eight bits then cover what comes out of
# both, and not what the function is about to cut off.
LEARNED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUNCTIONS = ("Relu", "Clip")
# The layers by OpenVINO's names.
LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")

# Writes the file: (its name, metadata).
Save = Callable[[Path, str], None]


class Pictures(Protocol):
    """What is calibrated on: the inputs of the graph for each picture, any number of times."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]: ...

    def __len__(self) -> int: ...


class Quantiser(NamedTuple):
    """How files of a format are quantised.

    Attributes:
        packages: without which they cannot be.
        extra: of pyproject.toml, that installs them.
        quantise: (file in float32, pictures).
    """

    packages: tuple[str, ...]
    extra: str
    quantise: Callable[[Path, Pictures], Save]


def require_int8(format_name: str) -> Quantiser:
    """How files of a format are quantised.

    Raises:
        ValueError: they are not.
        ImportError: a package is missing; says how to install it.
    """
    if format_name not in QUANTISERS:
        raise ValueError(
            f"--int8 is for --format {' and '.join(QUANTISERS)}, got --format {format_name}"
        )
    quantiser = QUANTISERS[format_name]
    check_installed(f"--int8 --format {format_name}", quantiser.packages, quantiser.extra)
    return quantiser


def _onnx(file: Path, pictures: Pictures) -> Save:
    """QuantizeLinear and DequantizeLinear around each layer, by ONNX Runtime's tool.

    Activations are unsigned with a zero point, weights signed with a scale for each output channel,
    of seven bits: a processor without VNNI adds two products in 16 bits, which eight would exceed.
    Operators that are no layers and no functions are not touched: with every sum and max pooling in
    eight bits, a detector found almost nothing.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=file.parent) as folder, _quietly():
        plain, out = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        # Folds norms into convolutions. Symbolic shapes fail where a size depends on a value.
        quant_pre_process(str(file), str(plain), skip_symbolic_shape=True)
        graph = onnx.load(str(plain)).graph
        layers = [node for node in graph.node if node.op_type in LEARNED]
        after = {name for node in layers for name in node.output}
        functions = [n for n in graph.node if n.op_type in FUNCTIONS and n.input[0] in after]
        quantize_static(
            str(plain),
            str(out),
            _reader([entry.name for entry in graph.input], pictures),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*LEARNED, *FUNCTIONS],
            nodes_to_quantize=[node.name for node in (*layers, *functions)],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(str(out))
    used = {node.domain for node in model.graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    assert {opset.domain for opset in opsets} == {""}, "an operator that ONNX does not have"
    del model.opset_import[:]  # the tool names domains that nothing is of
    model.opset_import.extend(opsets)

    def save(path: Path, metadata: str) -> None:
        onnx.helper.set_model_props(model, {METADATA: metadata})
        onnx.checker.check_model(model)
        onnx.save(model, str(path))

    return save


def _reader(names: Sequence[str], pictures: Pictures) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            arrays = next(self.left, None)
            return None if arrays is None else dict(zip(names, arrays, strict=True))

    return Reader()


def _openvino(file: Path, pictures: Pictures) -> Save:
    """FakeQuantize before each layer, and in the backbone before sums as well, by NNCF.

    NNCF corrects biases. It would also quantise what looks like a network's sums and products in
    the level mapping, which is therefore named, with all else that is no layer and no backbone.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(str(file))
    others = [
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() not in LAYERS
        and not operation.get_friendly_name().startswith("/backbone/")  # as of the ONNX file
    ]
    with _quietly(), signal_stack_kept():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(pictures, list),
            subset_size=len(pictures),
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
        )

    def save(path: Path, metadata: str) -> None:
        quantised.set_rt_info(metadata, METADATA)
        openvino.save_model(quantised, str(path), compress_to_fp16=False)

    return save


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the tools' own remarks on models that are not for them to judge."""
    with warnings.catch_warnings(), only_errors("", "nncf"):
        warnings.simplefilter("ignore")
        yield


QUANTISERS = {
    "onnx": Quantiser(("onnx", "onnxruntime"), "onnx", _onnx),
    "openvino": Quantiser(("onnx", "openvino", "nncf"), "int8", _openvino),
}
