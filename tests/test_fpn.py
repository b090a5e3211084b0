import copy

import fpn_ext
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fpn_ext.modeling.fpn import FeaturePyramid
from fpn_ext.modeling.top_blocks import Subsample


class Stub(Backbone):
    """A bottom-up network with maps supplied by the test; records its input."""

    def __init__(self, channels, strides):
        super().__init__()
        self._out_features = [f"c{i}" for i in range(len(strides))]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self.maps = []

    def forward(self, image):
        return dict(zip(self._out_features, self.maps, strict=True))


class Pooling(Backbone):
    """A bottom-up network of average poolings: the image itself at strides 4 to 32, any size."""

    def __init__(self, channels=3):
        super().__init__()
        self._out_features = ["c2", "c3", "c4", "c5"]
        self.strides = [4, 8, 16, 32]
        self._out_feature_strides = dict(zip(self._out_features, self.strides, strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}
        for stride, name in zip(self.strides, self._out_features):  # noqa: B905 (TorchScript)
            maps[name] = torch.nn.functional.avg_pool2d(image, stride, ceil_mode=True)
        return maps


def pyramid_of_ones(bottom_up, **kwargs):
    """1x1 and centre-tap 3x3 convolutions with weight 1: what is left is upsampling and sums."""
    pyramid = FeaturePyramid(
        bottom_up=bottom_up, in_features=bottom_up._out_features, out_channels=1, **kwargs
    )
    for lateral, output in zip(pyramid.laterals, pyramid.outputs, strict=True):
        lateral.weight.data.fill_(1)
        output.weight.data.zero_()
        output.weight.data[:, :, 1, 1] = 1
    return pyramid


def test_two_levels_by_hand():
    bottom_up = Stub(channels=1, strides=[4, 8])
    bottom_up.maps = [
        torch.arange(16.0).reshape(1, 1, 4, 4),
        torch.tensor([[100.0, 200.0], [300.0, 400.0]]).reshape(1, 1, 2, 2),
    ]
    pyramid = pyramid_of_ones(bottom_up, top_block=Subsample("p3"))
    out = pyramid(torch.zeros(1, 3, 16, 16))
    assert list(out) == ["p2", "p3", "p4"]
    assert out["p3"].squeeze().tolist() == [[100, 200], [300, 400]]
    assert out["p2"].squeeze().tolist() == [
        [100, 101, 202, 203],
        [104, 105, 206, 207],
        [308, 309, 410, 411],
        [312, 313, 414, 415],
    ]
    assert out["p4"].squeeze().tolist() == 100  # every second cell, from the first


def test_mean_is_half_the_sum_at_every_step():
    bottom_up = Stub(channels=1, strides=[4, 8, 16])
    bottom_up.maps = [torch.full((1, 1, s, s), float(s)) for s in (4, 2, 1)]
    out = pyramid_of_ones(bottom_up, fuse_type="avg")(torch.zeros(1, 3, 16, 16))
    assert [out[p].unique().item() for p in ("p4", "p3", "p2")] == [1.0, 1.5, 2.75]


def test_the_top_down_pathway_takes_unsmoothed_maps():
    bottom_up = Stub(channels=1, strides=[4, 8])
    bottom_up.maps = [torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1)]
    pyramid = pyramid_of_ones(bottom_up)
    pyramid.fpn_output3.weight.data.mul_(10)  # the 3x3 of the coarser level
    out = pyramid(torch.zeros(1, 3, 8, 8))
    assert out["p3"].item() == 10
    assert out["p2"].squeeze().tolist() == [[1, 1], [1, 1]]


def test_every_level_has_its_3x3_the_coarsest_too():
    pyramid = FeaturePyramid(bottom_up=Pooling(), in_features=["c2", "c3", "c4", "c5"])
    for k in range(2, 6):
        assert getattr(pyramid, f"fpn_lateral{k}").kernel_size == (1, 1)
        assert getattr(pyramid, f"fpn_output{k}").kernel_size == (3, 3)
        assert getattr(pyramid, f"fpn_output{k}").activation is None
    assert {c.out_channels for c in pyramid.laterals + pyramid.outputs} == {256}


def test_initialisation():
    """Xavier as in Detectron (uniform, bound sqrt(3 / fan-in)), biases zero."""
    pyramid = FeaturePyramid(bottom_up=Pooling(64), in_features=["c2", "c3", "c4", "c5"])
    for convolution in pyramid.laterals + pyramid.outputs:
        bound = (3 / convolution.weight[0].numel()) ** 0.5
        assert convolution.weight.abs().max() <= bound
        assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not convolution.bias.any()


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_a_norm_takes_the_place_of_the_biases(norm):
    pyramid = FeaturePyramid(
        bottom_up=Pooling(), in_features=["c4", "c5"], out_channels=32, norm=norm
    )
    for convolution in pyramid.laterals + pyramid.outputs:
        assert convolution.bias is None and convolution.norm is not None


@pytest.mark.parametrize("size", [(64, 64), (101, 133), (33, 65), (32, 97), (1, 1)])
def test_any_input_size(size):
    pyramid = FeaturePyramid(
        bottom_up=Pooling(),
        in_features=["c2", "c3", "c4", "c5"],
        out_channels=4,
        top_block=Subsample("p5"),
    )
    out = pyramid(torch.rand(2, 3, *size))
    for k, features in zip(range(2, 7), out.values(), strict=True):
        assert features.shape == (2, 4, *(-(-side // 2**k) for side in size))
    assert {name: shape.stride for name, shape in pyramid.output_shape().items()} == {
        f"p{k}": 2**k for k in range(2, 7)
    }


def test_an_odd_size_upsamples_each_coarser_cell_over_its_own_part():
    """5 columns over 3: the nearest coarser cell of column j is floor(3 j / 5)."""
    bottom_up = Stub(channels=1, strides=[4, 8])
    bottom_up.maps = [torch.zeros(1, 1, 1, 5), torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)]
    out = pyramid_of_ones(bottom_up)(torch.zeros(1, 3, 4, 20))
    assert out["p2"].flatten().tolist() == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("size", [(64, 96), (75, 133)])  # in place where every side doubles
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits_with_and_without_gradients(size, fuse_type, memory_format):
    pyramid = FeaturePyramid(
        bottom_up=Pooling(), in_features=["c2", "c3", "c4", "c5"], fuse_type=fuse_type
    )
    image = torch.rand(2, 3, *size).contiguous(memory_format=memory_format)
    with torch.no_grad():
        without = pyramid(image)
    for name, with_gradients in pyramid(image).items():
        assert with_gradients.requires_grad
        assert torch.equal(with_gradients, without[name])


def test_what_the_bottom_up_holds_is_never_written_to():
    bottom_up = Stub(channels=1, strides=[4, 8])
    bottom_up.maps = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 2, 2)]
    before = [m.clone() for m in bottom_up.maps]
    with torch.no_grad():
        pyramid_of_ones(bottom_up)(torch.zeros(1, 3, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(before, bottom_up.maps, strict=True))


def test_channels_last_from_one_key(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    plain = build_backbone(small_cfg)
    small_cfg.MODEL.FPN_EXT.CHANNELS_LAST = True
    pyramid = build_backbone(small_cfg)
    pyramid.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 96)
    expected = plain(image)
    for name, found in pyramid(image).items():
        assert found.is_contiguous(memory_format=torch.channels_last), name
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_images():
    pyramid = FeaturePyramid(bottom_up=Pooling(), in_features=["c2", "c3", "c4", "c5"])
    images = torch.rand(3, 3, 64, 96)
    together = pyramid(images)
    for i in range(3):
        alone = pyramid(images[i : i + 1])
        for name in together:
            torch.testing.assert_close(together[name][i : i + 1], alone[name])


def test_an_empty_batch():
    pyramid = FeaturePyramid(bottom_up=Pooling(), in_features=["c2", "c3", "c4", "c5"])
    assert pyramid(torch.zeros(0, 3, 64, 64))["p2"].shape == (0, 256, 16, 16)


def test_gradients_reach_every_parameter(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(small_cfg)
    out = backbone(torch.rand(1, 3, 64, 64))
    sum(features.square().sum() for features in out.values()).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_bottom_up_of_any_registered_name(small_cfg):
    if "TestPoolingBackbone" not in BACKBONE_REGISTRY:

        @BACKBONE_REGISTRY.register()
        def TestPoolingBackbone(cfg, input_shape):
            return Pooling(input_shape.channels)

    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "TestPoolingBackbone"
    small_cfg.MODEL.FPN.IN_FEATURES = ["c3", "c4"]
    backbone = build_backbone(small_cfg)
    assert list(backbone(torch.rand(1, 3, 64, 64))) == ["p3", "p4", "p5"]  # P5 subsamples P4 here
    assert backbone.size_divisibility == 16


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets(small_cfg, depth):
    small_cfg.MODEL.RESNETS.DEPTH = depth
    small_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    backbone = build_backbone(small_cfg).eval()
    with torch.no_grad():
        out = backbone(torch.rand(1, 3, 64, 64))
    assert [tuple(f.shape[1:]) for f in out.values()] == [(32, s, s) for s in (16, 8, 4, 2, 1)]


def test_a_pyramid_can_stand_on_a_pyramid(small_cfg):
    """Both read MODEL.FPN.IN_FEATURES, so the outer one has a key of its own."""
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "build_resnet_fpn_backbone"
    small_cfg.MODEL.FPN_EXT.IN_FEATURES = ["p2", "p3", "p4"]
    pyramid = build_backbone(small_cfg)
    out = pyramid(torch.rand(1, 3, 64, 64))
    assert [tuple(f.shape[-2:]) for f in out.values()] == [(s, s) for s in (16, 8, 4, 2)]
    assert pyramid.size_divisibility == 32  # what the inner pyramid needs


def test_a_top_block_may_read_the_bottom_up():
    """Detectron2's LastLevelP6P7 on C5, as in RetinaNet, works."""
    pyramid = FeaturePyramid(
        bottom_up=Pooling(8),
        in_features=["c3", "c4", "c5"],
        out_channels=16,
        top_block=LastLevelP6P7(8, 16, in_feature="c5"),
    )
    out = pyramid(torch.rand(1, 8, 128, 128))
    assert [tuple(f.shape[-2:]) for f in out.values()] == [(s, s) for s in (16, 8, 4, 2, 1)]
    assert list(out) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.torchscript
def test_torchscript_equals_eager(small_cfg):
    backbone = build_backbone(small_cfg).eval()
    before = copy.deepcopy(backbone.state_dict())
    scripted = torch.jit.script(backbone)
    for size in [(64, 96), (101, 133)]:
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            eager, compiled = backbone(image), scripted(image)
        assert list(eager) == list(compiled)
        for name in eager:
            torch.testing.assert_close(eager[name], compiled[name], rtol=0, atol=0)
    assert list(backbone.state_dict()) == list(before), "scripting changed the module itself"


@pytest.mark.parametrize(
    "variant",
    [{}, {"fuse_type": "avg"}, {"norm": "GN"}, {"top_block": LastLevelP6P7(8, 32, "c5")}],
    ids=str,
)
@pytest.mark.torchscript
def test_torchscript_of_the_variants(variant):
    pyramid = FeaturePyramid(
        bottom_up=Pooling(8), in_features=["c3", "c4", "c5"], out_channels=32, **variant
    )
    scripted, image = torch.jit.script(pyramid), torch.rand(1, 8, 96, 64)
    for name, eager in pyramid(image).items():
        torch.testing.assert_close(eager, scripted(image)[name], rtol=0, atol=0)


@pytest.mark.torchscript
def test_torchscript_beside_detectron2s_own_preparation(small_cfg, monkeypatch):
    """detectron2.export gives ResNet a preparation of its own, which must find it untouched."""

    def prepare_resnet(self):
        prepared = copy.deepcopy(self)
        prepared.stages = torch.nn.ModuleList(prepared.stages)
        for name in self.stage_names:
            delattr(prepared, name)
        return prepared

    monkeypatch.setattr(ResNet, "__prepare_scriptable__", prepare_resnet, raising=False)
    backbone = build_backbone(small_cfg).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(image)["p2"], torch.jit.script(backbone)(image)["p2"])


def test_padding_constraints_are_those_of_the_bottom_up():
    """A property of every Backbone in Detectron2's main branch."""

    class Square(Pooling):
        padding_constraints = {"square_size": 64}  # noqa: RUF012

    plain, square = (FeaturePyramid(bottom_up=b(), in_features=["c2"]) for b in (Pooling, Square))
    assert plain.padding_constraints == {}
    assert square.padding_constraints == {"square_size": 64}


# What a user can get wrong, each with the YAML line to change.


def test_a_level_the_bottom_up_does_not_give(small_cfg):
    small_cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4"]
    with pytest.raises(ValueError, match=r"IN_FEATURES asks for \['res2', 'res5'\].*OUT_FEATURES"):
        build_backbone(small_cfg)


def test_an_unknown_bottom_up(small_cfg):
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "build_resnet_backbon"
    with pytest.raises(ValueError, match=r"BOTTOM_UP: .*nearest valid: 'build_resnet_backbone'"):
        build_backbone(small_cfg)


def test_a_pyramid_under_itself(small_cfg):
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "FeaturePyramid"
    with pytest.raises(ValueError, match=r"BOTTOM_UP must name the network under FeaturePyramid"):
        build_backbone(small_cfg)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": []}, r"MODEL\.FPN\.IN_FEATURES must list at least one"),
        ({"in_features": "c2"}, r"MODEL\.FPN\.IN_FEATURES must list at least one"),
        ({"in_features": ["c3", "c2"]}, r"MODEL\.FPN\.IN_FEATURES.*fine to coarse"),
        ({"out_channels": 0}, r"MODEL\.FPN\.OUT_CHANNELS.*got 0"),
        ({"norm": "bn"}, r"MODEL\.FPN\.NORM: no normalisation 'bn'; nearest|valid: .*'BN'"),
        ({"fuse_type": "max"}, r"MODEL\.FPN\.FUSE_TYPE.*got 'max'"),
        ({"top_block": Subsample("p9")}, r"in_feature must be one of .*got 'p9'"),
        ({"top_block": torch.nn.Identity()}, r"in_feature must be one of .*got None"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeaturePyramid(**{"bottom_up": Pooling(), "in_features": ["c2", "c3"], **kwargs})


def test_a_bottom_up_that_is_no_backbone():
    with pytest.raises(TypeError, match="Identity"):
        FeaturePyramid(bottom_up=torch.nn.Identity(), in_features=["c2"])


def test_a_bottom_up_that_does_not_say_its_stride():
    bottom_up = Pooling()
    bottom_up._out_feature_strides["c3"] = None
    with pytest.raises(ValueError, match=r"output_shape\(\) of Pooling must give stride .*'c3'"):
        FeaturePyramid(bottom_up=bottom_up, in_features=["c2", "c3"])


def test_it_is_registered_and_exported():
    assert BACKBONE_REGISTRY.get("FeaturePyramid") is fpn_ext.FeaturePyramid
