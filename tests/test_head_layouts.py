"""What lies how in memory: heads that call ``.view`` get contiguous features, ours their own."""

import fpn_ext
import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from fpn_ext.config.numerics import resolve_numerics
from fpn_ext.engine.trainer import Trainer
from fpn_ext.speed.optimize import optimize_for_inference


@ROI_MASK_HEAD_REGISTRY.register()
class ViewingMaskHead(MaskRCNNConvUpsampleHead):
    def layers(self, x):
        of_convolutions = self.mask_fcn1(x)
        assert x.view(len(x), -1).is_contiguous()  # raises on features that are channels_last
        assert of_convolutions.view(len(x), -1).is_contiguous()
        return super().layers(x)


def config(numerics, *opts):
    """A ResNet-18 with heads wide enough for Winograd's convolutions."""
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (256, 256),
        "MODEL.FPN_EXT.NUMERICS": numerics,
        # As on a processor for which NUMERICS fast chooses them.
        **({"MODEL.FPN_EXT.CHANNELS_LAST": True, "MODEL.FPN_EXT.WINOGRAD": True}
           if numerics == "fast" else {}),
    }  # fmt: skip
    words = [str(word) for pair in values.items() for word in pair]
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml", [*words, *opts])
    resolve_numerics(cfg, words[::2])
    return cfg


def image():
    objects = Instances((128, 128))
    objects.gt_boxes = Boxes(torch.tensor([[20.0, 20.0, 90.0, 110.0]]))
    objects.gt_classes = torch.tensor([0])
    objects.gt_masks = PolygonMasks([[[20.0, 20.0, 90.0, 20.0, 90.0, 110.0]]])
    objects.gt_keypoints = Keypoints(torch.tensor([[[30.0, 40.0, 2.0]] * 17]))
    return {"image": torch.rand(3, 128, 128) * 255, "instances": objects}


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize(
    "branch",
    [["MODEL.MASK_ON", "True"], ["MODEL.KEYPOINT_ON", "True"],
     ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "ViewingMaskHead"],
     ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_HEADS.NAME", "AllLevelsROIHeads"]],
    ids=["mask", "keypoint", "viewing mask", "keypoint from all levels"],
)  # fmt: skip
def test_two_iterations_on_a_cpu(numerics, branch):
    model = Trainer.build_model(config(numerics, *branch)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with EventStorage():
        for _ in range(2):
            losses = model([image()])
            assert any(("mask" in name) or ("keypoint" in name) for name in losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_head_that_views_its_features_infers_in_the_optimised_model():
    model = Trainer.build_model(
        config("fast", "MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "ViewingMaskHead")
    ).eval()
    instances = image()["instances"]
    instances.pred_boxes, instances.pred_classes = instances.gt_boxes, instances.gt_classes
    instances.scores = torch.ones(1)
    quick = optimize_for_inference(model)
    picture = {"image": image()["image"], "height": 128, "width": 128}
    with torch.no_grad():
        (found,) = quick.inference([picture], [instances], do_postprocess=False)
    assert found.pred_masks.shape == (1, 1, 28, 28)


def test_the_box_and_mask_heads_of_detectron2_read_what_the_fast_pooling_wrote():
    """No copy for them; for a keypoint head, one."""
    heads = {
        branch: Trainer.build_model(config("fast", f"MODEL.{branch}_ON", "True")).roi_heads
        for branch in ("MASK", "KEYPOINT")
    }
    maps = [
        torch.rand(1, 256, 128 // 2**k, 128 // 2**k).to(memory_format=torch.channels_last)
        for k in (2, 3, 4, 5)
    ]
    boxes = [Boxes(torch.tensor([[20.0, 20.0, 90.0, 110.0], [0.0, 0.0, 30.0, 30.0]]))]
    for pooler in (heads["MASK"].box_pooler, heads["MASK"].mask_pooler):
        pooled = pooler(maps, boxes)
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        assert not pooled.is_contiguous()
    assert heads["KEYPOINT"].box_pooler(maps, boxes).stride()[1] == 1
    pooler = heads["KEYPOINT"].keypoint_pooler
    assert pooler(maps, boxes).is_contiguous()
    pooler.implementation = "per_level"
    reference = pooler(maps, boxes)
    pooler.implementation = "auto"
    torch.testing.assert_close(pooler(maps, boxes), reference, rtol=1e-4, atol=1e-5)


def test_convolutions_of_a_keypoint_head_stay_as_they_are():
    """Winograd's write channels_last."""
    heads = Trainer.build_model(config("fast", "MODEL.KEYPOINT_ON", "True")).roi_heads
    assert {type(m) for m in heads.keypoint_head.modules() if isinstance(m, Conv2d)} == {Conv2d}
