"""Arithmetic that makes pyramid and pooling fast: RoIAlign, Winograd's convolution, threads."""
