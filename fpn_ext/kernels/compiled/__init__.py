"""Kernels in C for AVX2 and AVX-512, where they could be compiled (:mod:`.build`)."""

from .operators import Kernels, kernels

__all__ = ["Kernels", "kernels"]
