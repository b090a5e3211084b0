"""What the functions of kernels.c take: its structs, field by field."""

import ctypes


class Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("maps", "filters", "bias", "zeros")),
        *((name, ctypes.c_void_p) for name in ("result", "shared", "scratch")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("outputs", "tiles_at_once")),
        *((name, ctypes.c_int32) for name in ("relu", "threads")),
    ]


class Filters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "result")),
        *((name, ctypes.c_int64) for name in ("outputs", "channels")),
        ("strides", ctypes.c_int64 * 4),
        ("threads", ctypes.c_int32),
    ]


class FilterGradient(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("maps", "gradients", "zeros")),
        *((name, ctypes.c_void_p) for name in ("result", "products", "scratch")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("outputs", "tiles_at_once")),
        ("threads", ctypes.c_int32),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "panels", "bias", "added")),
        *((name, ctypes.c_void_p) for name in ("result", "scratch")),
        *((name, ctypes.c_int64) for name in ("count", "depth", "outputs", "height", "width")),
        *((name, ctypes.c_int64) for name in ("full_height", "full_width", "stride")),
        *((name, ctypes.c_int64) for name in ("rows_at_once", "columns_at_once")),
        ("depth_at_once", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("relu", "threads")),
    ]


class Pooling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("maps", "heights", "widths", "scales", "boxes")),
        *((name, ctypes.c_void_p) for name in ("level", "result", "scratch")),
        *((name, ctypes.c_int64) for name in ("count", "channels", "bins_y", "bins_x")),
        ("scratch_size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("sampling_ratio", "aligned", "half", "threads")),
    ]


class MaxPooling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("maps", "result")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels")),
        *((name, ctypes.c_int32) for name in ("half", "threads")),
    ]
