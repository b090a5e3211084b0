"""Bottom-ups by name. Random weights: nothing is downloaded."""

import copy
import importlib.util
import os
import sys
from pathlib import Path

import fpn_ext
import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from fpn_ext.bottom_up import libraries
from fpn_ext.bottom_up.build import build_bottom_up
from fpn_ext.bottom_up.freezing import freeze
from fpn_ext.config.prepare import check_weights
from fpn_ext.data import demo_data
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import backbones

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
SMALLEST = [
    "torchvision/mobilenet_v3_small",
    pytest.param("timm/test_resnet", marks=needs_timm),
    pytest.param("timm/mambaout_femto", marks=needs_timm),  # channels last
    "detectron2/regnetx_400mf",
]


@pytest.fixture
def cfg(small_cfg):
    """A small Faster R-CNN, to be given another bottom-up."""
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    small_cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]  # Detectron2's default
    return small_cfg


def resolved(cfg, name, **own):
    cfg.MODEL.FPN_EXT.BOTTOM_UP = name
    for key, value in own.items():
        cfg.MODEL.FPN_EXT[key] = value
    fpn_ext.resolve_bottom_up(cfg)
    return cfg


def bottom_up(cfg, name, **own):
    return build_backbone(resolved(cfg, name, **own)).bottom_up


def without_gradient(backbone, size=(96, 160)):
    maps = backbone(torch.rand(1, 3, *size))
    sum(features.square().sum() for features in maps.values()).backward()
    return [n for n, p in backbone.named_parameters() if p.grad is None]


# What is built


@pytest.mark.parametrize("name", SMALLEST)
def test_one_line_puts_the_pyramid_on_another_network(cfg, name):
    """All of MODEL.FPN.IN_FEATURES is still that of a ResNet: res2..res5 become the C_k."""
    backbone = build_backbone(resolved(cfg, name)).eval()
    image = torch.rand(2, 3, 97, 131)
    with torch.no_grad():
        maps = backbone(image)
        below = backbone.bottom_up(image)
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    for k, features in zip(range(2, 7), maps.values(), strict=True):
        assert features.shape == (2, 32, *(-(-side // 2**k) for side in (97, 131)))
    for level, name in zip((2, 3, 4, 5), backbone.in_features, strict=True):
        shape = backbone.bottom_up.output_shape()[name]
        assert shape.stride == 2**level
        assert below[name].shape[1] == shape.channels


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_there_is_gets_a_gradient(cfg, name):
    assert without_gradient(build_backbone(resolved(cfg, name))) == []


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("torchvision/resnet18", ("layer4", "fc")),
        pytest.param("timm/test_resnet", ("layer4", "fc"), marks=needs_timm),
        ("detectron2/regnetx_400mf", ("s4",)),
    ],
)
def test_stages_above_the_last_map_are_not_built(cfg, name, absent):
    backbone = build_backbone(resolved(cfg, name, IN_FEATURES=["c3", "c4"]))
    assert list(backbone.output_shape()) == ["p3", "p4", "p5"]
    assert without_gradient(backbone) == []
    names = [n for n, _ in backbone.bottom_up.named_modules()]
    assert not [n for n in names if any(part in absent for part in n.split("."))]


def test_the_maps_are_those_of_the_network_itself(cfg):
    """C2..C5 are where torchvision's stages end, C5 what its classifier pools."""
    ours = bottom_up(cfg, "torchvision/resnet18").eval()
    theirs = torchvision.models.resnet18(weights=None).eval()
    assert not theirs.load_state_dict(ours.body.state_dict(), strict=False).unexpected_keys
    image = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for k, stage in enumerate((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), 2):
            x = stage(x)
            torch.testing.assert_close(ours(image)[f"c{k}"], x)


@needs_timm
def test_the_maps_of_timm_are_those_of_the_network_itself(cfg):
    import timm

    ours = bottom_up(cfg, "timm/mambaout_femto", IN_FEATURES=["c3", "c4"]).eval()
    theirs = timm.create_model("mambaout_femto", features_only=True, out_indices=[1, 2]).eval()
    theirs.load_state_dict(ours.body.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(ours(image).values(), theirs(image), strict=True):
            assert expected.shape[3] == found.shape[1], "channels last in timm"
            assert torch.equal(found, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        # Not layer2.0.relu: a node of stride 4 too, and a later one, but of the next stage.
        ("resnet50", ["relu", "layer1.2.relu_2", "layer2.3.relu_2", "layer3.5.relu_2",
                      "layer4.2.relu_2"]),
        ("mobilenet_v2", ["features.1.conv.2", "features.3.add", "features.6.add",
                          "features.13.add", "features.18"]),
        ("densenet121", ["features.relu0", "features.denseblock1.cat", "features.denseblock2.cat",
                         "features.denseblock3.cat", "relu"]),
        # Not the convolution of its classifier.
        ("squeezenet1_1", ["features.1", "features.4.cat", "features.7.cat", "features.12.cat"]),
    ],
)  # fmt: skip
def test_where_the_stages_of_a_traced_network_end(name, nodes):
    network = libraries.LIBRARIES["torchvision"].build(name, 3)
    assert [found.key for found in network.found.maps] == nodes


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", pytest.param("timm/test_resnet", marks=needs_timm)]
)
def test_images_of_other_than_three_channels(cfg, name, channels):
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [100.0] * channels
    backbone = build_backbone(resolved(cfg, name))
    assert backbone(torch.rand(1, channels, 64, 64))["p2"].shape == (1, 32, 16, 16)
    assert [100.0] * channels == cfg.MODEL.PIXEL_MEAN, "there is nothing to follow"


@needs_timm
def test_a_network_that_takes_multiples_only_says_so(cfg):
    backbone = build_backbone(resolved(cfg, "timm/hrnet_w18_small"))
    assert (backbone.bottom_up.size_divisibility, backbone.size_divisibility) == (32, 32)


# Tried by the benchmark alone: seconds each.
SLOW = ("torchvision/maxvit_t", "timm/maxvit_nano_rw_256", "torchvision/wide_resnet50_2")
FULLY = ("torchvision/shufflenet_v2_x0_5", "timm/test_convnext", "detectron2/regnetx_400mf")


@pytest.mark.parametrize("name", [name for name in backbones.FAMILIES if name not in SLOW + FULLY])
def test_the_families_of_the_table_build(cfg, name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    for key, value in backbones.OPTIONS.get(name, {}).items():
        cfg.merge_from_list([key, value])
    resolved(cfg, name)
    if name in backbones.REFUSED:
        with pytest.raises(ValueError, match=name):
            build_backbone(cfg)
    else:
        backbone = build_backbone(cfg)
        assert set(backbone.in_features) <= set(backbone.bottom_up.output_shape())


@pytest.fixture(scope="module")
def demo_images():
    root = Path(os.environ["DETECTRON2_DATASETS"], "demo_multiscale")
    demo_data.ensure(root, num_train=6, num_val=4)  # as tests/test_train.py makes it


@pytest.mark.parametrize("name", FULLY)
def test_families_train_and_evaluate(demo_images, tmp_path, name):
    """As benchmarks/backbones.py does for its table: two steps and the demo's evaluation."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    row = backbones.tried(name, tmp_path)
    assert row["outcome"] == "pass", row
    assert row["parameters"] > 1e5 and row["multiply_adds"] > 1e8
    assert [stride for stride, _ in row["maps"]] == [4, 8, 16, 32]


def test_a_family_that_fails_is_a_row_that_says_why(tmp_path):
    row = backbones.tried("torchvision/vit_b_32", tmp_path)
    assert row["outcome"].startswith("ValueError: MODEL.FPN_EXT.BOTTOM_UP torchvision/vit_b_32: it")
    _, why = backbones.tables([row])
    assert "one size only" in why


# Export


@pytest.mark.parametrize("name", [n for n in SMALLEST if n != "detectron2/regnetx_400mf"])
@pytest.mark.torchscript
def test_torchscript(cfg, name):
    """Not Detectron2's RegNet, whose own forward cannot be scripted."""
    backbone = build_backbone(resolved(cfg, name)).eval()
    scripted = torch.jit.script(backbone)
    with torch.no_grad():
        for size in ((96, 64), (97, 131)):
            image = torch.rand(1, 3, *size)
            for name, expected in backbone(image).items():
                torch.testing.assert_close(scripted(image)[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALLEST)
def test_export(cfg, name):
    backbone = build_backbone(resolved(cfg, name)).eval()
    image = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        exported = torch.export.export(backbone, (image,)).module()
        for name, expected in backbone(image).items():
            torch.testing.assert_close(exported(image)[name], expected)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "detectron2/regnetx_400mf"])
def test_the_whole_model_optimised_for_inference(cfg, name):
    model = build_model(resolved(cfg, name)).eval()
    optimised = fpn_ext.optimize_for_inference(model)
    images = [{"image": torch.randint(0, 255, (3, 90, 120)).float()}]
    with torch.no_grad():
        expected, found = (m(copy.deepcopy(images))[0]["instances"] for m in (model, optimised))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


# Images are normalised as the network needs


def test_pixels_at_detectron2s_defaults_follow_the_network(cfg):
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "torchvision/resnet18"
    assert fpn_ext.resolve_bottom_up(cfg) == [
        "INPUT.FORMAT is RGB, as torchvision/resnet18 was trained with",
        "MODEL.PIXEL_MEAN is [123.675, 116.28, 103.53], as torchvision/resnet18 was trained with",
        "MODEL.PIXEL_STD is [58.395, 57.12, 57.375], as torchvision/resnet18 was trained with",
    ]
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert fpn_ext.resolve_bottom_up(cfg) == [], "a second time there is nothing left"


def test_the_same_statistics_in_the_order_given_are_no_conflict(cfg):
    """As the demo's config has them: BGR."""
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    resolved(cfg, "torchvision/resnet18")
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_regnet_of_detectron2_was_trained_in_bgr(cfg):
    resolved(cfg, "detectron2/regnety_400mf")
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD) == ("BGR", [57.375, 57.12, 58.395])


@needs_timm
def test_statistics_of_one_of_timms_networks(cfg):
    resolved(cfg, "timm/test_resnet")
    assert cfg.MODEL.PIXEL_MEAN == [127.5] * 3 == cfg.MODEL.PIXEL_STD


def test_a_resnet_of_detectron2_changes_nothing(cfg):
    before = copy.deepcopy(cfg)
    assert fpn_ext.resolve_bottom_up(cfg) == [] and cfg == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("PIXEL_MEAN", [1.0, 2.0, 3.0],
         r"PIXEL_MEAN is \[1\.0, 2\.0, 3\.0\], but torchvision/resnet18 was trained with "
         r"\[123\.675, 116\.28, 103\.53\] \(RGB\)\n.*KEEP_PIXELS True"),
        ("PIXEL_STD", [255.0, 255.0, 255.0], r"PIXEL_STD is \[255\.0, .*\[58\.395, 57\.12"),
    ],
)  # fmt: skip
def test_a_conflicting_value(cfg, key, value, message):
    cfg.MODEL[key] = value
    before = copy.deepcopy(cfg)
    before.MODEL.FPN_EXT.BOTTOM_UP = "torchvision/resnet18"
    with pytest.raises(ValueError, match=message):
        resolved(cfg, "torchvision/resnet18")
    assert cfg == before
    assert resolved(cfg, "torchvision/resnet18", KEEP_PIXELS=True).MODEL[key] == value
    assert build_backbone(cfg)


def test_a_conflicting_order_of_channels(cfg):
    cfg.INPUT.FORMAT = "RGB"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is RGB, but detectron2.* with BGR"):
        resolved(cfg, "detectron2/regnetx_400mf")


def test_building_without_that_step_is_an_error(cfg):
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "torchvision/resnet18"
    with pytest.raises(ValueError, match=r"call fpn_ext\.resolve_bottom_up\(cfg\) before"):
        build_backbone(cfg)


# Freezing, norms, weights


def frozen(module):
    return {name for name, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("name", "stage", "parts"),
    [
        ("torchvision/resnet18", 1, {"conv1"}),
        ("torchvision/resnet18", 2, {"conv1", "layer1"}),
        ("torchvision/resnet18", 3, {"conv1", "layer1", "layer2"}),
        ("detectron2/regnetx_400mf", 2, {"stem", "s1"}),
        pytest.param("timm/test_convnext", 2, {"stem_0", "stem_1", "stages_0"}, marks=needs_timm),
    ],
)
def test_freeze_at_freezes_up_to_a_map(cfg, name, stage, parts):
    cfg.MODEL.BACKBONE.FREEZE_AT = stage
    network = bottom_up(cfg, name)
    body = getattr(network, "body", network)
    assert {n.split(".")[0] for n in frozen(body)} == parts
    for path, module in body.named_modules():
        if path.split(".")[0] in parts:
            assert not isinstance(module, nn.BatchNorm2d), path
        assert not isinstance(module, FrozenBatchNorm2d) or path.split(".")[0] in (*parts, "bn1")


@needs_timm
@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("timm/test_convnext", 1, r"FREEZE_AT 1 .* c1, of stride 2.*gives \['c2', .*set it to 0"),
        ("timm/hrnet_w18_small", 2, r"FREEZE_AT 2 .*makes c2 beside the coarser maps.*FREEZE"),
    ],
)
def test_freeze_at_that_cannot_be_honoured(cfg, name, stage, message):
    cfg.MODEL.BACKBONE.FREEZE_AT = stage
    with pytest.raises(ValueError, match=message):
        bottom_up(cfg, name)


def test_freezing_by_name(cfg):
    model = build_model(resolved(cfg, "torchvision/resnet18"))
    freeze(model, ["backbone.bottom_up.body.layer1"])
    assert {name.split(".")[3] for name in frozen(model)} == {"layer1"}
    with pytest.raises(ValueError, match=r"nearest valid: 'backbone\.bottom_up\.body\.layer1'"):
        freeze(model, ["backbone.bottom_up.body.layr1"])


@pytest.mark.parametrize(
    ("kind", "norm"),
    [("FrozenBN", FrozenBatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("GN", nn.GroupNorm)],
)
@pytest.mark.parametrize(
    "name", ["torchvision/shufflenet_v2_x0_5", pytest.param("timm/test_resnet", marks=needs_timm)]
)
def test_other_norms(cfg, name, kind, norm):
    """ShuffleNet has 58 channels in places: as many groups as divide both them and 32."""
    network = bottom_up(cfg, name, BOTTOM_UP_NORM=kind)
    norms = [m for m in network.modules() if isinstance(m, norm)]
    assert len(norms) > 10
    assert kind == "SyncBN" or not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert network.eval()(torch.rand(1, 3, 64, 64))["c2"].isfinite().all()


def test_a_norm_where_there_is_none_to_replace(cfg):
    with pytest.raises(ValueError, match=r"BOTTOM_UP_NORM GN: build_resnet_backbone has no batch"):
        bottom_up(cfg, "build_resnet_backbone", BOTTOM_UP_NORM="GN")  # its norms are frozen ones


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", pytest.param("timm/test_convnext", marks=needs_timm)]
)
def test_pretrained_weights(cfg, tmp_path, name):
    """Weights of the whole network, including the classifier, as saved by its library."""
    library, _, network = name.partition("/")
    if library == "timm":
        import timm

        whole = timm.create_model(network)
    else:
        whole = torchvision.models.get_model(network, weights=None)
    file = tmp_path / "whole.pth"
    torch.save(whole.state_dict(), file)
    ours = bottom_up(cfg, name, BOTTOM_UP_WEIGHTS=str(file), BOTTOM_UP_NORM="FrozenBN"
                     if library == "torchvision" else "").body  # fmt: skip
    theirs = [tensor for tensor in whole.state_dict().values() if tensor.dim() > 1]
    loaded = [tensor for tensor in ours.state_dict().values() if tensor.dim() > 1]
    assert len(loaded) == len(theirs) - 1, "all but the classifier"
    assert all(any(torch.equal(t, o) for o in theirs if o.shape == t.shape) for t in loaded)


def test_weights_of_the_whole_model_come_first(cfg, caplog):
    caplog.set_level("INFO", logger="fpn_ext")
    cfg.MODEL.WEIGHTS = "model_final.pth"
    bottom_up(cfg, "torchvision/shufflenet_v2_x0_5", BOTTOM_UP_WEIGHTS="no_longer_there.pth")
    assert "no_longer_there.pth is not read: MODEL.WEIGHTS model_final.pth" in caplog.text


def test_weights_of_another_network_are_refused(cfg, tmp_path):
    file = tmp_path / "other.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), file)
    with pytest.raises(ValueError, match=r"only 0 of the network's 100 tensors .*other\.pth"):
        bottom_up(cfg, "torchvision/resnet18", BOTTOM_UP_WEIGHTS=str(file))


# What a user can get wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet19", r"torchvision has no 'resnet19'; nearest valid: 'resnet\d+'"),
        ("torchvison/resnet18", r"no library 'torchvison'; nearest valid: 'torchvision'"),
        ("detectron2/regnetx_5gf", r"has no 'regnetx_5gf'; nearest valid: .*'regnetx_4gf'"),
        ("resnet18", r"'resnet18' is not registered.* Or did you mean 'torchvision/resnet18'"),
        pytest.param("timm/convnext_tini", r"nearest valid: .*'convnext_tiny'", marks=needs_timm),
        pytest.param("timm/resnet18.a1_in1", r"timm/resnet18 has no 'a1_in1'; .*'a1_in1k'",
                     marks=needs_timm),
        pytest.param("timm/hf-hub:timm/resnet18", r"timm has no 'hf-hub:timm/resnet18'",
                     marks=needs_timm),
    ],
)  # fmt: skip
def test_a_wrong_name(cfg, name, message):
    cfg.MODEL.FPN_EXT.BOTTOM_UP = name
    for raises in (build_backbone, fpn_ext.check_config):
        with pytest.raises(ValueError, match=message):
            raises(cfg)


def test_timm_that_is_not_installed(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "timm/resnet18"
    with pytest.raises(ValueError, match=r"needs the package timm.*pip install timm"):
        fpn_ext.check_config(cfg)


@needs_timm
def test_a_network_with_one_output(cfg):
    with pytest.raises(ValueError) as error:
        bottom_up(cfg, "timm/test_vit")
    message = str(error.value)
    assert "asks for ['c2', 'c3', 'c5'], which timm/test_vit does not give" in message
    assert "It gives ['c4']:\n  name  output  at 96x160" in message
    assert "Change MODEL.FPN.IN_FEATURES or MODEL.FPN_EXT.LEVELS, or choose another" in message
    assert "made from" not in message, "the table of levels is added where the config is at hand"
    single = build_backbone(resolved(cfg, "timm/test_vit", IN_FEATURES=["c4"]))
    assert list(single.output_shape()) == ["p4", "p5"], "one level can be had"


@needs_timm
def test_a_network_whose_first_map_is_coarse(cfg):
    with pytest.raises(ValueError, match=r"asks for \['c2', 'c3'\].*gives \['c4', 'c5', 'c6'\]"):
        bottom_up(cfg, "timm/efficientvit_m0")


@pytest.mark.parametrize(
    "name",
    ["torchvision/vit_b_32", pytest.param("timm/pit_ti_224", marks=needs_timm)],
)
def test_a_network_for_one_size_of_image(cfg, name):
    with pytest.raises(ValueError, match=rf"BOTTOM_UP {name}: it takes images of one size only"):
        bottom_up(cfg, name)


@needs_timm
def test_a_network_of_timm_without_maps(cfg, monkeypatch):
    import timm

    def create_model(name, **options):
        raise RuntimeError("features_only not implemented for this one")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        ValueError, match=r"timm/test_vit .*gives no feature maps .*not implemented"
    ):
        bottom_up(cfg, "timm/test_vit")


def test_detectron2s_regnet_on_other_than_three_channels(cfg):
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "detectron2/regnetx_400mf"
    cfg.MODEL.PIXEL_MEAN = [0.0]
    with pytest.raises(ValueError, match=r"takes images of 3 channels, MODEL\.PIXEL_MEAN has 1"):
        build_bottom_up(cfg, ShapeSpec(channels=1))


DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
TORCHVISION = ["MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18"]


def test_what_is_checked_before_building():
    check = fpn_ext.check_config
    cfg = fpn_ext.load_config(DEMO, [*TORCHVISION, "MODEL.FPN_EXT.BOTTOM_UP_NORM", "BN"])
    with pytest.raises(ValueError, match=r"BOTTOM_UP_NORM must be one of .*'FrozenBN'.*got 'BN'"):
        check(cfg)
    cfg = fpn_ext.load_config(DEMO, [*TORCHVISION, "MODEL.WEIGHTS",
                                     "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])  # fmt: skip
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS .*R-50\.pkl are those .* of Detectron2"):
        check(cfg)
    cfg = fpn_ext.load_config(DEMO, [*TORCHVISION, "MODEL.FPN.IN_FEATURES", "('c2', 'res3')"])
    with pytest.raises(ValueError, match=r"RPN\.IN_FEATURES asks for \['p5', 'p6'\]; the pyramid"):
        check(cfg)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([*TORCHVISION, "MODEL.BACKBONE.FREEZE_AT", "2"], r"FREEZE_AT 2 would freeze random"),
        (["MODEL.FPN_EXT.FREEZE", "['backbone']"], r"FREEZE \['backbone'\] would freeze random"),
    ],
)
def test_random_weights_are_not_frozen(tmp_path, opts, message):
    cfg = fpn_ext.load_config(DEMO, opts)
    with pytest.raises(ValueError, match=message):
        check_weights(cfg, "start")
    check_weights(cfg, "optional")  # evaluating, or going on with a training
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = str(tmp_path / "some.pth")
    with pytest.raises(FileNotFoundError, match=r"BOTTOM_UP_WEIGHTS: no file .*some\.pth"):
        check_weights(cfg, "start")
    Path(cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS).touch()
    check_weights(cfg, "start")
