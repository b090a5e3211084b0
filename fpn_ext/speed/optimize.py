"""Optimises a trained model for inference, with the same results to rounding.

Optimisations that are always safe are always on (in-place top-down pathway, PyramidRPN, cached
anchors, the fast pooler). Those here change the module tree; the result can only infer.
"""

import copy
import functools
import itertools
import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, KRCNNConvDeconvUpsampleHead
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import nn

from ..bottom_up import strided_pointwise
from ..kernels.compiled import kernels
from ..keys import declare, own_keys
from ..modeling.roi_heads import ChunkedROIHeads, PyramidROIHeads
from ..unwrap import unwrapped
from .choose import choose_by_measurement, choose_by_table
from .cuda_graphs import Recorded
from .folded_norms import FoldedConv2d, fold_into
from .layers import Rows, fully_connected_on_rows
from .library_norms import with_folded_norms
from .residuals import has_bfloat16_convolutions, sum_residuals_in_place
from .stem import replace_stems
from .winograd_training import (
    PlainTrainableWinogradConv2d,
    TrainableWinogradConv2d,
    contiguous_heads,
)

declare(
    "MODEL.FPN_EXT.INFERENCE_DTYPE",
    "",
    'How evaluations and predictions infer: "" for the model as trained, or the dtype '
    "given to optimize_for_inference: float32, bfloat16, or float16 (GPU only). NUMERICS "
    "fast sets float32 where it is quicker.",
    "inference",
)

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_NORMS = ("weight", "bias", "running_mean", "running_var")  # buffers of frozen ones
DIVERGED = "the training that made these weights diverged, or the file is damaged"
OPTIMIZED = "came from optimize_for_inference"
INSTEAD = "export the model it was made from (fpn-ext export)"


def optimize_for_inference(
    model: Any,
    dtype: torch.dtype = torch.float32,
    boxes_per_chunk: int = 256,
    cuda_graphs: bool = False,
    tune: bool | None = None,
    typical_size: tuple[int, int] = (480, 640),
) -> nn.Module:
    """A copy of a Detectron2 model that infers faster, on the device the model is on.

    - Frozen and batch norms are folded into the convolutions before them, in a library's network
      too (:mod:`fpn_ext.speed.library_norms`).
    - Everything runs in channels_last memory; residual sums reuse the shortcut's memory.
    - On CPU, each layer is computed in the way that is fastest on this machine
      (:mod:`fpn_ext.speed.layers`): torch's operators, oneDNN's with packed weights and, in
      float32, Winograd's algorithm and compiled kernels.
    - The first fc layer reads pooled features in place.
    - :class:`PyramidROIHeads` pool and run the box head image by image, ``boxes_per_chunk`` boxes
      at a time, which bounds the memory of a batch.

    Detections agree with the model's to rounding: given the same input, each stage's output differs
    by less than 1e-3 px and 1e-5 in score (tests/test_optimize.py). With a half-precision ``dtype``
    they agree within its accuracy; box decoding, NMS, scores and the mask and keypoint heads stay
    in float32. On a CPU without bfloat16 convolutions (:func:`has_bfloat16_convolutions`) a
    bfloat16 model is correct but slower than float32; a warning says so.

    Args:
        model: a GeneralizedRCNN or ProposalNetwork with components of this project or Detectron2,
            on its device, in any mode. Not modified.
        dtype: of backbone, RPN head and box head: float32, bfloat16, or float16 (GPU only).
        boxes_per_chunk: boxes pooled at once, per image.
        cuda_graphs: experimental, never run on a GPU yet. Capture backbone and RPN head as a CUDA
            graph per input size and replay it: hundreds of launches fewer per image. Each of the
            last eight sizes keeps its memory; one image's feature maps are overwritten by the next
            of that size.
        tune: on a CPU, measure which way of each layer is fastest, some seconds for the
            first model of a kind (:mod:`fpn_ext.speed.choose`). False: take a table's, which knows
            the processor's instructions alone. None: True unless ``FPN_EXT_TUNE=0`` is set.
        typical_size: height and width of the input to measure with, in pixels.

    Returns:
        The copy, in eval mode, called like the model. It raises RuntimeError in training mode and
        under torch.export, and ValueError for an image with NaN or infinity: oneDNN's ReLU makes
        NaN 0, and what is found would be invented.

    Raises:
        TypeError: any other model.
        ValueError: an optimised model; weights that are not finite, as of a diverged training; any
            other dtype; float16 or ``cuda_graphs`` on CPU; half precision with RoI heads that have
            no ``box_head``.
    """
    if not isinstance(model, GeneralizedRCNN | ProposalNetwork):
        raise TypeError(
            "optimize_for_inference takes a GeneralizedRCNN or ProposalNetwork "
            f"(MODEL.META_ARCHITECTURE), got {type(model).__name__}"
        )
    if _refuse_what_is_not_inference in model._forward_pre_hooks.values():
        raise ValueError(f"this model {OPTIMIZED}: optimise the model it was made from")
    if name := _not_finite(model):
        raise ValueError(f"{name} is not finite: {DIVERGED}")
    device = next(model.parameters()).device
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 needs a GPU; on CPU use torch.bfloat16 or torch.float32")
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16_convolutions():
        _warn_of_slow_bfloat16()
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a model on a GPU, this one is on {device}")

    with torch.no_grad():
        model = _copy_in_eval_mode(model).requires_grad_(False)
        _fold_norms(model)
        _compute_as_for_inference(model)
        model.backbone = with_folded_norms(model.backbone, _small_image(model))
        sum_residuals_in_place(model)
        replace_stems(model)
        if device.type == "cpu":
            _read_pooled_features_where_they_lie(model)
        roi_heads = getattr(model, "roi_heads", None)
        if type(roi_heads) is PyramidROIHeads:
            model.roi_heads = ChunkedROIHeads.from_heads(roi_heads, boxes_per_chunk)
        if dtype != torch.float32:
            _convert(model, dtype)
        # A convolution with channels_last weights outputs channels_last for any input.
        model.to(memory_format=torch.channels_last)
        head: Any
        for head in _contiguous_heads(model):
            head.to(memory_format=torch.contiguous_format)
        if device.type == "cpu":
            _choose_layers(model, typical_size if _tunes(tune) else None)
    model.register_forward_pre_hook(_refuse_what_is_not_inference)
    model.register_forward_pre_hook(_refuse_images_that_are_not_finite)
    if cuda_graphs:
        model.backbone.forward = Recorded(model.backbone.forward)
        if model.proposal_generator is not None:
            head = model.proposal_generator.rpn_head
            head.forward = Recorded(head.forward)
    return model


def _tunes(tune: bool | None) -> bool:
    return os.environ.get("FPN_EXT_TUNE") != "0" if tune is None else tune


def model_for_inference(cfg: CfgNode, model: Any) -> nn.Module:
    """The model as set by ``MODEL.FPN_EXT.INFERENCE_DTYPE``: unchanged, or optimised.

    One whose weights are not finite is unchanged too, with a warning.

    Args:
        cfg: the config the model was built from.
        model: a Detectron2 model, or one wrapped in DistributedDataParallel.
    """
    dtype = cfg.MODEL.FPN_EXT.INFERENCE_DTYPE
    if not dtype:
        return model
    if name := _not_finite(unwrapped(model)):
        logger.warning("%s is not finite: %s; inferring with the model as it is", name, DIVERGED)
        return model
    logger.info("inferring with the optimised model (MODEL.FPN_EXT.INFERENCE_DTYPE %s)", dtype)
    tune = own_keys(cfg).TUNE and comm.get_world_size() == 1  # processes disturb each other
    return optimize_for_inference(
        unwrapped(model),
        getattr(torch, dtype),
        tune=None if tune else False,
        typical_size=_typical_size(cfg),
    )


def _typical_size(cfg: CfgNode) -> tuple[int, int]:
    """Of a picture of 4 by 3 as ``cfg`` resizes it for inference."""
    short = cfg.INPUT.MIN_SIZE_TEST or min(480, cfg.INPUT.MAX_SIZE_TEST)  # 0: not resized
    return short, min(short * 4 // 3, max(cfg.INPUT.MAX_SIZE_TEST, short))


def _not_finite(model: nn.Module) -> str:
    """The name of a weight with NaN or infinity, or of anything else with NaN; "" for none."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        is_weight = isinstance(tensor, nn.Parameter) or name.rpartition(".")[2] in OF_NORMS
        # Other buffers may be infinite, as masks of attention are.
        if not _is_finite(tensor) and (is_weight or tensor.isnan().any()):
            return name
    return ""


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _refuse_images_that_are_not_finite(model: nn.Module, inputs: Any) -> None:
    for i, of_image in enumerate(inputs[0] if inputs else ()):
        if isinstance(image := of_image.get("image"), torch.Tensor) and not _is_finite(image):
            name = of_image.get("file_name", f"image {i} of the batch")
            raise ValueError(f"{name} has pixels that are not finite (NaN or infinity)")


def _refuse_what_is_not_inference(model: nn.Module, inputs: Any) -> None:
    if getattr(torch.compiler, "is_exporting", bool)():  # torch 2.7 has it
        raise RuntimeError(f"this model {OPTIMIZED} and cannot be exported: {INSTEAD}")
    if model.training:
        raise RuntimeError(
            f"this model {OPTIMIZED} and cannot be trained: its norms are folded away. Train the "
            "model it was made from, or call .eval()."
        )


# Each of these changes the copy in place.


def _choose_layers(model: Any, size: tuple[int, int] | None) -> None:
    """Each layer's way (:mod:`.choose`): measured at this size of input, or by the table."""
    outside = {inner for head in _contiguous_heads(model) for inner in head.modules()}
    if size is None:
        chosen, how = choose_by_table(model, outside), "by table"
    else:
        run = functools.partial(_run_once, model, size)
        chosen = choose_by_measurement(model, outside, _inputs(model, size), run)
        how = f"measured at {size[0]}x{size[1]}"
    compiled = "compiled kernels" if kernels() else "no compiled kernels"
    ways = ", ".join(f"{count} {name}" for name, count in sorted(chosen.items()))
    logger.info("layers (%s, %s): %s", how, compiled, ways or "none with a choice")


def _inputs(model: Any, size: tuple[int, int]) -> str:
    """What decides the shapes in :func:`_run_once`, but for the layers themselves."""
    heads = getattr(model, "roi_heads", None)
    proposed_on = getattr(model.proposal_generator, "in_features", None)
    boxes = getattr(heads, "boxes_per_chunk", None)
    return f"{size[0]}x{size[1]}, RPN on {proposed_on}, {type(heads).__name__}, {boxes} boxes"


def _run_once(model: Any, size: tuple[int, int]) -> None:
    divisor = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    features = model.backbone(torch.zeros(1, len(model.pixel_mean), height, width))
    if isinstance(model.proposal_generator, RPN):
        head = model.proposal_generator.rpn_head
        head([features[name] for name in model.proposal_generator.in_features])
    heads: Any = getattr(model, "roi_heads", None)
    if type(heads) is ChunkedROIHeads:
        maps = [features[name] for name in heads.box_in_features]
        box = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
        pooled = heads.box_pooler(maps, [Boxes(box.expand(heads.boxes_per_chunk, 4))])
        heads.box_head(pooled)


def _copy_in_eval_mode(model: nn.Module) -> nn.Module:
    """Older torchvision's networks cannot be copied in training mode and then put into eval's."""
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        return copy.deepcopy(model)
    model.eval()
    try:
        return copy.deepcopy(model)
    finally:
        for module, training in modes:  # those inside come after those around them
            module.train(training)


FOR_INFERENCE: dict[type, type] = {
    FoldedConv2d: Conv2d,
    TrainableWinogradConv2d: Conv2d,
    PlainTrainableWinogradConv2d: nn.Conv2d,
    **strided_pointwise.PLAIN,
}


def _compute_as_for_inference(model: nn.Module) -> None:
    """What training computes in a way of its own, by the same parameters, is plain again."""
    for module in model.modules():
        module.__class__ = FOR_INFERENCE.get(type(module), type(module))


def _small_image(model: Any) -> torch.Tensor:
    """Noise that the backbone can be run on, quickly."""
    divisor = max(model.backbone.size_divisibility, 1)
    side = -(-256 // divisor) * divisor
    noise = torch.randn(1, len(model.pixel_mean), side, side, generator=torch.Generator())
    return noise.to(model.device)


def _fold_norms(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        norm: Any = module.norm if isinstance(module, Conv2d) else None
        if isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d) and norm.running_mean is not None:
            fold_into(module, norm)
            module.norm = None


@functools.cache
def _warn_of_slow_bfloat16() -> None:
    logger.warning(
        "this CPU has no bfloat16 convolutions (AVX-512 or AVX-NE-CONVERT): the model is right, "
        "and several times slower than in float32; MODEL.FPN_EXT.INFERENCE_DTYPE float32 is fast"
    )


def _contiguous_heads(model: nn.Module) -> list[nn.Module]:
    # Detectron2's keypoint head calls .view in its loss alone.
    return [h for h in contiguous_heads(model) if type(h) is not KRCNNConvDeconvUpsampleHead]


def _read_pooled_features_where_they_lie(model: Any) -> None:
    """The box head's first fc reads pooled features, which are channels_last, without a copy."""
    roi_heads: Any = getattr(model, "roi_heads", None)
    head: Any = getattr(roi_heads, "box_head", None)
    if type(head) is not FastRCNNConvFCHead or head.conv_norm_relus or not head.fcs:
        return
    layers = dict(head.named_children())
    layers["flatten"] = Rows()
    size = roi_heads.box_pooler.output_size
    for name in [name for name in layers if name.startswith("fc_relu")]:
        del layers[name]
    first = True
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear):
            layers[name] = fully_connected_on_rows(layer, size if first else (1, 1), relu=True)
            first = False
    head._modules.clear()
    for name, layer in layers.items():
        head.add_module(name, layer)
    head.fcs = [layer for name, layer in layers.items() if name.startswith("fc")]


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Backbone and heads in half precision, with inputs and outputs converted."""
    backbone = model.backbone.to(dtype)
    first = getattr(backbone, "bottom_up", backbone)  # reads the image
    first.register_forward_pre_hook(_InputTo(dtype))
    if model.proposal_generator is not None:  # None with precomputed proposals
        model.proposal_generator.rpn_head.to(dtype).register_forward_hook(_outputs_to_float)
    roi_heads = getattr(model, "roi_heads", None)
    if roi_heads is None:
        return
    box_head = getattr(roi_heads, "box_head", None)
    if box_head is None:
        raise ValueError(
            f"{dtype} serves ROI heads with a box_head (MODEL.ROI_HEADS.NAME PyramidROIHeads, "
            f"StandardROIHeads, CascadeROIHeads), got {type(roi_heads).__name__}; use torch.float32"
        )
    for head in box_head if isinstance(box_head, nn.ModuleList) else [box_head]:  # a cascade's
        head.to(dtype).register_forward_pre_hook(_InputTo(dtype))
        head.register_forward_hook(_outputs_to_float)
    for branch in ("box", "mask", "keypoint"):
        pooler = getattr(roi_heads, f"{branch}_pooler", None)
        if isinstance(pooler, ROIPooler):  # Detectron2's lacks half precision on CPU
            pooler.register_forward_pre_hook(_InputTo(torch.float32))
        elif pooler is not None and branch != "box":
            pooler.register_forward_hook(_outputs_to_float)


class _InputTo:
    """Forward pre-hook that casts the first argument, a tensor or a list of tensors."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *others = inputs
        if isinstance(first, torch.Tensor):
            return (first.to(self.dtype), *others)
        return ([x.to(self.dtype) for x in first], *others)


def _outputs_to_float(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.float()
    return type(outputs)(_outputs_to_float(module, inputs, output) for output in outputs)
