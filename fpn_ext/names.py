"""Finding what a name in YAML stands for, and saying what was meant when it stands for nothing."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The valid names nearest to a wrong one, as the end of an error message.

    >>> did_you_mean("FeaturePyramide", ["FeaturePyramid", "build_resnet_backbone"])
    "nearest valid: 'FeaturePyramid'"
    >>> did_you_mean("x", ["FeaturePyramid", "build_resnet_backbone"])
    "valid: 'FeaturePyramid', 'build_resnet_backbone'"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    label = "nearest valid" if near else "valid"
    return f"{label}: " + (", ".join(repr(n) for n in near or names) or "(none)")


def look_up(registry: Any, name: str, yaml_key: str) -> Any:
    """What is registered under ``name`` in a Detectron2 registry.

    Raises:
        ValueError: nothing is; names the YAML key to change and the nearest valid names.
    """
    if name not in registry:
        raise ValueError(
            f"{yaml_key}: {name!r} is not registered; "
            + did_you_mean(name, [registered for registered, _ in registry])
            + ". If it is your own, import the module that registers it before building."
        )
    return registry.get(name)
