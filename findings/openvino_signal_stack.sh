#!/bin/sh
# OpenVINO 2026.4.1: after two compiled models are released, the first compiled first, the thread's
# alternate signal stack is memory that is no longer mapped.
#
# Input: one model of a ReLU, compiled for the CPU twice; both kept, then released in the order in
# which they were made. sigaltstack(2) is asked after each step, /proc/self/maps at the end.
# Seen: the first compile_model registers an alternate signal stack, the second another one; releasing
# the first leaves the second's; releasing the second puts back the first's, whose memory has been
# unmapped. With one model, or released in the other order, there is none at the end, as before.
# CPython handles signals on the alternate stack, so that the next one it has a handler for (Ctrl-C is
# one) ends the process. Expected: none is registered once no model is left.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Linux on x86-64, a processor for which
# OpenVINO registers such a stack (seen with AVX-512), Python 3.10 to 3.14 with pip or uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="openvino==2026.4.1 numpy==2.2.6"
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
"$work/venv/bin/python" - <<'END'
import ctypes
import gc

import numpy as np
import openvino


class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack():
    """Its address; None if there is none."""
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return None if stack.flags & 2 else stack.memory


def is_mapped(address):
    ranges = (line.split()[0].split("-") for line in open("/proc/self/maps"))
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def released(order):
    """What is registered after two models have been made, and released in this order."""
    x = openvino.opset8.parameter([1, 3, 9, 9], np.float32)
    model = openvino.Model([openvino.opset8.relu(x)], [x])
    models = {name: openvino.Core().compile_model(model, "CPU") for name in ("first", "second")}
    for name in order:
        del models[name]
        gc.collect()
    return signal_stack()


assert signal_stack() is None
last_first = released(["second", "first"])
print("the second released first, registered at the end:", last_first)
left = released(["first", "second"])
print("the first released first, registered:", left is not None, "mapped:", left and is_mapped(left))
if last_first is not None or left is None or is_mapped(left):
    raise SystemExit("OpenVINO 2026.4.1 no longer behaves as described above")
END
echo "as described: what is registered is no longer mapped"
