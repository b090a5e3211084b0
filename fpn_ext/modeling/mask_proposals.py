"""Segmentation proposals from the pyramid (Lin et al. 2017, Sec. 6, appendix and Table 6).

As DeepMask (Pinheiro et al. 2015), a model that predicts a mask and a score for each window of an
image; as an RPN, on all levels of a pyramid instead of on an image pyramid. The windows and what
they are to find are in :mod:`.mask_windows`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Instances
from torch import nn

from ..keys import declare, own_keys
from ..levels import LevelError
from .mask_windows import NO_OBJECT, OBJECT_CELLS, OF_WINDOW, WindowGrid, match_windows
from .window_mlp import WindowMLP

declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_WINDOWS",
    [5, 7],
    "Sides in cells of the windows of segmentation proposals, each with an MLP of its own that all "
    "levels share: [5] for objects of 32 to 512 px on P2 to P6, [7] for the half octaves above "
    "them, [5, 7] for both.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_OBJECT_CELLS",
    OBJECT_CELLS,
    "Length in cells of the objects that windows of 5x5 cells are for: 8, the paper's, are 32 px "
    "on P2. As with anchors' sizes, less for smaller images.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_HIDDEN",
    512,
    "Units in the hidden layer of each MLP of segmentation proposals.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_SIZE",
    14,
    "Side in cells of the masks that segmentation proposals are predicted as, before they are "
    "resized to their region of the image.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_BATCH_SIZE_PER_IMAGE",
    128,
    "Windows of an image that segmentation proposals are trained on, in each iteration.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_POSITIVE_FRACTION",
    0.25,
    "Share of these windows that are positive, where there are as many.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_LOSS_WEIGHT",
    10.0,
    "Weight of the loss of the masks of segmentation proposals; that of their scores has 1.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_TOPK",
    1000,
    "Segmentation proposals of an image: those with the highest scores.",
    "PyramidMaskProposals",
)
declare(
    "MODEL.FPN_EXT.MASK_PROPOSAL_THRESHOLD",
    0.5,
    "Probability from which a pixel belongs to the mask of a segmentation proposal.",
    "PyramidMaskProposals",
)


class Samples(NamedTuple):
    """Windows that are trained on, S in number.

    Attributes:
        image: (S,) int64, the image of the batch.
        window: (S,) int64, its index among those of all grids.
        positive: (S,) bool, whether there is an object to find.
        masks: (S, mask_size, mask_size) bool, the object in the window's region, or nothing.
    """

    image: torch.Tensor
    window: torch.Tensor
    positive: torch.Tensor
    masks: torch.Tensor


@META_ARCH_REGISTRY.register()
class PyramidMaskProposals(DenseDetector):
    """Segmentation proposals on all levels of a pyramid, class-agnostic (paper, Sec. 6).

    Each MLP slides over every map of the backbone and is shared by them. Training samples windows
    of each image, at most a quarter of them positive, the rest negative; the mask is trained on
    positive ones. Inference scores every window and predicts masks for those with the highest
    scores, without NMS.

    Not in the paper, and chosen so: which windows are as near to an object as to be positive
    (:func:`.mask_windows.match_windows`); negatives fill up what positives lack, as in Detectron2's
    RPN; each loss is the mean over its own windows, and over the pixels of the mask; a pixel
    belongs to a mask from probability 0.5 on; a part of an object that reaches beyond its window's
    region is cut off; windows centred in the padding of a batch are neither trained nor proposed.

    Args:
        backbone: all its maps are used; they have the same number of channels.
        windows: sides of the windows in cells, of 5 and 7, ascending.
        object_cells: length in cells of the objects that a window of 5x5 cells is for.
        hidden: units of each MLP's hidden layer.
        mask_size: side of the predicted masks in cells.
        batch_size_per_image: windows of an image that are trained on.
        positive_fraction: share of positive ones where there are as many.
        mask_loss_weight: of the masks' loss; that of the scores has 1.
        top_k: proposals of an image.
        mask_threshold: probability from which a pixel belongs to a mask.
        pixel_mean, pixel_std: per channel of the input image.

    Raises:
        ValueError: an argument out of range, or maps that differ in channels.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        windows: Sequence[int] = (5, 7),
        object_cells: int = OBJECT_CELLS,
        hidden: int = 512,
        mask_size: int = 14,
        batch_size_per_image: int = 128,
        positive_fraction: float = 0.25,
        mask_loss_weight: float = 10.0,
        top_k: int = 1000,
        mask_threshold: float = 0.5,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        values = {
            "WINDOWS": list(windows),
            "OBJECT_CELLS": object_cells,
            "HIDDEN": hidden,
            "SIZE": mask_size,
            "BATCH_SIZE_PER_IMAGE": batch_size_per_image,
            "POSITIVE_FRACTION": positive_fraction,
            "LOSS_WEIGHT": mask_loss_weight,
            "TOPK": top_k,
            "THRESHOLD": mask_threshold,
        }
        if problems := list(_value_problems(values)):
            raise ValueError("\n".join(problems))
        shapes = backbone.output_shape()
        channels = {name: shape.channels for name, shape in shapes.items()}
        if len(set(channels.values())) != 1:
            raise LevelError(
                "all levels share an MLP, so the maps of MODEL.BACKBONE.NAME need the same number "
                f"of channels, got {channels}; take a pyramid, such as FeaturePyramid"
            )
        in_channels = next(iter(channels.values()))
        head = nn.ModuleDict(
            {f"window{w}": WindowMLP(in_channels, w, hidden, mask_size) for w in windows}
        )
        super().__init__(backbone, head, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.strides = [int(shapes[name].stride) for name in self.head_in_features]
        self.object_cells = object_cells
        self.mask_size = mask_size
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.mask_loss_weight = mask_loss_weight
        self.top_k = top_k
        self.mask_threshold = mask_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if problems := list(mask_proposal_problems(cfg)):
            raise ValueError("\n".join(problems))
        own = own_keys(cfg)
        return {
            "backbone": build_backbone(cfg),
            "windows": own.MASK_PROPOSAL_WINDOWS,
            "object_cells": own.MASK_PROPOSAL_OBJECT_CELLS,
            "hidden": own.MASK_PROPOSAL_HIDDEN,
            "mask_size": own.MASK_PROPOSAL_SIZE,
            "batch_size_per_image": own.MASK_PROPOSAL_BATCH_SIZE_PER_IMAGE,
            "positive_fraction": own.MASK_PROPOSAL_POSITIVE_FRACTION,
            "mask_loss_weight": own.MASK_PROPOSAL_LOSS_WEIGHT,
            "top_k": own.MASK_PROPOSAL_TOPK,
            "mask_threshold": own.MASK_PROPOSAL_THRESHOLD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, proposals in inference.

        Args:
            batched_inputs: as for Detectron2's detectors: ``image`` (C, H, W); in training
                ``instances`` with ``gt_boxes`` and ``gt_masks``; in inference ``height`` and
                ``width`` of the image that proposals are wanted for, if it is of another size.

        Returns:
            In training ``{"loss_score", "loss_mask"}``. In inference, for each image
            ``{"instances": Instances}``, highest score first: ``pred_masks`` (R, height, width)
            bool, ``scores`` (R,) from 0 to 1, ``pred_boxes`` of the masks, XYXY, all 0 where a mask
            has no pixel, and ``pred_classes``, all 0.

        Raises:
            ValueError: in training, an image's objects have no masks.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        maps = [features[name] for name in self.head_in_features]
        if self.training:
            objects = [entry["instances"].to(self.device) for entry in batched_inputs]
            return self.losses(maps, self.sample(self.grids(maps), objects))
        results = []
        for n, (entry, size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            masks, regions, scores = self.propose([x[n : n + 1] for x in maps], size)
            height, width = entry.get("height", size[0]), entry.get("width", size[1])
            scale = regions.new_tensor([width / size[1], height / size[0]]).repeat(2)
            pasted = paste_masks_in_image(
                masks, regions * scale, (height, width), self.mask_threshold
            ).bool()
            found = Instances((height, width), pred_masks=pasted, scores=scores)
            found.pred_boxes = BitMasks(pasted).get_bounding_boxes().to(scores.device)
            found.pred_classes = torch.zeros_like(scores, dtype=torch.int64)
            results.append({"instances": found})
        return results

    def grids(self, maps: Sequence[torch.Tensor]) -> list[WindowGrid]:
        """The windows on maps (N, C, H, W), fine to coarse: on each the small, then the large."""
        return [
            WindowGrid(stride, mlp.window, x.shape[-2], x.shape[-1], self.object_cells)
            for stride, x in zip(self.strides, maps, strict=True)
            for mlp in self._mlps()
        ]

    @torch.no_grad()
    def sample(self, grids: Sequence[WindowGrid], objects: Sequence[Instances]) -> Samples:
        """Windows to train on, at random.

        Args:
            grids: of the batch.
            objects: of each image, with ``gt_boxes``, XYXY in pixels of the input, and
                ``gt_masks``.

        Raises:
            ValueError: objects without masks.
        """
        regions = torch.cat([grid.regions(self.device) for grid in grids])
        samples = []
        for n, of_image in enumerate(objects):
            match = match_windows(of_image.gt_boxes.tensor, grids, of_image.image_size)
            labels = match.clamp(max=0) + 1  # 1 to find an object, 0 nothing, -1 in the padding
            positive, negative = subsample_labels(
                labels, self.batch_size_per_image, self.positive_fraction, bg_label=0
            )
            window = torch.cat((positive, negative))
            masks = torch.zeros(
                (len(window), self.mask_size, self.mask_size), dtype=torch.bool, device=self.device
            )
            if len(positive):
                if not of_image.has("gt_masks"):
                    raise ValueError(
                        "PyramidMaskProposals is trained on masks, and the instances have no "
                        "gt_masks: set MODEL.MASK_ON True for the data loader"
                    )
                cut = of_image.gt_masks[match[positive]]
                masks[: len(positive)] = cut.crop_and_resize(regions[positive], self.mask_size)
            is_positive = match[window] > NO_OBJECT
            samples.append(Samples(torch.full_like(window, n), window, is_positive, masks))
        return Samples(*(torch.cat(of_all) for of_all in zip(*samples, strict=True)))

    def losses(self, maps: Sequence[torch.Tensor], samples: Samples) -> dict[str, torch.Tensor]:
        """Binary logistic losses of the scores and, for positive windows, of the masks.

        Only the sampled windows are computed; the values are those of whole maps there.

        Args:
            maps: (N, C, H, W), fine to coarse.
            samples: windows of these maps, at least one.
        """
        grids = self.grids(maps)
        starts = [sum(grid.num_windows for grid in grids[:i]) for i in range(len(grids))]
        scores, masks, order = [], [], []
        for mlp in self._mlps():
            windows, chosen = [], []
            for i, grid in enumerate(grids):
                if grid.window != mlp.window:
                    continue
                place = samples.window - starts[i]
                (here,) = torch.nonzero((place >= 0) & (place < grid.num_windows), as_tuple=True)
                row, column = place[here] // grid.width, place[here] % grid.width
                x = maps[i // len(self.head)]
                windows.append(mlp.at(x, samples.image[here], row, column))
                chosen.append(here)
            hidden, here = mlp.hidden(torch.cat(windows)), torch.cat(chosen)
            scores.append(mlp.score(hidden).flatten())
            masks.append(mlp.masks(hidden[samples.positive[here]]))
            order.append(here)
        rows = torch.cat(order)
        positive = samples.positive[rows]
        targets = samples.masks[rows[positive]].float()
        # The sum over no mask at all still has a gradient, 0, which DistributedDataParallel needs.
        mask_loss = F.binary_cross_entropy_with_logits(torch.cat(masks), targets, reduction="sum")
        return {
            "loss_score": F.binary_cross_entropy_with_logits(torch.cat(scores), positive.float()),
            "loss_mask": self.mask_loss_weight * mask_loss / max(targets.numel(), 1),
        }

    @torch.no_grad()
    def propose(
        self, maps: Sequence[torch.Tensor], image_size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best R windows of one image, highest score first.

        Args:
            maps: (1, C, H, W), fine to coarse.
            image_size: height and width of the image without padding.

        Returns:
            (R, mask_size, mask_size) probabilities of the pixels; (R, 4) regions that they cover,
            XYXY in pixels of the input; (R,) scores from 0 to 1.
        """
        scores, hidden, regions, sides = [], [], [], []
        for i, grid in enumerate(self.grids(maps)):
            mlp = self._mlps()[i % len(self.head)]
            of_map = mlp(maps[i // len(self.head)])
            y, x = grid.centres(self.device)
            inside = (y < image_size[0])[:, None] & (x < image_size[1])
            (candidates,) = torch.nonzero(inside.flatten(), as_tuple=True)
            score, best = (
                mlp.score(of_map).flatten()[candidates].topk(min(self.top_k, len(candidates)))
            )
            window = candidates[best]
            scores.append(score)
            hidden.append(of_map.flatten(2)[0, :, window].t())
            regions.append(grid.regions(self.device)[window])
            sides.append(torch.full_like(window, grid.window))
        all_scores, all_hidden, all_sides = torch.cat(scores), torch.cat(hidden), torch.cat(sides)
        top, best = all_scores.topk(min(self.top_k, len(all_scores)))
        masks = top.new_zeros(len(best), self.mask_size, self.mask_size)
        for mlp in self._mlps():
            own = all_sides[best] == mlp.window
            masks[own] = mlp.masks(all_hidden[best[own], :, None, None])
        return masks.float().sigmoid(), torch.cat(regions)[best], top.float().sigmoid()

    def _mlps(self) -> list[Any]:
        return list(self.head.values())


def mask_proposal_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong in a config of :class:`PyramidMaskProposals`, a line each."""
    if not cfg.MODEL.MASK_ON:
        yield (
            "MODEL.META_ARCHITECTURE PyramidMaskProposals is trained and scored on masks: set "
            "MODEL.MASK_ON True"
        )
    prefix, own = "MASK_PROPOSAL_", own_keys(cfg)
    values = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
    yield from _value_problems(values)


def _value_problems(values: dict[str, Any]) -> Iterator[str]:
    key = "MODEL.FPN_EXT.MASK_PROPOSAL_"
    windows = list(values["WINDOWS"])
    if not windows or windows != sorted(set(windows) & set(OF_WINDOW)):
        yield f"{key}WINDOWS must be [5], [7] or [5, 7], got {windows}"
    for name in ("OBJECT_CELLS", "HIDDEN", "SIZE", "BATCH_SIZE_PER_IMAGE", "TOPK"):
        if values[name] < 1:
            yield f"{key}{name} must be at least 1, got {values[name]}"
    for name in ("POSITIVE_FRACTION", "THRESHOLD"):
        if not 0 < values[name] < 1:
            yield f"{key}{name} must be between 0 and 1, got {values[name]}"
    if not values["LOSS_WEIGHT"] >= 0:
        yield f"{key}LOSS_WEIGHT must be at least 0, got {values['LOSS_WEIGHT']}"
