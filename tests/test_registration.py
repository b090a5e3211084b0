"""`import fpn_ext` registers everything, whichever module of Detectron2 is imported next."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["engine", "modeling", "evaluation", "data"])
def test_the_components_are_registered(module):
    code = f"""if True:
        import fpn_ext, sys
        assert "torch" not in sys.modules
        import detectron2.{module}
        from detectron2.modeling import BACKBONE_REGISTRY
        import detectron2.engine
        print("FeaturePyramid" in BACKBONE_REGISTRY)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
