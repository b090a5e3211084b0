"""Weights of a classification network under the names of torchvision or timm, whatever theirs are.

Where most names are the network's, they say what belongs together. What has no name in common is
paired in order: the network's first with the file's first, and so on, which holds where both were
written down in the order the layers were built. Every pair must agree in shape, and in kind where
both names say it (``weight``, ``bias``, ``running_mean``, ``running_var``); what does not pair to
the end is rejected. Shapes alone prove little: :mod:`fpn_ext.bottom_up.classify` shows whether the
result recognises what is in an image.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from ..files.atomic import replacing
from ..files.tensor_names import names_in_file
from ..files.weight_files import read_weights, sha256
from ..reporting.json_files import write_json
from .classify import CLASSIFIERS, classify, whole_network
from .libraries import Pixels
from .pixels import pixels_as_metadata, pixels_in_file
from .pretrained import is_package, package_file, package_named, package_of
from .weights import LEAST_SHARE

KINDS = ("weight", "bias", "running_mean", "running_var")


class Pair(NamedTuple):
    """One tensor of the network and the one of the file that it takes.

    Attributes:
        name: in the network.
        source: in the file.
        shape: of both.
        by: ``"name"`` or ``"order"``.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    by: str


class Conversion(NamedTuple):
    """What :func:`convert` did.

    Attributes:
        source: the file that was read.
        network: as in ``MODEL.FPN_EXT.BOTTOM_UP``.
        pairs: every tensor of the network, in its order.
        metadata: what stands beside the tensors of the new file.
    """

    source: Path
    network: str
    pairs: list[Pair]
    metadata: dict[str, str]


def convert(source: str, network: str, output: Path, pixels: Pixels | None = None) -> Conversion:
    """Write the weights of a file or package as ``.safetensors`` for ``BOTTOM_UP_WEIGHTS``.

    Args:
        source: a file that :func:`fpn_ext.files.weight_files.read_weights` reads, without running
            code from it; or a package of ``PACKAGES`` that is installed.
        network: ``"timm/..."`` or ``"torchvision/..."``.
        output: replaced once it is whole.
        pixels: what the weights were trained with; None for what is known of the source. Where
            nothing is known, the new file says nothing of them, and they will be the library's.

    Raises:
        FileNotFoundError: no file ``source``.
        ValueError: no such network or package; a file that cannot be read; its tensors do not pair
            with the network's.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output} must end in .safetensors")
    body = whole_network(network)
    file = _file_of(source)
    if output.exists() and output.samefile(file):
        raise ValueError(f"--output {output} is the source itself; name another file")
    weights = read_tensors(file)
    pairs = pair(body.state_dict(), weights, ordered=file.suffix != ".safetensors")
    digest = sha256(str(file))
    package = package_of(digest)
    known = pixels or (package.pixels if package else pixels_in_file(str(file)))
    metadata = {
        "format": "pt",
        "network": network,
        "source": source if is_package(source) else file.name,
        "source_sha256": digest,
        **(pixels_as_metadata(known) if known else {}),
    }
    tensors = {p.name: weights[p.source].detach().clone().contiguous() for p in pairs}
    with replacing(output) as stream:
        stream.write(save(tensors, metadata))
    return Conversion(file, network, pairs, metadata)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, in its order; counters of batches are left out."""
    weights = read_weights(str(file))["model"]
    return {name: torch.as_tensor(value) for name, value in weights.items() if _counts(name)}


def pair(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], ordered: bool = True
) -> list[Pair]:
    """Every tensor of a network with one of a file: by name where most names fit, else by order.

    Counters of batches (``num_batches_tracked``) are left out. Fewer than 90 % of names in common
    are chance, ``_bn1`` the last norm of one and the first of the other, and count as none.

    Args:
        ours: of the whole network, in its order.
        theirs: of the file, in its order.
        ordered: whether the order of the file means anything: a .safetensors sorts its tensors.

    Raises:
        ValueError: what is left has another number of tensors, or two that would be paired differ
            in shape or kind, or a variance would be negative; names the first such pair.

    >>> conv, norm = torch.zeros(4, 3, 1, 1), torch.zeros(4)
    >>> for p in pair({"conv.weight": conv, "bn.weight": norm}, {"c.w": conv, "n.scale": norm}):
    ...     print(*p)
    conv.weight c.w (4, 3, 1, 1) order
    bn.weight n.scale (4,) order
    """
    ours = {name: tensor for name, tensor in ours.items() if _counts(name)}
    by_name = {
        name: source
        for name, source in names_in_file(ours, theirs).items()
        if theirs[source].shape == ours[name].shape
    }
    if len(by_name) < LEAST_SHARE * len(ours):
        by_name = {}
    left = [name for name in ours if name not in by_name]
    taken = set(by_name.values())
    left_there = [name for name in theirs if name not in taken]
    if left:
        if not ordered:
            raise ValueError(
                f"{len(left)} of the network's {len(ours)} tensors are not in the file by name "
                f"({left[0]}, ...), and a .safetensors keeps no order to pair them by: convert the "
                "file it was made from"
            )
        _check_order(left, left_there, ours, theirs)
        by_order = dict(zip(left, left_there, strict=True))
    else:  # what else is in the file is not of this network: a second head, say
        by_order = {}
    pairs = [
        Pair(name, source, tuple(tensor.shape), "name" if name in by_name else "order")
        for name, tensor in ours.items()
        for source in [by_name.get(name) or by_order[name]]
    ]
    for name, source, *_ in pairs:
        if _kind(name) == "running_var" and bool((theirs[source] < 0).any()):
            raise ValueError(f"{source} would be the variance {name}, and has negative values")
    return pairs


def conversion_hint(file: str, network: str) -> str:
    """The command that converts a file, if its tensors pair with the whole network; else ""."""
    if network.partition("/")[0] not in CLASSIFIERS or file.endswith(".safetensors"):
        return ""
    try:
        pair(whole_network(network).state_dict(), read_tensors(Path(file)))
    except ValueError:
        return ""
    name = network.partition("/")[2]
    return (
        f"Its tensors fit the whole of {network} in order and shape, under other names: "
        f"fpn-ext weights convert {file} --network {network} --output {name}.safetensors, then "
        f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS {name}.safetensors"
    )


def _file_of(source: str) -> Path:
    if Path(source).is_file():
        return Path(source)
    looks_like_path = "/" in source or Path(source).suffix in (
        ".pth",
        ".pt",
        ".safetensors",
        ".pkl",
    )
    if looks_like_path and not is_package(source):
        raise FileNotFoundError(f"no file of weights {source}")
    return package_file(source)


def _check_order(
    left: Sequence[str],
    left_there: Sequence[str],
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
) -> None:
    for i, (name, source) in enumerate(zip_longest(left, left_there)):
        if name is not None and source is not None:
            kinds = _kind(name), _kind(source)
            alike = kinds[0] == kinds[1] or not all(kinds)
            if ours[name].shape == theirs[source].shape and alike:
                continue
        raise ValueError(
            f"the tensors do not pair by order: of those without a name in common, number {i + 1} "
            f"is {_described(name, ours)} in the network, {_described(source, theirs)} in the file "
            f"({len(left)} and {len(left_there)} such tensors). Name the network that the file was "
            "made for with --network"
        )


def _described(name: str | None, tensors: Mapping[str, torch.Tensor]) -> str:
    return f"{name} {tuple(tensors[name].shape)}" if name is not None else "missing"


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last in KINDS else ""


def _counts(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def run(args: argparse.Namespace) -> None:
    """What ``fpn-ext weights convert`` does, with its arguments.

    Raises:
        FileNotFoundError, ValueError: as :func:`convert` and :func:`classify`; the image is looked
            for before anything is written.
    """
    if args.image and not Path(args.image).is_file():
        raise FileNotFoundError(f"--image: no file {args.image}")
    conversion = convert(args.source, _network(args), args.output, _pixels(args))
    print(report(conversion, args.output))
    classes = classify(args.output, Path(args.image)) if args.image else []
    for index, name, probability in classes:
        print(f"{probability:8.2%}  class {index}  {name}".rstrip())
    if args.json:
        write_json(args.json, as_json(conversion, classes))


def _network(args: argparse.Namespace) -> str:
    if args.network:
        return args.network
    if is_package(args.source):
        return package_named(args.source).network
    raise ValueError("--network NAME is needed, as in MODEL.FPN_EXT.BOTTOM_UP: timm/resnet18")


def _pixels(args: argparse.Namespace) -> Pixels | None:
    mean, std = args.pixel_mean, args.pixel_std
    if mean is None and std is None:
        return None
    if mean is None or std is None or min(std) <= 0:
        raise ValueError(
            "--pixel-mean and --pixel-std go together, three numbers each, std above 0"
        )
    return Pixels(args.pixel_format, tuple(mean), tuple(std))


def report(conversion: Conversion, output: Path) -> str:
    """The full pairing as text, one line a tensor, then what was written."""
    by_order = [p for p in conversion.pairs if p.by == "order"]
    lines = [f"{p.name} <- {p.source} {list(p.shape)} by {p.by}" for p in conversion.pairs]
    known = conversion.metadata.get("pixel_mean")
    pixels = "not known; the library's will be used: --pixel-mean, --pixel-std, --pixel-format"
    if known:
        written = conversion.metadata
        pixels = f"{written['pixel_format']}, mean {known}, std {written['pixel_std']}"
    return "\n".join(
        (
            *lines,
            f"{len(conversion.pairs)} tensors: {len(conversion.pairs) - len(by_order)} by name, "
            f"{len(by_order)} by order and shape",
            f"pixels: {pixels}",
            f"written: {output}",
        )
    )


def as_json(
    conversion: Conversion, classes: Sequence[tuple[int, str, float]] = ()
) -> dict[str, Any]:
    """What ``fpn-ext weights convert --json`` writes."""
    metadata: dict[str, Any] = dict(conversion.metadata)
    for key in ("pixel_mean", "pixel_std"):
        if key in metadata:
            metadata[key] = json.loads(metadata[key])
    return {
        **metadata,
        "pairs": [p._asdict() for p in conversion.pairs],
        "classes": [{"index": i, "name": n, "probability": p} for i, n, p in classes],
    }
