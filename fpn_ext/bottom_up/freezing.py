"""Freezing parts of a model by name: ``MODEL.FPN_EXT.FREEZE``."""

import logging
from collections.abc import Sequence

from torch import nn

from ..keys import declare
from ..names import did_you_mean
from .norms import replace_norms

declare(
    "MODEL.FPN_EXT.FREEZE",
    [],
    "Names of modules (or parameters) of the whole model that training leaves as they "
    'are, e.g. ["backbone.bottom_up.stem"]; batch norms in them use their running '
    "statistics.",
    "training",
)

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze parts of a model, in place, and log each.

    Parameters get ``requires_grad`` False; batch norms become frozen ones, which use their
    running statistics and never update them. Call it before building the optimizer.

    Args:
        model: the whole model.
        names: of modules or parameters, as in ``model.named_modules()``, e.g.
            ``"backbone.bottom_up.stem"``; a module's descendants are frozen with it. Names match
            whole parts only: ``"backbone.bottom_up.res"`` does not match ``res2``.

    Raises:
        ValueError: an unknown name, or nothing left to train.
        TypeError: a batch norm with no known frozen form.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    >>> freeze(model, ["0", "1"])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    >>> model[1]
    FrozenBatchNorm2d(num_features=8, eps=1e-05)
    """
    for name in names:
        _check_name(model, name)
    for name in names:
        parameters = [
            p for n, p in model.named_parameters() if n == name or n.startswith(f"{name}.")
        ]
        for parameter in parameters:
            parameter.requires_grad_(False)
        norms = replace_norms(model, "FrozenBN", name)
        logger.info(
            "frozen (MODEL.FPN_EXT.FREEZE): %s, %d values in %d parameters, %d batch norms",
            name,
            sum(p.numel() for p in parameters),
            len(parameters),
            norms,
        )
    if names and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"MODEL.FPN_EXT.FREEZE {list(names)} leaves nothing to train; take a name out"
        )


def _check_name(model: nn.Module, name: str) -> None:
    part, found = model, ""
    for piece in name.split("."):
        children = dict(part.named_children())
        own = [n for n, _ in part.named_parameters(recurse=False)]
        wanted = f"{found}.{piece}" if found else piece
        if piece not in children and piece not in own:
            valid = [f"{found}.{n}" if found else n for n in (*children, *own)]
            raise ValueError(
                f"MODEL.FPN_EXT.FREEZE: nothing in the model is named {name!r}; "
                + did_you_mean(wanted, valid)
            )
        part, found = children.get(piece, nn.Identity()), wanted
