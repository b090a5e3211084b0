"""One switch for speed: ``MODEL.FPN_EXT.NUMERICS``, ``exact`` or ``fast``.

``exact`` is bit-equal to Detectron2 on CPU. ``fast`` is equal within rounding error, and the
fastest known for this processor and model. ``exact`` sets all of ``EXPERT_KEYS``; ``fast`` sets
those that pay off, unless set in a file or on the command line.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode

from ..kernels.compiled import kernels
from ..keys import defaults, own_keys
from ..registries.architectures import is_architecture
from ..registries.lookup import is_pyramid
from ..speed.residuals import has_bfloat16_convolutions

CHOICES = ("exact", "fast")
EXACT: dict[str, Any] = {
    "POOLER_IMPLEMENTATION": "per_level",
    "CHANNELS_LAST": False,
    "WINOGRAD": False,
    "FOLD_NORMS": False,
    "INFERENCE_DTYPE": "",
}
EXPERT_KEYS = tuple(EXACT)  # last parts of the key names
# Measured for networks of Detectron2, torchvision and timm (results/speed-cpu), not on GPUs. With
# AVX2 alone channels_last maps pay off with the compiled kernels: oneDNN's gradient of filters is
# slow on them.
FAST: dict[str, Any] = {
    "CHANNELS_LAST": True,
    "WINOGRAD": True,
    "FOLD_NORMS": True,
    "INFERENCE_DTYPE": "float32",
}


def resolve_numerics(cfg: CfgNode, explicitly_set: Collection[str] = ()) -> str:
    """Set the expert keys according to ``MODEL.FPN_EXT.NUMERICS``, in place.

    Args:
        cfg: a checked config, its device resolved.
        explicitly_set: full names of keys set in a file or on the command line; left unchanged.

    Returns:
        One line for the log with the choice. Empty with ``fast`` and a backbone that is not this
        project's, where nothing is changed.

    Raises:
        ValueError: NUMERICS is neither value; or it is ``exact`` and an expert key is explicitly
            set to something else.
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
    """Full name -> value of the expert keys, as NUMERICS sets them by itself.

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
    """A config as YAML for another command to prepare, with NUMERICS left to choose there.

    A plain dump writes every key, which makes all of them explicitly set.

    Args:
        cfg: a config as loaded.
        explicitly_set: full names of keys set in a file or on the command line.
    """
    cfg = cfg.clone()
    for key in EXPERT_KEYS:
        if f"MODEL.FPN_EXT.{key}" not in explicitly_set:
            del cfg.MODEL.FPN_EXT[key]
    text: str = cfg.dump()
    return text


def has_avx512() -> bool:
    """Whether PyTorch and oneDNN use AVX-512 here, given ``ATEN_CPU_CAPABILITY`` and
    ``ONEDNN_MAX_CPU_ISA``."""
    # On CPUs that PyTorch counts as AVX-512, oneDNN lacks bfloat16 only if ISA-limited.
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") and has_bfloat16_convolutions()


def has_compiled_kernels() -> bool:
    """Whether :mod:`fpn_ext.kernels.compiled` has been compiled for this CPU."""
    return kernels() is not None


def slow_bfloat16(cfg: CfgNode, training: bool) -> Iterator[str]:
    """What asks for bfloat16 on a CPU that has no convolutions in it, each with its remedy.

    Args:
        cfg: a checked config, its device and NUMERICS resolved.
        training: whether SOLVER counts.
    """
    if cfg.MODEL.DEVICE != "cpu" or has_bfloat16_convolutions():
        return
    slow = (
        "this CPU has no bfloat16 convolutions (AVX-512 or AVX-NE-CONVERT): results are right, and "
        "several times slower than in float32;"
    )
    if cfg.MODEL.FPN_EXT.INFERENCE_DTYPE == "bfloat16":
        yield f"MODEL.FPN_EXT.INFERENCE_DTYPE bfloat16: {slow} set it to float32"
    solver = cfg.SOLVER
    if training and solver.AMP.ENABLED and own_keys(cfg, "SOLVER").AMP_DTYPE == "bfloat16":
        yield f"SOLVER.FPN_EXT.AMP_DTYPE bfloat16: {slow} set SOLVER.AMP.ENABLED False"


def _fast(cfg: CfgNode) -> tuple[dict[str, Any], str]:
    if cfg.MODEL.DEVICE != "cpu":
        return {}, f"on {cfg.MODEL.DEVICE}"
    if not (has_avx512() or has_compiled_kernels()):
        return {}, "a CPU without AVX-512, no compiled kernels"
    chosen = dict(FAST)
    if not is_architecture(cfg, "GeneralizedRCNN", "ProposalNetwork"):
        del chosen["INFERENCE_DTYPE"]
    return chosen, "AVX-512" if has_avx512() else "compiled kernels"
