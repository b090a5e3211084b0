"""Peak memory of a process that runs an exported detector, with neither PyTorch nor this package.

    python benchmarks/runtime_peak.py MODEL.onnx 480x640 --threads 2
    python benchmarks/runtime_peak.py MODEL.xml 480x640

Prints MiB of the process with the model, after a small image, and at the peak of two inferences of
the size, as whole_model.py measures the others. ONNX Runtime runs .onnx, OpenVINO .xml.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], Any]


def in_onnx_runtime(file: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def in_openvino(file: str, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: compiled([images])


def images_of(size: str) -> np.ndarray:
    height, _, width = size.partition("x")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, int(height), int(width)))
    return pixels.astype(np.float32)


def mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=".onnx or .xml, of one input: images (N, 3, H, W)")
    parser.add_argument("size", metavar="HxW")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    build = in_onnx_runtime if options.model.endswith(".onnx") else in_openvino
    run = build(options.model, options.threads)
    run(images_of("96x128"))
    images = images_of(options.size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = mib("VmRSS")
    for _ in range(2):
        run(images)
    print(json.dumps({"before": before, "peak": mib("VmHWM")}))


if __name__ == "__main__":
    main(sys.argv[1:])
