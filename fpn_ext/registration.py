"""Registers the components with Detectron2 when its models are first imported, and not before.

``import fpn_ext`` must register everything, and a command's ``--help``, or the doctor of a broken
installation, must not import PyTorch for it. So ``import fpn_ext`` puts a finder in front of
Python's: before ``detectron2`` is executed it applies what an old one needs
(:mod:`fpn_ext._d2_compat`), and after ``detectron2.modeling`` it imports
:mod:`fpn_ext.components`. Where these are imported already, both happen at once.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar


def install() -> None:
    """Have the components registered as soon as Detectron2's registries are there."""
    # One, whatever was reloaded: that of a module that is gone would ask this one, and this one it.
    others = [finder for finder in sys.meta_path if not getattr(finder, "registers_fpn_ext", False)]
    sys.meta_path[:] = [_Finder(), *others]
    if "detectron2" in sys.modules:
        _make_importable()
    if "detectron2.modeling" in sys.modules:
        _register()


def _make_importable() -> None:
    importlib.import_module("fpn_ext._d2_compat").apply()


def _register() -> None:
    importlib.import_module("fpn_ext.components")


class _Finder(MetaPathFinder):
    """Finds what Python finds, with something to do before or after it is executed."""

    registers_fpn_ext = True
    BEFORE: ClassVar[dict[str, Callable[[], None]]] = {"detectron2": _make_importable}
    AFTER: ClassVar[dict[str, Callable[[], None]]] = {"detectron2.modeling": _register}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.BEFORE and name not in self.AFTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self.BEFORE.get(name), self.AFTER.get(name))
        return spec


class _Loader(Loader):
    """A loader, and what is called before and after it executes the module."""

    def __init__(
        self,
        loader: Any,
        before: Callable[[], None] | None,
        after: Callable[[], None] | None,
    ):
        self.loader = loader
        self.before = before
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
        self.loader.exec_module(module)
        if self.after is not None:
            self.after()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)
