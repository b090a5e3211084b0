"""One switch for speed: ``MODEL.FPN_EXT.NUMERICS``, ``exact`` or ``fast``.

``exact`` is bit-equal to Detectron2 on CPU. ``fast`` is equal within rounding error, and whatever
is quickest on this processor for this model. ``exact`` sets all of ``EXPERT_KEYS``; ``fast`` sets
those that pay, of what nobody has written in a file or on the command line.
"""

from collections.abc import Collection
from typing import Any

import torch
from detectron2.config import CfgNode

from ..keys import defaults
from ..registries.architectures import is_architecture
from ..registries.lookup import is_pyramid
from ..speed.optimize import has_bfloat16_convolutions

CHOICES = ("exact", "fast")
EXACT: dict[str, Any] = {
    "POOLER_IMPLEMENTATION": "per_level",
    "CHANNELS_LAST": False,
    "WINOGRAD": False,
    "FOLD_NORMS": False,
    "INFERENCE_DTYPE": "",
}
EXPERT_KEYS = tuple(EXACT)  # by the last part of their names
# Measured for Detectron2's ResNets on CPUs with AVX-512 (results/speed-cpu). Without AVX-512 these
# settings slow a model down; for other networks and on a GPU nothing was measured.
FAST_WITH_AVX512: dict[str, Any] = {
    "CHANNELS_LAST": True,
    "WINOGRAD": True,
    "FOLD_NORMS": True,
    "INFERENCE_DTYPE": "float32",
}


def resolve_numerics(cfg: CfgNode, explicitly_set: Collection[str] = ()) -> str:
    """Set the expert keys as ``MODEL.FPN_EXT.NUMERICS`` asks for it, in place.

    Args:
        cfg: a checked config, its device resolved.
        explicitly_set: full names of the keys that somebody has written; these stay as they are.

    Returns:
        What was chosen, for the log: one line. Empty with ``fast`` and another backbone than this
        project's, for which nothing is chosen.

    Raises:
        ValueError: NUMERICS is neither; or it is ``exact`` and an expert key is explicitly set to
            something else.
    """
    own = cfg.MODEL.FPN_EXT
    if own.NUMERICS not in CHOICES:
        raise ValueError(f"MODEL.FPN_EXT.NUMERICS must be one of {CHOICES}, got {own.NUMERICS!r}")
    kept = [key for key in EXPERT_KEYS if f"MODEL.FPN_EXT.{key}" in explicitly_set]
    if own.NUMERICS == "exact":
        inexact = [
            f"MODEL.FPN_EXT.{key} {own[key]}"
            for key in kept
            if own[key] != EXACT[key] and (key, own[key]) != ("POOLER_IMPLEMENTATION", "auto")
        ]
        if inexact:
            raise ValueError(
                f"MODEL.FPN_EXT.NUMERICS exact contradicts {' and '.join(inexact)}: take one out"
            )
        chosen, why = EXACT, "bit-equal to Detectron2 on CPU"
    else:
        if not is_pyramid(cfg):
            return ""
        chosen, why = _fast(cfg)
    for key, value in chosen.items():
        if key not in kept or own.NUMERICS == "exact":
            own[key] = value
    values = ", ".join(f"{key} {own[key] or repr(own[key])}" for key in EXPERT_KEYS)
    as_written = f"; as written: {', '.join(kept)}" if kept and own.NUMERICS == "fast" else ""
    return f"MODEL.FPN_EXT.NUMERICS {own.NUMERICS} ({why}): {values}{as_written}"


def as_chosen(cfg: CfgNode) -> dict[str, Any]:
    """The expert keys by their full names, as NUMERICS sets those that are not explicitly set.

    Args:
        cfg: a checked config, its device resolved.
    """
    fresh = cfg.clone()
    fresh.defrost()
    for key, value in defaults("MODEL.FPN_EXT").items():
        if key in EXPERT_KEYS:
            fresh.MODEL.FPN_EXT[key] = value
    resolve_numerics(fresh)
    return {f"MODEL.FPN_EXT.{key}": fresh.MODEL.FPN_EXT[key] for key in EXPERT_KEYS}


def unresolved_yaml(cfg: CfgNode, explicitly_set: Collection[str] = ()) -> str:
    """A config as the YAML of a command that prepares it, and has NUMERICS choose there.

    A dump writes every key, and one that is written is explicitly set.

    Args:
        cfg: a config as it was loaded.
        explicitly_set: full names of the keys that somebody has written.
    """
    cfg = cfg.clone()
    for key in EXPERT_KEYS:
        if f"MODEL.FPN_EXT.{key}" not in explicitly_set:
            del cfg.MODEL.FPN_EXT[key]
    text: str = cfg.dump()
    return text


def has_avx512() -> bool:
    """Whether PyTorch and oneDNN use AVX-512 here; ``ATEN_CPU_CAPABILITY`` and
    ``ONEDNN_MAX_CPU_ISA`` count."""
    # Of the CPUs that PyTorch takes for AVX-512 ones, oneDNN lacks bfloat16 only if it was told to.
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") and has_bfloat16_convolutions()


def _fast(cfg: CfgNode) -> tuple[dict[str, Any], str]:
    if cfg.MODEL.DEVICE != "cpu":
        return {}, f"on {cfg.MODEL.DEVICE}"
    if not has_avx512():
        return {}, "a CPU without AVX-512"
    if cfg.MODEL.FPN_EXT.BOTTOM_UP != "build_resnet_backbone":
        return {}, f"not measured with {cfg.MODEL.FPN_EXT.BOTTOM_UP}"
    chosen = dict(FAST_WITH_AVX512)
    if not is_architecture(cfg, "GeneralizedRCNN", "ProposalNetwork"):
        del chosen["INFERENCE_DTYPE"]
    return chosen, "AVX-512"
