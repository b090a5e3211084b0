"""Whether an exporter is recording a graph, in which tricks of eager mode have no place.

ONNX's exporter by tracing drops a sum that is written through a view, without a word; torch.export
takes a size on which a branch depends for a constant. Whatever depends on memory or on sizes asks
here first, and takes a plain path that every exporter reads alike.
"""

import torch


@torch.jit.unused
def records_a_graph() -> bool:
    """Whether torch.jit.trace, torch.export, torch.compile or an ONNX exporter runs this code.

    torch.jit.script compiles code rather than running it: ask ``torch.jit.is_scripting()`` first.

    >>> records_a_graph()
    False
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
