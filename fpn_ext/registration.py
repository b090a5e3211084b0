"""Registers the components with Detectron2 when its models are first imported, not before.

``import fpn_ext`` must register everything, yet ``--help``, or ``doctor`` on a broken installation,
must not import PyTorch. So ``import fpn_ext`` installs an import hook ahead of Python's finders:
before ``detectron2`` executes it applies the compatibility patches (:mod:`fpn_ext._d2_compat`), and
after ``detectron2.modeling`` it imports :mod:`fpn_ext.components`. If these are already imported,
both happen immediately. What Detectron2 gives to TorchScript is imported without the warning that
this is deprecated.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

from . import _d2_compat


def install() -> None:
    """Register the components as soon as Detectron2's registries exist."""
    # Only one, even after a reload: two of these finders would call each other forever.
    others = [finder for finder in sys.meta_path if not getattr(finder, "registers_fpn_ext", False)]
    sys.meta_path[:] = [_Finder(), *others]
    if "detectron2" in sys.modules:
        _make_importable()
    if "detectron2.modeling" in sys.modules:
        _register()


def _make_importable() -> None:
    _d2_compat.apply()


def _register() -> None:
    importlib.import_module("fpn_ext.components")


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and adds a callback before, around or after their execution."""

    registers_fpn_ext = True
    BEFORE: ClassVar[dict[str, Callable[[], None]]] = {"detectron2": _make_importable}
    WHILE: ClassVar[dict[str, Callable[[], AbstractContextManager[None]]]] = dict.fromkeys(
        _d2_compat.SCRIPTED_AT_IMPORT, _d2_compat.without_torchscript_warnings
    )
    AFTER: ClassVar[dict[str, Callable[[], None]]] = {"detectron2.modeling": _register}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(name in names for names in (self.BEFORE, self.WHILE, self.AFTER)):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        during = self.WHILE.get(name, nullcontext)
        spec.loader = _Loader(spec.loader, self.BEFORE.get(name), during, self.AFTER.get(name))
        return spec


class _Loader(Loader):
    """A loader with callbacks before, around and after it executes the module."""

    def __init__(
        self,
        loader: Any,
        before: Callable[[], None] | None,
        during: Callable[[], AbstractContextManager[None]],
        after: Callable[[], None] | None,
    ):
        self.loader = loader
        self.before = before
        self.during = during
        self.after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        if self.before is not None:
            self.before()
        with self.during():
            self.loader.exec_module(module)
        if self.after is not None:
            self.after()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)
