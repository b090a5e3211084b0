"""``make test-detectron2``, on a stand-in for a Detectron2 checkout."""

import subprocess
import sys

import pytest

# What each file of Detectron2's imports or builds by name, and ours that it must get.
STAND_INS = {
    "test_anchor_generator.py": """
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator

class TestAnchorGenerator:
    def test_imported(self):
        assert DefaultAnchorGenerator.__name__ == "PyramidAnchorGenerator"
    def test_configured(self):
        built = build_anchor_generator(get_cfg(), [ShapeSpec(stride=16)])
        assert type(built) is DefaultAnchorGenerator
    def test_rrpn_anchor_generator(self):
        raise NotImplementedError
""",
    "test_roi_pooler.py": """
from detectron2.modeling.poolers import ROIPooler

def test_imported():
    assert ROIPooler.__name__ == "LevelMappedROIPooler"
    assert ROIPooler(7, [1 / 16], 0, "ROIAlignV2").implementation == "per_level"
""",
    "test_rpn.py": """
from detectron2.config import get_cfg
from detectron2.export import scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import RPN, build_proposal_generator

def test_imported_and_configured():
    built = build_proposal_generator(get_cfg(), {"res4": ShapeSpec(channels=8, stride=16)})
    assert type(built) is RPN and RPN.__name__ == "PyramidRPN"
    assert type(built.anchor_generator).__name__ == "PyramidAnchorGenerator"
""",
    "test_roi_heads.py": """
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads

def test_imported():
    assert StandardROIHeads.__name__ == "PyramidROIHeads"
    assert ROI_HEADS_REGISTRY.get("StandardROIHeads") is StandardROIHeads

def test_that_fails():
    assert False
""",
}


def run(*arguments):
    command = [sys.executable, "tests/detectron2_suite.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("",)])
def test_without_src(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("SRC is not set; run make test-detectron2 SRC=")
    assert len(result.stderr.splitlines()) == 1


def test_a_checkout_without_a_file(tmp_path):
    folder = tmp_path / "tests" / "modeling"
    folder.mkdir(parents=True)
    for name in STAND_INS:
        if name != "test_rpn.py":
            (folder / name).touch()
    result = run(str(tmp_path))
    assert result.returncode == 2 and result.stdout == ""
    assert f"no {folder / 'test_rpn.py'}; run make test-detectron2" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_tests_of_a_checkout_get_our_classes(tmp_path):
    folder = tmp_path / "tests" / "modeling"
    folder.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
    result = run(str(tmp_path))
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last == "5 passed, 1 failed, 0 skipped, 1 deselected", result.stdout
    assert "DESELECTED TestAnchorGenerator::test_rrpn_anchor_generator: tests Rot" in result.stdout
