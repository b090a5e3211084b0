"""Fast kernels for pyramid and pooling: RoIAlign, Winograd convolution, threading."""
