"""Pyramids of other papers: hand-computed, and on various levels, sizes and networks."""

import importlib.util
import re
from pathlib import Path

import fpn_ext
import pytest
import torch
from fpn_ext import FeaturePyramid, optimize_for_inference
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.config.defaults import flat
from fpn_ext.config.unread import unread_keys
from fpn_ext.modeling.top_blocks import Subsample
from fpn_ext.registries.lookup import pyramids
from fpn_ext.variants.ablations import UnsmoothedPyramid
from fpn_ext.variants.bifpn import BiFPN, BiFPNLayer, FusionNode, fuse
from fpn_ext.variants.lateral_norms import NormalizedLateralPyramid
from fpn_ext.variants.path_aggregation import AugmentationStep, PathAggregationPyramid
from fpn_ext.variants.peers import (
    JwyangPyramid,
    SmoothedRecursionPyramid,
    UnsmoothedTopPyramid,
)
from fpn_ext.variants.upsampling import (
    BilinearPyramid,
    BilinearSum,
    LearnedSum,
    LearnedUpsamplingPyramid,
)
from torch import nn

MERGING = [
    *(PathAggregationPyramid, BiFPN, BilinearPyramid, LearnedUpsamplingPyramid),
    *(SmoothedRecursionPyramid, JwyangPyramid),
]
VARIANTS = [*MERGING, NormalizedLateralPyramid, UnsmoothedPyramid, UnsmoothedTopPyramid]
CONFIGS = {
    "path_aggregation": PathAggregationPyramid,
    "bifpn": BiFPN,
    "bilinear": BilinearPyramid,
    "learned_upsampling": LearnedUpsamplingPyramid,
    "normalized_laterals": NormalizedLateralPyramid,
    "unsmoothed": UnsmoothedPyramid,
    "easy_fpn": UnsmoothedTopPyramid,
    "jwyang_fpn": JwyangPyramid,
}
# What a config changes beside the pyramid.
BESIDE = {
    "bifpn": {"MODEL.FPN.NORM"},
    "normalized_laterals": {"MODEL.FPN.NORM"},
    "easy_fpn": {"MODEL.PROPOSAL_GENERATOR.NAME"},
    "jwyang_fpn": {"MODEL.FPN_EXT.LEVEL_RULE"},
}
DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"  # MODEL.FPN.NORM BN
SMALL = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.DEVICE", "cpu"]


class Strided(Backbone):
    """A bottom-up of any strides, each map one convolution on the image; sides rounded up."""

    def __init__(self, strides=(4, 8, 16, 32)):
        super().__init__()
        self._out_features = [f"c{i}" for i in range(len(strides))]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, 4)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(3, 4, 3, stride=stride, padding=1) for stride in strides
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}
        for i, convolution in enumerate(self.convolutions):
            maps[self._out_features[i]] = convolution(image)
        return maps


class Constants(Backbone):
    """C2 = 1, C3 = 10, C4 = 100, C5 = 1000 everywhere, for any image."""

    def __init__(self):
        super().__init__()
        self._out_features = ["c2", "c3", "c4", "c5"]
        self._out_feature_strides = dict(zip(self._out_features, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, 1)

    def forward(self, image):
        n, _, height, width = image.shape
        return {
            name: torch.full((n, 1, -(-height // stride), -(-width // stride)), 10.0**i)
            for i, (name, stride) in enumerate(self._out_feature_strides.items())
        }


def build(variant, bottom_up, out_channels=4, **kwargs):
    if variant is NormalizedLateralPyramid:
        kwargs.setdefault("norm", "BN")
    in_features = bottom_up._out_features
    return variant(
        bottom_up=bottom_up, in_features=in_features, out_channels=out_channels, **kwargs
    )


def pass_on(module):
    """Every convolution with weight 1 in its middle, of channels their own: it passes on."""
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d):
            nn.init.dirac_(convolution.weight, convolution.groups)


def unique(maps):
    return {name: round(m.unique().item(), 2) for name, m in maps.items()}


# PANet


def test_path_aggregation_of_constants():
    """P5 = 1000, P4 = 1100, P3 = 1110, P2 = 1111; N2 = P2, N3 = N2 + P3, ..., P6 is of N5."""
    pyramid = build(PathAggregationPyramid, Constants(), 1, top_block=Subsample("p5"))
    pass_on(pyramid)
    for size in ((64, 128), (70, 97)):
        found = unique(pyramid(torch.zeros(2, 3, *size)))
        assert found == {"p2": 1111, "p3": 2221, "p4": 3321, "p5": 4321, "p6": 4321}


def test_a_step_of_the_augmented_path_by_hand():
    """Every second cell of N_i, cut off at 0, plus P_{i+1}; the sum cut off at 0, too."""
    step = AugmentationStep(1)
    pass_on(step)
    finer = torch.arange(-12.0, 13.0).reshape(1, 1, 5, 5)
    coarser = torch.tensor([[1.0, 2, 3], [-4, -5, -6], [-7, -8, -13]]).reshape(1, 1, 3, 3)
    assert step(finer, coarser).squeeze().tolist() == [[1, 2, 3], [0, 0, 0], [1, 2, 0]]


def test_no_cell_is_left_out_between_two_over_a_gap():
    for stride in (2, 3, 4, 5):
        step = AugmentationStep(1, stride)
        nn.init.ones_(step.down.weight)
        side = 3 * stride
        image = torch.ones(1, 1, side, side, requires_grad=True)
        step.down(image).sum().backward()
        assert image.grad[..., : side - stride + 1, : side - stride + 1].min() > 0
        assert step.down(image).shape[-1] == 3
    assert AugmentationStep(1).down.kernel_size == (3, 3)  # the paper's


# BiFPN


def test_fast_normalised_fusion_of_two_numbers():
    maps = [torch.tensor(10.0), torch.tensor(20.0)]
    assert fuse(maps, torch.tensor([1.0, 3.0])).item() == pytest.approx(70 / 4.0001)
    assert fuse(maps, torch.tensor([-1.0, 3.0])).item() == pytest.approx(60 / 3.0001)
    assert fuse(maps, torch.tensor([0.0, 0.0])).item() == 0


def layer_of_means(names):
    """A layer without its convolutions: each node is the weighted mean of its maps."""
    layer = BiFPNLayer(names, 1, "")
    for node in layer.modules():
        if isinstance(node, FusionNode):
            node.depthwise, node.pointwise = nn.Identity(), nn.Identity()
    return layer


def test_a_layer_of_constants():
    """With equal weights: means of what each node of Fig. 2(d) has coming in."""
    layer = layer_of_means(["p3", "p4", "p5"])
    p3, p4, p5 = (torch.full((1, 1, s, s), v) for s, v in ((8, 12.0), (4, 6.0), (2, 18.0)))
    td4 = (6 + 18) / 2
    out3 = (12 + td4) / 2
    out4 = (6 + td4 + out3) / 3
    out5 = (18 + out4) / 2
    found = layer([p3, p4, p5])
    for features, expected, given in zip(found, (out3, out4, out5), (p3, p4, p5), strict=True):
        assert features.shape == given.shape
        torch.testing.assert_close(features, torch.full_like(given, expected), rtol=1e-3, atol=0)


def test_each_edge_has_a_weight_of_its_own():
    """With all weight on the input, a layer is the identity; on the other edge, it returns that."""
    names = ["p3", "p4", "p5"]
    maps = [torch.rand(1, 1, s, s) for s in (8, 4, 2)]
    layer = layer_of_means(names)
    for node in (*layer.top_down.values(), *layer.bottom_up.values()):
        node.weights.data[1:] = 0
    for found, given in zip(layer(maps), maps, strict=True):
        torch.testing.assert_close(found, given, rtol=2e-3, atol=0)
    layer.bottom_up["p5"].weights.data.copy_(torch.tensor([0.0, 1.0]))  # from P4, max-pooled
    expected = nn.functional.max_pool2d(maps[1], 2)
    torch.testing.assert_close(layer(maps)[2], expected, rtol=2e-3, atol=0)
    layer.top_down["p3"].weights.data.copy_(torch.tensor([0.0, 1.0]))  # from P4, upsampled
    expected = maps[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(maps)[0], expected, rtol=2e-3, atol=0)


def test_a_node_is_depthwise_separable_with_norm_and_silu():
    node = FusionNode(2, 8, "BN")
    assert node.depthwise.groups == 8 and node.depthwise.kernel_size == (3, 3)
    assert node.pointwise.kernel_size == (1, 1) and isinstance(node.pointwise.norm, nn.BatchNorm2d)
    found = node([torch.full((1, 8, 2, 2), -1.0).cumsum(1)] * 2)
    assert -0.2785 < found.min() < 0, "SiLU's least value"
    assert sorted(name for name, _ in node.named_parameters()) == [
        *("depthwise.weight", "pointwise.norm.bias", "pointwise.norm.weight"),
        *("pointwise.weight", "weights"),
    ]


def test_levels_on_top_take_part_in_the_fusion():
    pyramid = build(BiFPN, Strided(), repeats=1, top_block=Subsample("p5"))
    before = pyramid(torch.rand(1, 3, 64, 64))["p2"].sum()
    weights = pyramid.bifpn[0].top_down["p5"].weights
    (gradient,) = torch.autograd.grad(before, weights)
    assert gradient.abs().sum() > 0 and len(pyramid.bifpn[0].top_down) == 4


def test_repeats_from_yaml():
    opts = ["MODEL.BACKBONE.NAME", "BiFPN", "MODEL.FPN_EXT.BIFPN_REPEATS", "2", *SMALL]
    cfg = fpn_ext.load_config(DEMO, opts)
    assert len(build_backbone(cfg).bifpn) == 2
    assert "MODEL.FPN_EXT.BIFPN_REPEATS" not in unread_keys(cfg)
    assert "MODEL.FPN_EXT.BIFPN_REPEATS" in unread_keys(fpn_ext.load_config(DEMO))
    cfg.MODEL.FPN_EXT.BIFPN_REPEATS = 0
    for refuse in (fpn_ext.check_config, build_backbone):
        with pytest.raises(ValueError, match=r"MODEL\.FPN_EXT\.BIFPN_REPEATS .* at least 1, got 0"):
            refuse(cfg)


# Upsampling


def test_a_ramp_upsampled_bilinearly():
    """Values stand at the cells' centres: between 10 and 20, a quarter and three quarters."""
    ramp = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 1, 1, 3)
    found = BilinearSum()(torch.full((1, 1, 2, 6), 100.0), ramp)
    expected = torch.tensor([110, 112.5, 117.5, 122.5, 127.5, 130])
    torch.testing.assert_close(found[0, 0], expected.expand(2, 6))
    odd = BilinearSum()(torch.zeros(1, 1, 1, 5), ramp)
    assert odd.shape == (1, 1, 1, 5) and odd[..., 2].item() == 20  # the middle of both


def test_learned_upsampling_by_hand():
    """A cell x of the coarser map is x w in its 2 x 2 cells; what hangs over is left out."""
    step = LearnedSum(1)
    step.up.weight.data.copy_(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    coarser = torch.tensor([[1.0, 10.0]]).reshape(1, 1, 1, 2)
    found = step(torch.full((1, 1, 2, 4), 0.5), coarser).squeeze()
    assert found.tolist() == [[1.5, 2.5, 10.5, 20.5], [3.5, 4.5, 30.5, 40.5]]
    found = step(torch.zeros(1, 1, 1, 3), coarser).squeeze()
    assert found.tolist() == [1, 2, 10]


@pytest.mark.parametrize(
    ("strides", "size"),
    [
        ([4, 8, 16, 32], (128, 96)),
        ([4, 8, 16, 32], (95, 131)),
        ([4, 16, 32], (128, 96)),
        ([6, 18], (144, 54)),
    ],
)
def test_learned_upsampling_starts_as_nearest_neighbour(strides, size):
    learned = build(LearnedUpsamplingPyramid, Strided(strides))
    plain = build(FeaturePyramid, learned.bottom_up)
    missing = plain.load_state_dict(learned.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(name.startswith("fpn_upsample") for name in missing.unexpected_keys)
    image = torch.rand(1, 3, *size)
    for name, features in plain(image).items():
        torch.testing.assert_close(learned(image)[name], features)


# Normalised laterals


def test_a_norm_after_the_laterals_alone():
    pyramid = build(NormalizedLateralPyramid, Strided(), 32, norm="GN")
    for lateral, output in zip(pyramid.laterals, pyramid.outputs, strict=True):
        assert isinstance(lateral.norm, nn.GroupNorm) and lateral.bias is None
        assert output.norm is None and not output.bias.any()
    image = 50 * torch.rand(1, 3, 64, 64)
    normed = pyramid.fpn_lateral2(pyramid.bottom_up(image)["c0"])
    assert normed.mean().item() == pytest.approx(0, abs=1e-4)
    assert normed.std().item() == pytest.approx(1, abs=0.05)
    plain = build(FeaturePyramid, Strided(), 32)
    names = {name for name in pyramid.state_dict() if "norm" not in name}
    assert names | {f"fpn_lateral{k}.bias" for k in range(2, 6)} == set(plain.state_dict())


def test_without_a_norm_there_is_nothing_to_do():
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.NORM is empty.*use FeaturePyramid"):
        build(NormalizedLateralPyramid, Strided(), norm="")


# All of them


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("strides", "names"),
    [
        ([4, 8, 16, 32], ["p2", "p3", "p4", "p5", "p6", "p7"]),
        ([2, 6, 24], ["p1", "ps6", "ps24", "ps48", "ps96"]),
        ([4, 6], ["p2", "ps6", "ps12", "ps24"]),
    ],
)
@pytest.mark.torchscript
def test_any_levels_any_size_export_and_torchscript(variant, strides, names):
    top_block = Subsample(names[len(strides) - 1], num_levels=2)
    kwargs = {"repeats": 1} if variant is BiFPN else {}
    pyramid = build(variant, Strided(strides), top_block=top_block, **kwargs).eval()
    image = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        maps = pyramid(image)
        scripted = torch.jit.script(pyramid)(image)
        exported = torch.export.export(pyramid, (image,)).module()(image)
    assert list(maps) == list(pyramid.output_shape()) == names == list(scripted) == list(exported)
    for name, features in maps.items():
        stride = pyramid.output_shape()[name].stride
        assert features.shape == (1, 4, -(-97 // stride), -(-131 // stride))
        torch.testing.assert_close(scripted[name], features)
        torch.testing.assert_close(exported[name], features)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    pyramid = build(variant, Strided(), 8, top_block=Subsample("p5"))
    maps = pyramid(torch.rand(2, 3, 130, 97))
    sum(features.square().sum() for features in maps.values()).backward()
    without = [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_is_its_images_and_memory_is_as_asked(variant, channels_last):
    pyramid = build(variant, Strided(), channels_last=channels_last).eval()
    images = torch.rand(3, 3, 75, 96)
    with torch.no_grad():
        together = pyramid(images)
        alone = pyramid(images[1:2])
    recorded = pyramid(images)
    for name, features in together.items():
        torch.testing.assert_close(features[1:2], alone[name])
        torch.testing.assert_close(recorded[name], features)
        if channels_last:
            assert features.is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in pyramid.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights) or (
        not channels_last
    )


@pytest.mark.parametrize(
    ("variant", "pattern"),
    [
        (PathAggregationPyramid, r"pan[3-5]\.(down|output)\.(weight|bias)"),
        (
            BiFPN,
            r"bifpn\.[0-2]\.(top_down\.p[2-4]|bottom_up\.p[3-5])"
            r"\.(weights|depthwise\.weight|pointwise\.(weight|bias))",
        ),
        (BilinearPyramid, "nothing"),
        (LearnedUpsamplingPyramid, r"fpn_upsample[2-4]\.up\.(weight|bias)"),
        (SmoothedRecursionPyramid, "nothing"),
    ],
)
def test_names_of_parameters(variant, pattern):
    plain = set(build(FeaturePyramid, Strided()).state_dict())
    found = set(build(variant, Strided()).state_dict())
    assert all(re.fullmatch(pattern, name) for name in found - plain)
    lost = {name for name in plain - found if "fpn_output" not in name}
    assert lost == set() and (found >= plain) == (variant is not BiFPN)


@pytest.mark.parametrize("variant", MERGING)
def test_one_level_has_nothing_to_merge_with(variant):
    with pytest.raises(ValueError, match=rf"{variant.__name__} .*at least two, got \['p3'\]"):
        build(variant, Strided([8]))
    if variant is BiFPN:  # its levels on top count
        assert list(build(BiFPN, Strided([8]), top_block=Subsample("p3"))(torch.rand(1, 3, 9, 9)))


def test_one_level_with_a_normalised_lateral():
    assert list(build(NormalizedLateralPyramid, Strided([8]))(torch.rand(1, 3, 64, 64))) == ["p3"]


@pytest.mark.parametrize(
    "variant", [BiFPN, BilinearPyramid, LearnedUpsamplingPyramid, JwyangPyramid]
)
def test_a_mean_where_there_is_none(variant):
    with pytest.raises(ValueError, match=rf"FUSE_TYPE must be 'sum' .*{variant.__name__}, .*'avg'"):
        build(variant, Strided(), fuse_type="avg")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_its_config_trains(name):
    """Levels by the one key, on a network of torchvision, with P6 and P7 by convolutions on C5."""
    variant = CONFIGS[name]
    opts = [
        *("MODEL.FPN_EXT.LEVELS", "['p3', 'p4', 'p5', 'p6', 'p7']"),
        *("MODEL.FPN_EXT.BOTTOM_UP", "torchvision/mobilenet_v3_small"),
        *("MODEL.FPN_EXT.TOP_BLOCK", "ConvolutionsOnC", "MODEL.FPN_EXT.KEEP_PIXELS", "True"),
        *("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.FPN.OUT_CHANNELS", "32"),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "9999", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
        *("MODEL.DEVICE", "cpu"),
    ]
    cfg = fpn_ext.load_config(f"configs/variants/{name}.yaml", opts)
    fpn_ext.check_config(cfg)
    assert variant.__name__ in pyramids() and getattr(fpn_ext, variant.__name__) is variant
    model = build_model(cfg)
    assert type(model.backbone) is variant
    image = torch.randint(0, 255, (3, 131, 97), dtype=torch.uint8)
    truth = Instances(
        (131, 97),
        gt_boxes=Boxes(torch.tensor([[5.0, 5, 45, 60]])),
        gt_classes=torch.tensor([0]),
    )
    inputs = [{"image": image, "instances": truth}] * 2
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with EventStorage():
        for _ in range(2):
            optimizer.zero_grad()
            loss = sum(model(inputs).values())
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
    parameters = model.backbone.named_parameters()
    assert [n for n, p in parameters if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimised_for_inference(variant, dtype, small_cfg, monkeypatch):
    monkeypatch.setattr("fpn_ext.kernels.winograd.FEWEST_CHANNELS", 32)
    monkeypatch.setattr("fpn_ext.kernels.winograd.SMALLEST_MAP", 128)
    small_cfg.MODEL.BACKBONE.NAME = variant.__name__
    small_cfg.MODEL.FPN.NORM = "BN"
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    model = build_model(small_cfg).eval()
    for name, tensor in model.backbone.state_dict().items():
        if "fpn" in name and "running_mean" in name:
            tensor.normal_(0, 0.1)
    image = torch.rand(1, 3, 64, 96)
    optimised = optimize_for_inference(model, dtype)
    with torch.no_grad():
        expected, found = model.backbone(image), optimised.backbone(image)
        assert optimised([{"image": image[0]}])[0]["instances"] is not None
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name, features in expected.items():
        scale = features.abs().max().item()
        torch.testing.assert_close(found[name].float(), features, rtol=0, atol=tolerance * scale)
        assert found[name].is_contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimised.backbone.modules())


# Configs and documents


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_differs_in_what_it_is_about(name):
    ours = flat(fpn_ext.load_config(f"configs/variants/{name}.yaml"))
    base = flat(fpn_ext.load_config("configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"))
    different = {key for key in ours if ours[key] != base[key]} - {"OUTPUT_DIR"}
    assert different == {"MODEL.BACKBONE.NAME"} | BESIDE.get(name, set())
    assert ours["MODEL.BACKBONE.NAME"] == CONFIGS[name].__name__


def test_there_is_a_config_for_each():
    assert {file.stem for file in Path("configs/variants").glob("*.yaml")} == set(CONFIGS)


def test_the_document_has_every_variant_and_what_it_costs():
    text = Path("docs/guides/variants.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text, flags=re.M)
    described, costed = named[: len(named) // 2], named[len(named) // 2 :]
    expected = sorted(["FeaturePyramid", *(variant.__name__ for variant in CONFIGS.values())])
    assert sorted(described) == sorted(costed) == expected


@pytest.mark.torchscript
def test_the_example_of_a_pyramid_of_ones_own(tmp_path):
    document = Path("docs/guides/variants.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, flags=re.S)
    (tmp_path / "own_pyramid.py").write_text(code)  # TorchScript reads the file
    spec = importlib.util.spec_from_file_location("own_pyramid", tmp_path / "own_pyramid.py")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        levels = "['p2', 'p4', 'p5', 'p6']"
        opts = ["MODEL.BACKBONE.NAME", "LargerOfTwoFPN", "MODEL.FPN_EXT.LEVELS", levels, *SMALL]
        cfg = fpn_ext.load_config(DEMO, opts)
        fpn_ext.check_config(cfg)
        pyramid = build_backbone(cfg).eval()
        image = torch.rand(1, 3, 70, 99)
        maps, scripted = pyramid(image), torch.jit.script(pyramid)(image)
        assert list(maps) == ["p2", "p4", "p5", "p6"] == list(scripted)
        torch.testing.assert_close(maps["p2"], scripted["p2"])
    finally:
        BACKBONE_REGISTRY._obj_map.pop("LargerOfTwoFPN", None)
