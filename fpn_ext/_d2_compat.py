"""Lets Detectron2 v0.6's Python tree run, uncompiled, with current NumPy and Pillow.

All monkey-patching happens here. Each v0.6 patch is tied to the Detectron2 source line that needs
it, and skipped if that line is absent (Detectron2's main branch) or if the missing name exists (a
compiled Detectron2, an older NumPy or Pillow). On an uncompiled Detectron2 of any version, rotated
operators are stubbed to raise an error with the remedy. Without pkg_resources, which setuptools 82
removed, the model zoo gets a stand-in for the one function it uses, and without caffe2, which
PyTorch removed, ``detectron2.export`` gets stand-ins for what asks for it. On a healthy
installation :func:`apply` therefore changes nothing; it returns the names of the patches applied.

It must run before the first ``import detectron2...`` of a process: ``import fpn_ext`` first.

Distributed runs also call :func:`create_local_process_group`, after joining.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import importlib.resources
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_REMEDY = (
    "This Detectron2 was installed without its compiled operators (rotated boxes and deformable "
    "convolution need them). Remedy: build Detectron2 from source (docs/start/install.md, "
    "'Your own Detectron2'), or take the option that asks for it out of the config."
)


def needs_compiled_operator(name: str) -> NoReturn:
    """Raise the error for a missing compiled operator."""
    raise RuntimeError(f"detectron2._C.{name} is not available. {_REMEDY}")


class _UncompiledOperators(types.ModuleType):
    """Stands in for ``detectron2._C``: importable; using an operator raises with the remedy."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: needs_compiled_operator(name)

    # The next three are what detectron2.utils.collect_env prints at the start of every run.
    @staticmethod
    def get_compiler_version() -> str:
        return "none (Detectron2 without compiled operators)"

    get_cuda_version = get_compiler_version

    @staticmethod
    def has_cuda() -> bool:
        return False


def detectron2_folder() -> Path:
    """Folder of the installed Detectron2, found without importing it.

    Raises:
        ModuleNotFoundError: Detectron2 is not installed; says how to get it.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "fpn_ext needs Detectron2, which is not installed in this Python "
            f"({sys.executable}). It has no release on PyPI, so that nothing brings it along: "
            "run `make setup` in a checkout of this project, or install Detectron2 from source "
            "(docs/start/install.md, 'Your own Detectron2'). `fpn-ext doctor` gives the command."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def has_compiled_operators() -> bool:
    """Whether Detectron2's C++/CUDA module is installed (checked without loading it)."""
    folder = detectron2_folder()
    return any((folder / f"_C{s}").is_file() for s in importlib.machinery.EXTENSION_SUFFIXES)


def version(folder: Path) -> str:
    """Of the Detectron2 in a folder, without importing it; for 0.6, which of the two it is.

    Main has called itself 0.6 ever since; it is told from the tag v0.6 by its ``after_backward``.

    Args:
        folder: as :func:`detectron2_folder` finds it.

    Returns:
        E.g. "0.6 (tag)", or "0.6, after the tag (main)".
    """
    file = folder / "__init__.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r'^__version__ = "(.*)"', text, re.M)
    if found is None:
        return "of unknown version"
    if found[1] != "0.6":
        return found[1]
    is_main = _source_has(folder, "engine/train_loop.py", "def after_backward(")
    return "0.6, after the tag (main)" if is_main else "0.6 (tag)"


def apply() -> list[str]:
    """Apply the patches this Detectron2 needs; returns their names, [] on a healthy one."""
    folder = detectron2_folder()
    applied = []
    if _source_has(folder, "model_zoo/model_zoo.py", "import pkg_resources"):
        applied += _stand_in_for_pkg_resources()
    if _source_has(folder, "data/transforms/transform.py", "Image.LINEAR"):
        applied += _restore_pillow_linear()
    if _source_has(folder, "data/build.py", "np.int)"):
        applied += _restore_numpy_aliases()
    if _source_has(folder, "export/api.py", "\nfrom caffe2.proto import"):
        applied += _stand_in_for_caffe2()
    if not has_compiled_operators():
        applied += _define_missing_torch_operators()
        if (
            _source_has(folder, "layers/rotated_boxes.py", "from detectron2 import _C")
            and "detectron2._C" not in sys.modules
        ):
            applied += _stand_in_for_compiled_operators()
    return applied


def _source_has(folder: Path, file: str, text: str) -> bool:
    path = folder / file
    return path.is_file() and text in path.read_text(encoding="utf-8")


_MODEL_ZOO = "detectron2.model_zoo.model_zoo"


class _ModelZooFinder(importlib.abc.MetaPathFinder):
    """Finds the one module of Detectron2 that asks for pkg_resources, where it is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODEL_ZOO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin:
            spec.loader = _ModelZooLoader(name, spec.origin)
        return spec


class _ModelZooLoader(importlib.machinery.SourceFileLoader):
    """Lends the module a pkg_resources, while it is imported, where none can be imported.

    Not for longer: other packages ask whether there is one, and go another way without.
    """

    def exec_module(self, module: types.ModuleType) -> None:
        try:
            with warnings.catch_warnings():
                # The setuptools that still have it say so, to nobody who could change it.
                warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
                import pkg_resources  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError:
            stand_in = types.ModuleType("pkg_resources")
            stand_in.__dict__["resource_filename"] = _resource_filename
            sys.modules["pkg_resources"] = stand_in
            try:
                super().exec_module(module)
            finally:
                del sys.modules["pkg_resources"]
        else:
            super().exec_module(module)


def _resource_filename(package: str, resource: str) -> str:
    return str(importlib.resources.files(package) / resource)


def _stand_in_for_pkg_resources() -> list[str]:
    if any(type(finder) is _ModelZooFinder for finder in sys.meta_path):
        return []
    sys.meta_path.insert(0, _ModelZooFinder())
    return ["pkg_resources"]


_EXPORT_API = "detectron2.export.api"


class _ExportFinder(importlib.abc.MetaPathFinder):
    """Finds the one module that keeps detectron2.export from being imported, where it is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _EXPORT_API:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin:
            spec.loader = _WithoutCaffe2(name, spec.origin)
        return spec


class _WithoutCaffe2(importlib.machinery.SourceFileLoader):
    """Gives the names that the module exports; using one raises an error with the remedy."""

    def exec_module(self, module: types.ModuleType) -> None:
        names = re.search(r"^__all__ = (\[.*?\])", Path(self.path).read_text("utf-8"), re.M | re.S)
        module.__dict__["__all__"] = ast.literal_eval(names[1]) if names else []
        for name in module.__dict__["__all__"]:
            module.__dict__[name] = functools.partial(_needs_caffe2, name)


def _needs_caffe2(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ImportError(
        f"detectron2.export.{name} needs caffe2, which PyTorch no longer has. `fpn-ext export` "
        "writes ONNX, OpenVINO, TorchScript and .pt2 files (docs/guides/deploying.md)"
    )


def _stand_in_for_caffe2() -> list[str]:
    is_there = any(type(finder) is _ExportFinder for finder in sys.meta_path)
    if is_there or importlib.util.find_spec("caffe2") is not None:
        return []
    sys.meta_path.insert(0, _ExportFinder())
    return ["caffe2"]


def _restore_pillow_linear() -> list[str]:
    from PIL import Image

    if hasattr(Image, "LINEAR"):
        return []
    Image.LINEAR = Image.BILINEAR  # type: ignore[attr-defined]  # the same filter, renamed
    return ["PIL.Image.LINEAR"]


def _restore_numpy_aliases() -> list[str]:
    import numpy as np

    # vars(), because getattr of a removed NumPy name warns or raises.
    missing = [alias for alias in (int, float, bool, str) if alias.__name__ not in vars(np)]
    for alias in missing:
        setattr(np, alias.__name__, alias)
    return [f"numpy.{alias.__name__}" for alias in missing]


def _stand_in_for_compiled_operators() -> list[str]:
    from pycocotools.cocoeval import COCOeval

    sys.modules["detectron2._C"] = _UncompiledOperators("detectron2._C", _REMEDY)

    # COCOEvaluator imports this name at module level and uses it by default; it reimplements
    # pycocotools' class.
    fast_eval_api = types.ModuleType("detectron2.evaluation.fast_eval_api")
    fast_eval_api.__dict__["COCOeval_opt"] = COCOeval
    sys.modules["detectron2.evaluation.fast_eval_api"] = fast_eval_api
    return ["detectron2._C", "detectron2.evaluation.fast_eval_api"]


# Operators that Detectron2 calls through torch.ops, where a missing one is a bare AttributeError:
# v0.6 calls the first, main all of them.
_TORCH_OPERATORS = {
    "nms_rotated": "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "roi_align_rotated_forward": "(Tensor input, Tensor rois, float spatial_scale, "
    "int pooled_height, int pooled_width, int sampling_ratio) -> Tensor",
}
_library: Any = None  # a torch Library unregisters its operators when garbage-collected


def _define_missing_torch_operators() -> list[str]:
    global _library
    import torch

    if _library is not None:
        return []
    _library = torch.library.Library("detectron2", "FRAGMENT")
    for name, signature in _TORCH_OPERATORS.items():
        _library.define(name + signature)
        _library.impl(
            name,
            lambda *args, name=name: needs_compiled_operator(name),
            "CompositeImplicitAutograd",
        )
    return ["torch.ops.detectron2"]


# What fvcore and every Detectron2 hand to torch.jit.script as they are imported.
SCRIPTED_AT_IMPORT = ("fvcore.nn.focal_loss", "detectron2.modeling.box_regression")


@contextmanager
def without_torchscript_warnings() -> Iterator[None]:
    """Hides that ``torch.jit.script`` is deprecated, or not supported from Python 3.14 on.

    For the import of :data:`SCRIPTED_AT_IMPORT`, which no user can do anything about. Everywhere
    else the warning reaches the user, whose use of TorchScript it then is.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".?torch\.jit\.script")
        yield


def create_local_process_group(per_machine: int) -> None:
    """Tell Detectron2's ``comm`` which processes share a machine; every process calls this.

    Args:
        per_machine: number of consecutive ranks on each machine.
    """
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):  # main
        comm.create_local_process_group(per_machine)
        return
    import torch.distributed as dist

    # As v0.6's launcher does in the processes it starts.
    for first in range(0, dist.get_world_size(), per_machine):
        group = dist.new_group(list(range(first, first + per_machine)))
        if first <= dist.get_rank() < first + per_machine:
            comm._LOCAL_PROCESS_GROUP = group
