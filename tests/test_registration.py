"""``import fpn_ext`` registers the components, whichever part of Detectron2 is imported next."""

import subprocess
import sys

import pytest

REGISTERED = (
    "from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY; "
    "assert 'FeaturePyramid' in BACKBONE_REGISTRY and 'PyramidROIHeads' in ROI_HEADS_REGISTRY; "
    "import fpn_ext; from fpn_ext.engine.trainer import Trainer; "
    "assert fpn_ext.get_cfg().SOLVER.FPN_EXT.ACCUMULATE == 1"
)


def run(code):
    """Its output in a fresh process, which must succeed."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "from detectron2.engine import DefaultTrainer, create_ddp_model",
        "from detectron2.engine.defaults import DefaultPredictor",
        "from detectron2.engine.hooks import EvalHook",
        "import detectron2.evaluation",
        "import detectron2.data, detectron2.checkpoint, detectron2.solver",
        "from detectron2.modeling.backbone import FPN",
        "from detectron2 import model_zoo",
        "import fpn_ext.engine.steps",
        "import fpn_ext.bottom_up.build",
    ],
)
@pytest.mark.slow
def test_in_any_order(first):
    """As in a user's training script, in a fresh process."""
    code = f"import fpn_ext; {first}; {REGISTERED}"
    run(code)


def test_detectron2_before_this_project():
    code = f"import detectron2; from detectron2.engine import DefaultTrainer; {REGISTERED}"
    code = f"import fpn_ext._d2_compat as c; c.apply(); {code}"  # an uncompiled one needs it
    run(code)


@pytest.mark.parametrize(
    "again",
    [
        "from importlib import reload; reload(fpn_ext.registration); reload(fpn_ext)",
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('fpn_ext')]",
    ],
)
def test_imported_again_before_detectron2(again):
    """One finder remains: two would call each other forever."""
    code = f"import sys, fpn_ext; {again}; import fpn_ext; {REGISTERED}"
    run(code)


def test_a_config_of_detectron2s_with_the_names_alone_is_built():
    """With nothing else of this package imported: every key a component reads is declared."""
    code = """if True:
        import fpn_ext
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
        cfg.MODEL.BACKBONE.NAME = "FeaturePyramid"
        cfg.MODEL.ANCHOR_GENERATOR.NAME = "PyramidAnchorGenerator"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PyramidRPN"
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME = "PyramidROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        print(type(build_model(cfg).roi_heads.box_pooler).__name__)
    """
    assert run(code) == "LevelMappedROIPooler\n"


WARNED = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {code}
print([w.category.__name__ for w in caught if {of_it}])
"""
FUTURE = "issubclass(w.category, FutureWarning) or 'torch.jit' in str(w.message)"


def test_importing_warns_of_nothing_in_the_future():
    """fvcore and Detectron2 give functions to TorchScript, which is deprecated, at import."""
    code = f"import fpn_ext, detectron2.engine, detectron2.evaluation; {REGISTERED}"
    assert run(WARNED.format(code=code, of_it=FUTURE)) == "[]\n"


@pytest.mark.torchscript
def test_a_users_own_torchscript_still_warns():
    warned = WARNED.format(code="torch.jit.script(torch.nn.Identity())", of_it=FUTURE)
    alone = run(f"import torch{warned}")
    assert run(f"import torch, fpn_ext, detectron2.modeling{warned}") == alone
