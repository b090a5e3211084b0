"""Fig. 1(a): a featurized image pyramid.

"Features are computed on each of the image scales independently, which is slow" (Lin et al. 2017,
Fig. 1). The detector under it is any GeneralizedRCNN, such as one on a single map. It is trained on
one scale: "image pyramids are used only at test time", since training on one needs too much memory
(Sec. 1).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances

from ..keys import declare, own_keys

declare(
    "MODEL.FPN_EXT.IMAGE_SCALES",
    [0.5, 1.0, 2.0],
    "Factors by which ImagePyramidRCNN resizes an image's sides in inference, to detect at each.",
    "ImagePyramidRCNN",
)


@META_ARCH_REGISTRY.register()
class ImagePyramidRCNN(GeneralizedRCNN):
    """A GeneralizedRCNN that infers on several scales of each image and merges what it finds.

    Training and parameters are GeneralizedRCNN's: it loads a checkpoint trained as one. In
    inference the network input is resized to each scale (bilinear, antialiased), every scale is run
    on its own, and NMS by class runs over the detections of all scales together. (Detectron2's
    test-time augmentation, ``TEST.AUG``, also mirrors, and re-reads the image file.)

    Args:
        image_scales: factors of height and width, relative to the network input.
        nms_threshold: IoU above which the lower-scored of two boxes of a class is dropped.
        max_detections: kept per image, over all scales.
        **kwargs: of GeneralizedRCNN.

    Raises:
        ValueError: no scale, or one that is not positive; precomputed proposals or keypoints.
    """

    @configurable
    def __init__(
        self,
        *,
        image_scales: Sequence[float],
        nms_threshold: float,
        max_detections: int,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not image_scales or min(image_scales) <= 0:
            raise ValueError(
                "MODEL.FPN_EXT.IMAGE_SCALES must list at least one factor over 0, got "
                f"{list(image_scales)}"
            )
        if self.proposal_generator is None:
            raise ValueError(
                "MODEL.META_ARCHITECTURE ImagePyramidRCNN needs an RPN at every scale: "
                "MODEL.PROPOSAL_GENERATOR.NAME PyramidRPN instead of PrecomputedProposals"
            )
        if getattr(self.roi_heads, "keypoint_on", False):
            raise ValueError(
                "MODEL.META_ARCHITECTURE ImagePyramidRCNN has no keypoints: set MODEL.KEYPOINT_ON "
                "False"
            )
        self.image_scales = [float(scale) for scale in image_scales]
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            **super().from_config(cfg),
            "image_scales": own_keys(cfg).IMAGE_SCALES,
            "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """As GeneralizedRCNN's, on all scales; with ``detected_instances``, on the first alone.

        Args:
            batched_inputs: ``image`` (C, H, W) of each, and ``height`` and ``width`` of the output.
            detected_instances: given boxes, for which only further outputs are predicted.
            do_postprocess: resize the results to the output's size.

        Returns:
            ``{"instances": Instances}`` per image; else the Instances, in pixels of ``image``.
        """
        if detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        of_scales = [self._at_scale(batched_inputs, scale) for scale in self.image_scales]
        found = [self._merged(list(of_image)) for of_image in zip(*of_scales, strict=True)]
        if not do_postprocess:
            return found
        sizes = [instances.image_size for instances in found]
        return GeneralizedRCNN._postprocess(found, batched_inputs, sizes)

    def _at_scale(self, inputs: list[dict[str, Any]], scale: float) -> list[Instances]:
        """The detections on images resized by ``scale``, in pixels of the images as given."""
        resized = [{"image": _resized(entry["image"].to(self.device), scale)} for entry in inputs]
        results = []
        for entry, found in zip(
            inputs, super().inference(resized, do_postprocess=False), strict=True
        ):
            height, width = entry["image"].shape[-2:]
            found.pred_boxes.scale(width / found.image_size[1], height / found.image_size[0])
            results.append(Instances((height, width), **found.get_fields()))
        return results

    def _merged(self, of_scales: list[Instances]) -> Instances:
        found = Instances.cat(of_scales)
        boxes, scores = found.pred_boxes.tensor, found.scores
        kept = batched_nms(boxes, scores, found.pred_classes, self.nms_threshold)
        return found[kept[: self.max_detections]]


def _resized(image: torch.Tensor, scale: float) -> torch.Tensor:
    """(C, H, W) -> (C, round(H scale), round(W scale)), at least a pixel each; float32."""
    size = [max(round(side * scale), 1) for side in image.shape[-2:]]
    pixels = image.to(torch.float32)
    if size == list(image.shape[-2:]):
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
