"""`fpn-ext config --plain`: Detectron2's own get_cfg loads it, and its model is the same."""

import subprocess
import sys
from pathlib import Path

import fpn_ext
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.config.plain import plain_config
from fpn_ext.config.prepare import prepare

FILE = "configs/detectron2/faster_rcnn_R_50_FPN_1x.yaml"
CPU = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "")

WITHOUT_US = """
import sys
sys.modules["fpn_ext"] = None  # cannot be imported
from detectron2.config import get_cfg
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
assert "FPN_EXT" not in open(sys.argv[1]).read()
print(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.SOLVER.MAX_ITER)
"""


def test_get_cfg_of_detectron2_loads_it_without_us(tmp_path, capsys):
    opts = ["MODEL.WEIGHTS", "mine.pth", "SOLVER.FPN_EXT.EMA_DECAY", "0.9"]
    assert main(["config", "--config-file", FILE, "--plain", *opts]) == 0
    printed = capsys.readouterr()
    (tmp_path / "plain.yaml").write_text(printed.out)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, tmp_path / "plain.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["build_resnet_fpn_backbone", "mine.pth", "cuda", "90000"]
    assert "SOLVER.FPN_EXT.EMA_DECAY 0.9 is left out: Detectron2 has no such key" in printed.err


@pytest.mark.parametrize(
    "file", [f for f in Path("configs/detectron2").glob("*_builtin.yaml")], ids=lambda f: f.stem
)
def test_it_is_the_config_of_detectron2s_own_components(file):
    """The two files of configs/detectron2 for each model say the same in both ways."""
    opts = [*CPU, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    opts += ["DATASETS.PROPOSAL_FILES_TRAIN", "()", "DATASETS.PROPOSAL_FILES_TEST", "()"]
    ours, _ = prepare(str(file).replace("_builtin", ""), opts)
    theirs, _ = prepare(str(file), opts)
    plain, _ = plain_config(ours)
    del theirs.MODEL["FPN_EXT"]
    for key in ("META_ARCHITECTURE", "BACKBONE", "ANCHOR_GENERATOR", "PROPOSAL_GENERATOR", "FPN",
                "RPN", "ROI_HEADS", "ROI_BOX_HEAD", "RESNETS", "PIXEL_MEAN"):  # fmt: skip
        assert plain.MODEL[key] == theirs.MODEL[key], key


@pytest.mark.parametrize("masks", [False, True])
def test_the_model_finds_the_same(small_cfg, masks):
    small_cfg.MODEL.MASK_ON = masks
    small_cfg.DATASETS.TRAIN = small_cfg.DATASETS.TEST = ()
    small_cfg.MODEL.FPN_EXT.NUMERICS = "exact"
    small_cfg.MODEL.FPN_EXT.POOLER_IMPLEMENTATION = "per_level"
    plain, _ = plain_config(small_cfg)
    loaded = get_cfg()
    assert set(plain) == set(loaded)
    ours, theirs = build_model(small_cfg).eval(), build_model(plain).eval()
    theirs.load_state_dict(ours.state_dict())
    picture = [{"image": torch.randint(0, 256, (3, 96, 128)).float(), "height": 96, "width": 128}]
    with torch.no_grad():
        (a,), (b,) = ours(picture), theirs(picture)
    a, b = a["instances"], b["instances"]
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
    torch.testing.assert_close(a.scores, b.scores)
    if masks:
        assert torch.equal(a.pred_masks, b.pred_masks)


def test_retinanets_levels_have_a_backbone_of_their_own(small_cfg):
    cfg = small_cfg
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.FPN_EXT.TOP_BLOCK = "ConvolutionsOnC"
    cfg.MODEL.FPN_EXT.LEVELS = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    plain, _ = plain_config(cfg)
    assert plain.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone"


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (("MODEL.BACKBONE.NAME", "BiFPN"), ["MODEL.BACKBONE.NAME BiFPN: Detectron2 has no such"]),
        (("MODEL.FPN_EXT.BOTTOM_UP", "torchvision/resnet18"),
         ["MODEL.FPN_EXT.BOTTOM_UP torchvision/resnet18: Detectron2 has no such key"]),
        (("MODEL.FPN_EXT.CANONICAL_BOX_SIZE", "112", "MODEL.FPN_EXT.LEVEL_RULE", "RoundedRule"),
         ["CANONICAL_BOX_SIZE 112: Detectron2 has", "LEVEL_RULE RoundedRule: Detectron2 has"]),
        (("MODEL.FPN_EXT.LEVELS", "['p2', 'p3', 'p4', 'p5', 'p6', 'p7']"),
         ["Detectron2 cannot build it: KeyError: 'p7'"]),
        (("MODEL.FPN_EXT.TOP_BLOCK", "ConvolutionsOnC"),
         ["backbone.top_block.p7.weight is missing here"]),
        (("MODEL.RPN.HEAD_NAME", "UnsharedRPNHead"), ["MODEL.RPN.HEAD_NAME UnsharedRPNHead"]),
        (("INPUT.FPN_EXT.VALUE_RANGE", "[0.0, 4095.0]"), ["INPUT.FPN_EXT.VALUE_RANGE"]),
    ],
)  # fmt: skip
def test_what_detectron2_cannot_describe_is_an_error_that_names_it(opts, said, capsys):
    assert main(["config", "--config-file", FILE, "--plain", *CPU, *opts]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in ("cannot be described in Detectron2's own keys", *said):
        assert part in printed.err


def test_without_plain_it_is_our_config(capsys, tmp_path):
    opts = [*CPU, "MODEL.FPN_EXT.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
    assert main(["config", "--config-file", FILE, *opts]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    cfg = fpn_ext.load_config(str(tmp_path / "all.yaml"))
    assert cfg.MODEL.RPN.IN_FEATURES == ["p3", "p4", "p5", "p6"]
    assert cfg.MODEL.BACKBONE.NAME == "FeaturePyramid"
