"""Loads a network's weights by name from a local file, which is refused if too few fit."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..files.tensor_names import names_in_file
from ..files.weight_files import read_weights

logger = logging.getLogger(__name__)

# Minimum share of a network's tensors in the file.
LEAST_SHARE = 0.9
EXAMPLES = 5


class TooFewTensorsError(ValueError):
    """A file that does not have the weights of the network."""


def load_pretrained(network: nn.Module, file: str) -> None:
    """Load a network's weights from a file, and log which tensors it has and which it lacks.

    Tensors match by name: the network's own, with a prefix common to all of them in the file
    (``"module."``, ``"backbone."``), or timm's for the whole network. A first convolution with
    another number of input channels gets the mean of the file's filters, scaled to keep the sum.

    Args:
        network: changed in place.
        file: in any format of :func:`fpn_ext.files.weight_files.read_weights`, which runs no code
            from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
        TooFewTensorsError: it holds fewer than 90 % of the network's tensors (parameters and
            running statistics) in the same shape; nothing was loaded.
    """
    theirs = _read(Path(file))
    ours = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    name_in_file = names_in_file(ours, theirs)
    fitting: dict[str, torch.Tensor] = {}
    other_shape = []
    for name, source in name_in_file.items():
        tensor = _with_channels(theirs[source], ours[name].shape)
        if tensor.shape == ours[name].shape:
            fitting[name] = tensor
        else:
            shapes = [tuple(t.shape) for t in (tensor, ours[name])]
            other_shape.append(f"{name} {shapes[0]} instead of {shapes[1]}")
    share = len(fitting) / max(len(ours), 1)
    report = (
        f"{len(fitting)} of the network's {len(ours)} tensors ({share:.1%}) are in {file}"
        + _examples("not there", [n for n in ours if n not in name_in_file])
        + _examples("of another shape", other_shape)
        + _examples("not used", theirs.keys() - set(name_in_file.values()))
    )
    if share < LEAST_SHARE:
        raise TooFewTensorsError(
            f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: only {report}. At least {LEAST_SHARE:.0%} are "
            "needed: name the file of this very network, or leave the key empty to train from "
            "scratch"
        )
    network.load_state_dict(fitting, strict=False)
    logger.info("MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: %s", report)


def _read(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: no file {file}")
    try:
        weights = read_weights(str(file))["model"]
    except ValueError as error:
        raise ValueError(f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS: {error}") from error
    return {name: torch.as_tensor(tensor) for name, tensor in weights.items()}


def _with_channels(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A 3-channel convolution's weights, for as many channels as in ``shape``."""
    wider = tensor.dim() == 4 and tensor.shape[1] == 3 and shape[1] != 3
    if not wider or tensor.shape[0] != shape[0] or tensor.shape[2:] != shape[2:]:
        return tensor
    return tensor.mean(1, keepdim=True).expand(shape) * (3 / shape[1])


def _examples(label: str, names: Iterable[str]) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = ", ..." if len(names) > EXAMPLES else ""
    return f"; {len(names)} {label}: {', '.join(names[:EXAMPLES])}{more}"
