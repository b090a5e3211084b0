"""Detectron2's TorchScript export, which v0.6 cannot import with current PyTorch."""

import importlib
import sys
import types
from pathlib import Path

import detectron2


def detectron2_scripting():
    """detectron2.export.torchscript, past v0.6's package file, which asks for caffe2."""
    try:
        return importlib.import_module("detectron2.export.torchscript")
    except ImportError:
        package = types.ModuleType("detectron2.export")
        package.__path__ = [str(Path(detectron2.__file__).parent / "export")]
        sys.modules["detectron2.export"] = package
        scripting = importlib.import_module("detectron2.export.torchscript")
        package.scripting_with_instances = scripting.scripting_with_instances
        return scripting
