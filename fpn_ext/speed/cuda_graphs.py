"""A part of a model as a CUDA graph: experimental, never run on a GPU yet."""

import collections
from collections.abc import Callable
from typing import Any

import torch

MOST_GRAPHS = 8


class Recorded:
    """A function of tensors, captured as a CUDA graph for each set of input sizes.

    One argument: a tensor or a list of tensors. The result is overwritten by the next call with the
    same sizes.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function
        self.graphs: collections.OrderedDict[tuple, tuple] = collections.OrderedDict()

    def __call__(self, argument: Any) -> Any:
        tensors = [argument] if isinstance(argument, torch.Tensor) else list(argument)
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._record(argument, tensors)
            if len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        graph, inputs, outputs = self.graphs[key]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        graph.replay()
        return outputs

    def _record(self, argument: Any, tensors: list[torch.Tensor]) -> tuple:
        inputs = [torch.empty_like(t).copy_(t) for t in tensors]
        own = inputs[0] if isinstance(argument, torch.Tensor) else inputs
        # Warm up outside the capture: libraries initialise and choose their algorithms.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(own)
        return graph, inputs, outputs
