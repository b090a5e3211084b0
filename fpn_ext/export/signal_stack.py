"""The alternate signal stack of a thread, kept as it was while another library sets its own.

OpenVINO (2026.4.1) registers one with each model that it compiles, and puts the one before back as
the model is released. Of two models, the first released first, the second puts back memory that is
gone, and the next signal that Python handles, Ctrl-C among them, ends the process by SIGSEGV
(``findings/openvino_signal_stack.sh``). If each finds none, there is none to put back.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _Stack(ctypes.Structure):  # stack_t of Linux
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """A block after which this thread's alternate signal stack is the one of before.

    Elsewhere than on Linux nothing is done.
    """
    if sys.platform != "linux":
        yield
        return
    sigaltstack, before = ctypes.CDLL(None).sigaltstack, _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
