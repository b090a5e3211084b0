"""Every config under configs/ loads, passes the checks, builds, and is what its header says."""

import re
from pathlib import Path

import fpn_ext
import pytest
from detectron2.modeling import build_model
from fpn_ext.config import flat

ALL = sorted(Path("configs").rglob("*.yaml"))
MODELS = [f for f in ALL if not f.name.startswith("Base-")]
CONTROLS = [f for f in MODELS if f.stem.endswith("_builtin")]
COMPONENTS = {
    "MODEL.BACKBONE.NAME",
    "MODEL.ANCHOR_GENERATOR.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.ROI_HEADS.NAME",
}


def test_there_are_configs():
    assert len(MODELS) >= 16 and len(CONTROLS) >= 8


@pytest.mark.parametrize("file", MODELS, ids=str)
def test_it_loads_checks_and_builds(file):
    cfg = fpn_ext.load_config(str(file))
    cfg.MODEL.DEVICE = "cpu"
    fpn_ext.check_config(cfg)
    build_model(cfg)


@pytest.mark.parametrize("file", ALL, ids=str)
def test_its_header_says_what_it_is_and_how_to_run_it(file):
    header = re.match(r"(#.*\n)+", file.read_text())
    assert header, "starts with a comment"
    if file in MODELS:
        (config,) = set(re.findall(r"--config-file (\S+)", header.group()))
        assert Path(config) == file, "the command names this very file"


@pytest.mark.parametrize("file", CONTROLS, ids=str)
def test_a_control_differs_in_the_components_alone(file):
    control = flat(fpn_ext.load_config(str(file)))
    ours = flat(fpn_ext.load_config(str(file).replace("_builtin", "")))
    different = {key for key in ours if ours[key] != control[key]}
    expected = set(COMPONENTS)
    if ours["MODEL.PROPOSAL_GENERATOR.NAME"] == "PrecomputedProposals":
        expected.remove("MODEL.PROPOSAL_GENERATOR.NAME")  # there is no RPN to differ
    assert different - {"OUTPUT_DIR"} == expected


@pytest.mark.parametrize("file", [f for f in CONTROLS if f.parent.name == "detectron2"], ids=str)
def test_a_control_is_the_model_zoos_config(file):
    """Where Detectron2 was installed from source, its zoo's own YAML is there to compare with."""
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    stem = file.stem.removesuffix("_builtin")
    task = "COCO-InstanceSegmentation" if stem.startswith("mask") else "COCO-Detection"
    try:
        zoo_file = model_zoo.get_config_file(f"{task}/{stem}.yaml")
    except RuntimeError:
        pytest.skip("this Detectron2 came without the zoo's YAML files")
    theirs, ours = flat(fpn_ext.load_config(zoo_file)), flat(fpn_ext.load_config(str(file)))
    assert {k: v for k, v in ours.items() if v != theirs[k]} == {}


def test_the_table_in_the_readme_names_every_config():
    readme = Path("configs/README.md").read_text()
    for file in ALL:
        assert file.name in readme, file
