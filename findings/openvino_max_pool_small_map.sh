#!/bin/sh
# OpenVINO 2026.4.1: MaxPool with ceil_mode raises on a map smaller than its kernel, where ONNX
# Runtime 1.32.0 and PyTorch give the maximum of what is there.
#
# Input: an ONNX model (opset 17) of one MaxPool, kernel 2 x 2, stride 2, ceil_mode 1, height and
# width free, run on maps of 1 x 1 and 3 x 3.
# Seen: ONNX Runtime gives 1 x 1 and 2 x 2. OpenVINO gives the same 2 x 2, and on 1 x 1 raises
# RuntimeError: "Check 'cmp::le(kernel, dim.get_length())' failed". A pyramid that halves its coarser
# maps by such a pooling, as BiFPN, is converted, and fails on small images. Expected: 1 x 1.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Python 3.11 to 3.14 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6"
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    # shellcheck disable=SC2086
    uv pip install -q --python "$work/venv/bin/python" $packages
else
    "$python" -m venv "$work/venv"
    # shellcheck disable=SC2086
    "$work/venv/bin/python" -m pip install -q $packages
fi
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import numpy as np
import onnx
import onnxruntime
import openvino

node = onnx.helper.make_node(
    "MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1
)
x, y = (
    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, None, None])
    for name in ("x", "y")
)
graph = onnx.helper.make_graph([node], "pooling", [x], [y])
opset = onnx.helper.make_opsetid("", 17)
onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), "pooling.onnx")
session = onnxruntime.InferenceSession("pooling.onnx", providers=["CPUExecutionProvider"])
compiled = openvino.compile_model(openvino.convert_model("pooling.onnx"), "CPU")
seen = []
for side in (1, 3):
    values = np.arange(side * side, dtype=np.float32).reshape(1, 1, side, side)
    (expected,) = session.run(None, {"x": values})
    try:
        found = "the same" if np.array_equal(compiled([values])[0], expected) else "another"
    except RuntimeError as error:
        found = "raises"
        print(str(error).strip().splitlines()[-1])
    print(f"{side} x {side}: ONNX Runtime {expected.tolist()}, OpenVINO {found}")
    seen.append((expected.shape[2:], found))
if seen != [((1, 1), "raises"), ((2, 2), "the same")]:
    raise SystemExit("OpenVINO 2026.4.1 and ONNX Runtime 1.32.0 no longer behave as described above")
END
echo "as described: OpenVINO raises on a map smaller than the kernel"
