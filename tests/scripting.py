"""Detectron2's TorchScript export."""

import fpn_ext  # noqa: F401, before detectron2
import detectron2.export.torchscript


def detectron2_scripting():
    """detectron2.export.torchscript."""
    return detectron2.export.torchscript
