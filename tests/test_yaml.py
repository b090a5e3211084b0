"""Every config under configs/ loads, passes the checks, builds, and matches its header."""

import re
from pathlib import Path

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_model
from fpn_ext.config.defaults import flat
from fpn_ext.paper import published

# Those of paper/scale/ are no configs by themselves: fpn_ext.paper.reproduce puts them on others.
ALL = sorted(f for f in Path("configs").rglob("*.yaml") if f.parent.name != "scale")
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
def test_it_loads_checks_and_builds(file, tmp_path):
    cfg = fpn_ext.load_config(str(file))
    if cfg.MODEL.FPN_EXT.BOTTOM_UP.startswith("timm/"):
        pytest.importorskip("timm", reason="timm, an extra, is not installed")
    cfg.MODEL.DEVICE = "cpu"
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):  # made by another config's model
        present = [tmp_path / Path(name).name for name in cfg.DATASETS[key]]
        for proposals in present:
            proposals.touch()
        cfg.DATASETS[key] = tuple(map(str, present))
    fpn_ext.resolve_bottom_up(cfg)
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = ""  # of a package that need not be here
    cfg.MODEL.FPN_EXT.KEEP_PIXELS = True
    fpn_ext.check_config(cfg)
    build_model(cfg)


@pytest.mark.parametrize("file", ALL, ids=str)
def test_its_header_says_what_it_is_and_how_to_run_it(file):
    header = re.match(r"(#.*\n)+", file.read_text())
    assert header, "starts with a comment"
    if file in MODELS:
        commands = header.group().replace("\\\n#", "")
        (config,) = set(re.findall(r"fpn-ext train .*--config-file (\S+)", commands))
        assert Path(config) == file, "the command names this very file"


@pytest.mark.parametrize(
    "table, row", [(t, r) for t in published.TABLES for r in published.TABLES[t]]
)
def test_a_row_of_the_papers_tables_has_its_figures_in_the_header(table, row):
    header = re.match(r"(#.*\n)+", Path(f"configs/paper/table{table}/{row}.yaml").read_text())
    quoted = re.search(r"# Published: (.*)\.\n# Inferred: .+\.\n", header.group()).group(1)
    names = {"ARs@1000": "small", "ARm@1000": "medium", "ARl@1000": "large"}
    names |= {"APs": "small", "APm": "medium", "APl": "large"}
    figures = published.published(table, row)
    expected = ", ".join(f"{names.get(metric, metric)} {figures[metric]}" for metric in figures)
    assert quoted == expected or (not figures and quoted.startswith("nothing"))


def test_every_row_of_the_papers_tables_is_known():
    files = {f"{t}/{r}" for t in published.TABLES for r in published.TABLES[t]}
    assert files == {
        f"{f.parent.name[-1]}/{f.stem}" for f in ALL if re.fullmatch("table[1236]", f.parent.name)
    }


@pytest.mark.parametrize(
    "row, count",
    # Figures of Table 1, to the thousand: 47k, 12k, 200k, 750k anchors.
    [("a", 47_250), ("b", 12_000), ("c", 199_974), ("d", 199_974), ("e", 199_974), ("f", 750_000)],
)
def test_anchors_of_the_papers_rows(row, count):
    """On a 1000 x 800 px image."""
    cfg = fpn_ext.load_config(f"configs/paper/table1/{row}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    shapes = [model.backbone.output_shape()[f] for f in cfg.MODEL.RPN.IN_FEATURES]
    maps = [torch.empty(1, 1, -(-800 // s.stride), -(-1000 // s.stride)) for s in shapes]
    anchors = model.proposal_generator.anchor_generator(maps)
    assert sum(len(boxes) for boxes in anchors) == count


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
    """Compared with the model zoo's YAML if Detectron2 was installed from source."""
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
    names = [file.name for file in ALL]
    for file in ALL:
        unique = names.count(file.name) == 1
        assert (file.name if unique else str(file.relative_to("configs"))) in readme, file
