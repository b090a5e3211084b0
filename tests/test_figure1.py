"""Figure 1: the image pyramid, SSD's hierarchy, their configs, and the table of the four."""

import json
import shutil
import sys
from pathlib import Path

import fpn_ext
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fpn_ext.__main__ import main
from fpn_ext.config.check import config_problems
from fpn_ext.config.defaults import flat
from fpn_ext.config.unread import unread_keys
from fpn_ext.export.graph import detector_graph
from fpn_ext.export.suppression import Suppression
from fpn_ext.modeling.top_blocks import ConvolutionsOnC, Subsample
from fpn_ext.paper import pretrain
from fpn_ext.paper.reproduce import Reproduction
from fpn_ext.variants.hierarchy import FeatureHierarchy, HierarchyHead, HierarchyRetinaNet
from fpn_ext.variants.image_pyramid import ImagePyramidRCNN
from test_pyramid_steps import Shapes, maps_of, values
from test_reproduce import TINY
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import departures
import figure1

CONFIGS = Path("configs/paper/figure1")


# (c): the maps


def hierarchy(**kwargs):
    bottom_up = Shapes()
    bottom_up._out_feature_channels = {"c2": 1, "c3": 2, "c4": 3, "c5": 4}
    return FeatureHierarchy(
        bottom_up=bottom_up, in_features=bottom_up._out_features, out_channels=7, **kwargs
    )


def test_levels_are_the_maps_themselves():
    backbone = hierarchy()
    given = maps_of(1, 10, 100, 1000)
    maps = list(given)
    levels = backbone.levels_on_maps(maps)
    assert maps == [], "as the pyramid's: a C_k can be freed"
    assert all(level is c_k for level, c_k in zip(levels, given, strict=True))
    assert list(backbone.parameters()) == []
    assert [s.channels for s in backbone.output_shape().values()] == [1, 2, 3, 4]


def test_extra_layers_are_on_the_coarsest_map():
    """Convolutions of ones in the middle, of stride 2, on C5 with its four channels of 5."""
    top_block = ConvolutionsOnC("c5", 4, 7, ["p6", "p7"])
    for convolution in top_block.children():
        nn.init.zeros_(convolution.weight)
        convolution.weight.data[:, :, 1, 1] = 1
    backbone = hierarchy(top_block=top_block)
    assert {name.split(".")[0] for name, _ in backbone.named_parameters()} == {"top_block"}
    levels = backbone.with_top_block(maps_of(1, 1, 1, 1), torch.full((1, 4, 4, 4), 5.0))
    assert values(levels[4:]) == [20, 140]  # 4 * 5, and seven channels of it
    assert [level.shape[1:] for level in levels[4:]] == [(7, 2, 2), (7, 1, 1)]
    channels = {name: shape.channels for name, shape in backbone.output_shape().items()}
    assert channels == {"p2": 1, "p3": 2, "p4": 3, "p5": 4, "p6": 7, "p7": 7}


def test_extra_layers_on_a_level_are_refused(small_cfg):
    with pytest.raises(ValueError, match=r"TOP_BLOCK must read .* got Subsample on p5"):
        hierarchy(top_block=Subsample("p5"))
    small_cfg.MODEL.BACKBONE.NAME = "FeatureHierarchy"
    for name in ("Subsample", "ConvolutionsOnP"):
        small_cfg.MODEL.FPN_EXT.TOP_BLOCK = name
        with pytest.raises(ValueError, match=rf"as ConvolutionsOnC does, got {name} on p5"):
            build_backbone(small_cfg)


@pytest.mark.torchscript
def test_torchscript_and_export_of_the_hierarchy(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME = "FeatureHierarchy"
    small_cfg.MODEL.FPN_EXT.TOP_BLOCK = "ConvolutionsOnC"
    backbone = build_backbone(small_cfg).eval()
    image = torch.rand(1, 3, 97, 131)
    with torch.no_grad():
        maps, c_k = backbone(image), backbone.bottom_up(image)
        scripted = torch.jit.script(backbone)(image)
        exported = torch.export.export(backbone, (image,)).module()(image)
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"] == list(scripted) == list(exported)
    for name, features in maps.items():
        torch.testing.assert_close(scripted[name], features)
        torch.testing.assert_close(exported[name], features)
    for k in range(2, 6):
        assert torch.equal(maps[f"p{k}"], c_k[f"res{k}"])


# (c): the head


@pytest.fixture
def head():
    """For maps of one and of two channels; every convolution adds up its middle."""
    shapes = [ShapeSpec(channels=1, stride=8), ShapeSpec(channels=2, stride=16)]
    made = HierarchyHead(input_shape=shapes, num_classes=1, num_anchors=1, conv_dims=[1, 1])
    for convolution in made.modules():
        if isinstance(convolution, nn.Conv2d):
            nn.init.zeros_(convolution.weight)
            convolution.weight.data[:, :, 1, 1] = 1
            nn.init.zeros_(convolution.bias)
    return made


def results(head):
    """Logits and deltas of C3 = 3 and C4 = (2, 5)."""
    c3 = torch.full((1, 1, 4, 4), 3.0)
    c4 = torch.tensor([2.0, 5.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    logits, deltas = head([c3, c4])
    assert [x.shape for x in logits] == [(1, 1, 4, 4), (1, 1, 2, 2)]
    assert [x.shape for x in deltas] == [(1, 4, 4, 4), (1, 4, 2, 2)]
    return values(logits), values(deltas)


def test_a_first_convolution_of_each_level(head):
    assert results(head) == ([3, 7], [3, 7])
    head.first_cls[1][0].weight.data *= 10
    assert results(head) == ([3, 70], [3, 7]), "of one level, and of one subnet"
    head.first_bbox[0][0].weight.data *= -1
    assert results(head) == ([3, 70], [0, 7])
    head.bbox_subnet[0].weight.data *= -1
    assert results(head) == ([3, 70], [0, 0]), "a ReLU follows: -3 is not 3 after another -1"


def test_the_other_convolutions_are_shared(head):
    head.cls_subnet[0].weight.data *= 2
    assert results(head) == ([6, 14], [3, 7])
    head.bbox_pred.weight.data *= 3
    assert results(head) == ([6, 14], [9, 21])


def test_a_head_without_shared_convolutions_is_refused():
    cfg = fpn_ext.load_config(str(CONFIGS / "c.yaml"), ["MODEL.RETINANET.NUM_CONVS", "1"])
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ValueError, match=r"NUM_CONVS must be at least 2 .*got 1"):
        build_model(cfg)


SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RETINANET.NUM_CONVS", "2"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128]]"),
    *("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.PIXEL_STD", "[57.4, 57.1, 58.4]", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]


def one_stage(row):
    cfg = fpn_ext.load_config(str(CONFIGS / f"{row}.yaml"), SMALL)
    fpn_ext.check_config(cfg)
    return build_model(cfg)


@pytest.mark.parametrize("row", ["c", "d_one_stage"])
def test_one_stage_trains(row):
    """An object for each level: all convolutions of the head get gradients."""
    model = one_stage(row)
    image = torch.randint(0, 255, (3, 190, 200), dtype=torch.uint8)
    truth = Instances((190, 200), gt_classes=torch.arange(5))
    sides = torch.tensor([4.0, 8, 16, 32, 64])[:, None]  # halves, around an anchor of each level
    truth.gt_boxes = Boxes(128 + sides * torch.tensor([-1.0, -1, 1, 1]))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with EventStorage():
        for _ in range(2):
            optimizer.zero_grad()
            loss = sum(model([{"image": image, "instances": truth}] * 2).values())
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_hierarchy_is_exported_as_it_detects():
    model = one_stage("c").eval()
    image = torch.randint(0, 255, (3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        expected = model([{"image": image}])[0]["instances"]
        pixels = model.preprocess_image([{"image": image}])
        assert pixels.tensor.shape[-2:] == (128, 128)
        graph = detector_graph(model, Suppression()).eval()
        boxes, scores, classes, _ = graph(image[None].float())
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
    assert torch.equal(classes, expected.pred_classes)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            r"META_ARCHITECTURE RetinaNet: one head .* FeatureHierarchy.*choose HierarchyRetinaNet",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.IN_FEATURES", "['p3', 'p4']"],
            r"RPN\.HEAD_NAME StandardRPNHead: one head .*choose UnsharedRPNHead",
        ),
    ],
)
def test_a_head_that_cannot_read_the_hierarchy(opts, message):
    cfg = fpn_ext.load_config(str(CONFIGS / "c.yaml"), opts)
    with pytest.raises(ValueError, match=message):
        fpn_ext.check_config(cfg)


# (a)


@pytest.fixture
def models(small_cfg):
    """A detector of the demo's size, and an image pyramid of it."""
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    plain = build_model(small_cfg).eval()
    small_cfg.MODEL.META_ARCHITECTURE = "ImagePyramidRCNN"
    pyramid = build_model(small_cfg).eval()
    assert type(pyramid) is ImagePyramidRCNN and pyramid.image_scales == [0.5, 1, 2]
    pyramid.load_state_dict(plain.state_dict())
    return plain, pyramid


def picture(height=64, width=96):
    return {"image": torch.randint(0, 255, (3, height, width), dtype=torch.uint8)}


def test_of_one_scale_it_is_its_detector(models):
    plain, pyramid = models
    inputs = [{**picture(), "height": 128, "width": 192}, picture(96, 64)]
    pyramid.image_scales = [1.0]
    with torch.no_grad():
        for expected, found in zip(plain(inputs), pyramid(inputs), strict=True):
            expected, found = expected["instances"], found["instances"]
            assert found.image_size == expected.image_size and len(found) > 0
            assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert torch.equal(found.scores, expected.scores)


def at_each_scale(monkeypatch):
    """A detector that finds the whole image, and a square of 10 px, scored by the image's size."""
    seen = []

    def inference(self, inputs, detected_instances=None, do_postprocess=True):
        assert not do_postprocess
        found = []
        for entry in inputs:
            height, width = entry["image"].shape[-2:]
            seen.append((height, width, entry["image"].float().mean().item()))
            boxes = torch.tensor([[0.0, 0, width, height], [0, 0, 10, 10]])
            score = height / 1000
            found.append(
                Instances(
                    (height, width),
                    pred_boxes=Boxes(boxes),
                    scores=torch.tensor([score, score + 0.5]),
                    pred_classes=torch.tensor([0, 1]),
                )
            )
        return found

    monkeypatch.setattr(GeneralizedRCNN, "inference", inference)
    return seen


def test_three_octaves_worked_out(models, monkeypatch):
    """The whole image is found three times and kept once; 10 px are 20, 10 and 5 px here."""
    seen = at_each_scale(monkeypatch)
    pyramid = models[1]
    image = torch.full((3, 64, 96), 50.0)
    (found,) = pyramid.inference([{"image": image}], do_postprocess=False)
    assert seen == [(32, 48, 50.0), (64, 96, 50.0), (128, 192, 50.0)]
    assert found.image_size == (64, 96)
    assert found.scores.tolist() == pytest.approx([0.628, 0.564, 0.532, 0.128])
    assert found.pred_boxes.tensor.tolist() == [
        *([0, 0, 5, 5], [0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 96, 64]),
    ]
    assert found.pred_classes.tolist() == [1, 1, 1, 0]
    pyramid.max_detections = 2
    (best,) = pyramid.inference([{"image": image}], do_postprocess=False)
    assert best.scores.tolist() == found.scores[:2].tolist()


def test_sides_that_do_not_divide_and_the_output_size(models, monkeypatch):
    """65 x 33 px are 32 x 16 at half; boxes come back by the factors of the rounded sides."""
    seen = at_each_scale(monkeypatch)
    pyramid = models[1]
    pyramid.image_scales = [0.5]
    (output,) = pyramid.inference([{"image": torch.zeros(3, 65, 33), "height": 130, "width": 33}])
    assert [size[:2] for size in seen] == [(32, 16)]
    small, whole = output["instances"].pred_boxes.tensor
    torch.testing.assert_close(whole, torch.tensor([0.0, 0, 33, 130]))
    torch.testing.assert_close(small, torch.tensor([0, 0, 10 * 33 / 16, 2 * 10 * 65 / 32]))


def test_images_of_a_batch_and_the_optimised_pyramid(models):
    pyramid = models[1]
    inputs = [picture(), picture()]
    with torch.no_grad():
        together = [output["instances"] for output in pyramid(inputs)]
        alone = pyramid(inputs[1:])[0]["instances"]
        quick = fpn_ext.optimize_for_inference(pyramid)(inputs[1:])[0]["instances"]
    torch.testing.assert_close(together[1].scores, alone.scores)
    torch.testing.assert_close(quick.scores, alone.scores, rtol=1e-3, atol=1e-4)


def test_it_trains_as_its_detector(models):
    plain, pyramid = models
    truth = Instances((64, 96), gt_classes=torch.tensor([0]))
    truth.gt_boxes = Boxes(torch.tensor([[5.0, 5, 45, 60]]))
    inputs = [{**picture(), "instances": truth}]
    losses = []
    for model in (plain.train(), pyramid.train()):
        torch.manual_seed(7)
        with EventStorage():
            losses.append({name: loss.item() for name, loss in model(inputs).items()})
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.FPN_EXT.IMAGE_SCALES", [], r"IMAGE_SCALES must list at least one .*got \[\]"),
        ("MODEL.FPN_EXT.IMAGE_SCALES", [1.0, 0.0], r"factor over 0, got \[1\.0, 0\.0\]"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", r"needs an RPN at every scale"),
        ("MODEL.KEYPOINT_ON", True, r"no keypoints: set MODEL\.KEYPOINT_ON False"),
    ],
)
def test_what_an_image_pyramid_cannot_be(small_cfg, key, value, message):
    small_cfg.MODEL.META_ARCHITECTURE = "ImagePyramidRCNN"
    small_cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg)


def test_what_does_not_go_with_an_image_pyramid(models):
    with pytest.raises(ValueError, match="cannot export a ImagePyramidRCNN"):
        detector_graph(models[1], Suppression())
    opts = ["TEST.FPN_EXT.EVALUATE_PROPOSALS", "True"]
    problems = config_problems(fpn_ext.load_config(str(CONFIGS / "a.yaml"), opts))
    assert any("EVALUATE_PROPOSALS scores the proposals on one image" in p for p in problems)


def test_the_scales_are_read_by_the_image_pyramid_alone():
    key = "MODEL.FPN_EXT.IMAGE_SCALES"
    assert key not in unread_keys(fpn_ext.load_config(str(CONFIGS / "a.yaml")))
    assert key in unread_keys(fpn_ext.load_config(str(CONFIGS / "b.yaml")))


# The configs and the table


@pytest.mark.parametrize(
    ("file", "base", "different"),
    [
        ("figure1/a", "figure1/b", {"MODEL.META_ARCHITECTURE"}),
        ("figure1/b", "table3/b", set()),
        ("figure1/c", "figure1/d_one_stage", {"MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME"}),
        ("figure1/d", "table3/c", set()),
    ],
)
def test_rows_differ_in_what_they_are_about(file, base, different):
    ours, theirs = (
        flat(fpn_ext.load_config(f"configs/paper/{name}.yaml")) for name in (file, base)
    )
    assert {key for key in ours if ours[key] != theirs[key]} == {*different, "OUTPUT_DIR"}


def test_there_is_a_config_for_each_row(tmp_path):
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(figure1.ROWS)
    reproduction = Reproduction("small", tmp_path, tmp_path)
    configs = {row: reproduction.config(figure1.run_of(row, 3)) for row in figure1.ROWS}
    for row, cfg in configs.items():
        fpn_ext.check_config(cfg)
        assert cfg.SEED == 3 and cfg.OUTPUT_DIR.endswith(f"figure1_{row}_seed3")
        assert cfg.SOLVER.MAX_ITER == configs["d"].SOLVER.MAX_ITER
        assert cfg.SOLVER.IMS_PER_BATCH == configs["d"].SOLVER.IMS_PER_BATCH
    for row in figure1.ONE_STAGE:
        assert configs[row].MODEL.RETINANET.NUM_CLASSES == 5
    assert type(build_model(configs["c"])) is HierarchyRetinaNet
    of_a, of_b = figure1.run_of("a", 3), figure1.run_of("b", 3)
    assert figure1.weights_of(reproduction, of_a) == figure1.weights_of(reproduction, of_b)


def result_of(row, seed, ap, **identity):
    return {
        **identity,
        "row": row,
        "seed": seed,
        "scores": dict.fromkeys(figure1.level_rules.METRICS, ap),
        **{"iterations": 300, "commit": "c", "hardware": "h", "versions": "v"},
    }


def test_the_table_of_the_figure():
    runs = [result_of("b", seed, 10.0 + seed) for seed in (1, 2)]
    runs += [result_of("a", seed, 13.0 + 2 * seed) for seed in (1, 2)]  # 4 and 5 more than (b)
    cost = {
        "rows": {
            "a": {"ms": 90, "ms_range": [80, 99], "memory": None, "parameters": 2_000_000},
            "b": {"ms": 30.04, "ms_range": [29, 31], "parameters": 2_000_000,
                  "memory": {"before": 800, "peak": 850.4}},
        },
        **{"images": 20, "size": 160, "hardware": "h", "commit": "c"},
    }  # fmt: skip
    text = figure1.markdown(runs, cost, "command")
    assert "| (b) one map, C5 | 11.5 ± 0.7 |" in text
    assert "| 30.0 (29.0 to 31.0) | 850 (50) | 2.00 |" in text
    assert "| 90.0 (80.0 to 99.0) |  | 2.00 |" in text
    assert "three octaves - (b) one map, C5 | +4.5 ± 0.5 |" in text
    assert "(d) FPN |" not in text, "was not run"
    assert "not measured" in figure1.markdown(runs, None, "command")


def test_without_models_there_is_a_table_and_nothing_is_measured(tmp_path, capsys):
    """As in a clone: results/ has the scores, and the models are nowhere."""
    shutil.copytree(Path("results/figure1/runs"), tmp_path / "runs")
    folders = ["--work", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert figure1.main(["--measure-only", *folders]) == 0
    assert "time and memory are not measured" in capsys.readouterr().err
    assert "(d) FPN" in (tmp_path / "figure1.md").read_text()
    assert not (tmp_path / "cost.json").exists()
    assert figure1.main(["--report-only", *folders]) == 0
    assert capsys.readouterr().err == ""


def test_the_table_of_departures(tmp_path):
    runs = [
        {**result_of("", seed, ap), "rule": rule}
        for rule, aps in (("the paper", (20.0, 22.0)), ("PerLevelRPN", (19.0, 20.0)))
        for seed, ap in enumerate(aps)
    ]
    text = departures.markdown(runs, "command")
    assert "| the paper | 2 | 21.0 ± 1.4 |" in text and "| PerLevelRPN | -1.5 ± 0.5 |" in text
    reproduction = Reproduction("small", tmp_path, tmp_path)
    plain = flat(reproduction.config(departures.Departure(3, "the paper", 1)))
    for name, opts in departures.DEPARTURES.items():
        run = departures.Departure(3, name, 1)
        cfg = reproduction.config(run)
        fpn_ext.check_config(cfg)
        changed = {key for key, value in flat(cfg).items() if value != plain[key]}
        assert changed - {"OUTPUT_DIR"} == set(opts[::2])
    assert (
        len({reproduction.digest(departures.Departure(3, n, 1)) for n in departures.DEPARTURES})
        == 10
    )


@pytest.mark.slow
def test_the_figure_end_to_end(tmp_path, demo_images, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "PICTURES", 20)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(figure1, "ROUNDS", 1)
    monkeypatch.setattr(figure1, "IMAGES", 2)
    small = "configs/paper/scale/small.yaml"
    weights = ["pretrain", "--output", str(tmp_path / "pretrained.pth"), "--iterations", "2"]
    assert main([*weights, "--config-file", small, *TINY]) == 0
    arguments = ["--seeds", "4", "--work", str(tmp_path), "--output", str(tmp_path / "results")]
    opts = [*TINY, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    assert figure1.main([*arguments, *opts]) == 0
    kept = {
        row: json.loads((tmp_path / f"results/runs/figure1_{row}_seed4.json").read_text())
        for row in figure1.ROWS
    }
    assert kept["a"]["weights_of"] == "figure1_b_seed4"
    assert all(result["scores"]["AP"] is not None for result in kept.values())
    cost = json.loads((tmp_path / "results/cost.json").read_text())
    assert cost["rows"]["a"]["ms"] > cost["rows"]["b"]["ms"] > 0
    monkeypatch.setattr(figure1, "train_all", lambda *_: pytest.fail("trained again"))
    assert figure1.main([*arguments, "--report-only"]) == 0
    assert "# Figure 1" in capsys.readouterr().out
