"""What holds the project together: who imports whom, and that what the documents name exists."""

import ast
import re
from pathlib import Path

import fpn_ext
import pytest
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.registry import Registry

PACKAGE = Path("fpn_ext")
MODULES = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}

# Each module and the modules of this package it may import. The three components never import one
# another: that is what makes them swappable one by one.
ALLOWED = {
    "_d2_compat": set(),
    "levels": set(),
    "atomic": set(),
    "unwrap": set(),
    "json_files": {"atomic"},
    "findings": {"json_files"},
    "coco_json": {"levels"},
    "names": set(),
    "safe_pickle": set(),
    "demo_shapes": set(),
    "demo_backgrounds": {"demo_shapes"},
    "demo_scenes": {"demo_backgrounds", "demo_shapes"},
    "demo_annotations": {"demo_scenes"},
    "demo_data": {"demo_annotations", "demo_scenes", "demo_shapes", "json_files"},
    "ablations": {"fpn"},
    "between_levels": {"levels"},
    "path_aggregation": {"between_levels", "fpn"},
    "bifpn": {"between_levels", "fpn", "names"},
    "upsampling": {"between_levels", "fpn"},
    "lateral_norms": {"fpn"},
    "level_rules": {"levels"},
    "level_keys": {"level_rules", "levels", "names"},
    "top_blocks": set(),
    "fpn": {"bottom_ups", "level_keys", "levels", "names", "top_blocks"},
    "anchors": {"levels", "names"},
    "weighted_rows": set(),
    "fused_roi_align_kernel": {"weighted_rows"},
    "fused_roi_align": {"fused_roi_align_kernel", "weighted_rows"},
    "pooler": {"level_rules", "levels", "names", "weighted_rows", "fused_roi_align"},
    "roi_heads": {"pooler", "names"},
    "unshared": {"roi_heads"},
    "all_levels": {"names", "pooler", "roi_heads"},
    "varied_anchors": set(),
    "norms": set(),
    "freezing": {"names", "norms"},
    "dry_run": {"levels", "names"},
    "networks": {"dry_run", "names"},
    "pretrained": {"weight_files"},
    "bottom_ups": {
        *("dry_run", "level_keys", "levels", "names", "networks", "norms", "pretrained"),
    },
    "threads": set(),
    "folded_norms": set(),
    "winograd": {"threads"},
    "winograd_training": {"winograd"},
    "optimize": {"roi_heads", "unwrap", "winograd"},
    "rpn": {"levels", "names"},
    "config": {
        *("_d2_compat", "all_levels", "bottom_ups", "level_keys", "levels", "names", "norms"),
        *("top_blocks", "weight_files"),
    },
    "weight_files": {"safe_pickle"},
    "checkpoint": {"atomic", "unwrap", "weight_files"},
    "schedule": {"config"},
    "resuming": {"config"},
    "testing": {"distributed", "json_files", "optimize", "recall"},
    "check": {
        "bottom_ups",
        "checkpoint",
        "config",
        "data",
        "findings",
        "proposal_loader",
        "schedule",
    },
    "repeatable": set(),
    "steps": {"names", "nonfinite"},
    "ema": {"checkpoint", "unwrap"},
    "best": {"names"},
    "validation_loss": {"unwrap"},
    "trainer": {
        *("best", "checkpoint", "ema", "evaluation", "folded_norms", "freezing", "names"),
        *("nonfinite", "proposal_loader", "repeatable", "resuming", "schedule", "steps"),
        *("testing", "validation_loss", "winograd_training"),
    },
    "distributed": {"_d2_compat"},
    "data": {"demo_data"},
    "proposal_file": {"atomic"},
    "proposal_pickle": {"atomic", "proposal_file", "safe_pickle"},
    "proposal_sources": {"proposal_file", "unwrap"},
    "proposal_loader": {"data", "proposal_file", "proposal_pickle"},
    "proposal_validation": {"findings", "proposal_file", "proposal_pickle"},
    "proposal_stats": {"proposal_pickle", "recall"},
    "proposals": {
        *("bottom_ups", "checkpoint", "config", "data", "json_files", "names", "optimize"),
        *("proposal_pickle", "proposal_sources", "proposal_stats", "proposal_validation"),
        "recall",
    },
    "recall": {"names", "proposal_file", "unwrap"},
    "evaluation": {"coco_json", "data", "names", "recall"},
    "dataset_contents": set(),
    "annotation_files": {"data", "dataset_contents", "names"},
    "picture_files": {"dataset_contents"},
    "box_formats": {"dataset_contents"},
    "dataset_report": {"dataset_contents", "findings"},
    "data_check": {
        *("annotation_files", "box_formats", "config", "data", "dataset_contents"),
        *("dataset_report", "json_files", "levels", "names", "picture_files"),
    },
    "doctor": {"findings", "installation", "machine"},
    "installation": {"_d2_compat", "findings"},
    "machine": {"findings"},
    "saved_batches": {"json_files"},
    "nonfinite_inputs": {"saved_batches"},
    "first_nonfinite": {"nonfinite_inputs", "saved_batches"},
    "nonfinite_causes": {"first_nonfinite", "names"},
    "nonfinite": {
        *("first_nonfinite", "names", "nonfinite_causes", "nonfinite_inputs", "saved_batches"),
        "unwrap",
    },
    "drawing": {"levels"},
    "paper": set(),
    "provenance": {"_d2_compat"},
    "pretrain": {"atomic", "config", "demo_scenes", "demo_shapes"},
    "commands": set(),
    "paper_tables": {"atomic", "json_files", "paper"},
    "reproduce": {
        *("commands", "config", "data", "json_files", "paper", "paper_tables", "provenance"),
    },
    "four_step": {"atomic", "commands", "config", "data", "weight_files"},
    "predict": {
        *("bottom_ups", "checkpoint", "coco_json", "config", "data", "drawing", "json_files"),
        *("level_keys", "optimize"),
    },
    "predict_video": {"atomic", "coco_json", "drawing", "optimize", "predict"},
    "measuring": set(),
    "agreement": set(),
    "compare_configs": {
        *("all_levels", "anchors", "bifpn", "bottom_ups", "config", "data", "fpn", "roi_heads"),
        "rpn",
    },
    "compare_weights": {
        *("agreement", "checkpoint", "compare_configs", "evaluation", "measuring", "optimize"),
        *("predict", "weight_files"),
    },
    "compare_training": {
        *("commands", "config", "json_files", "measuring", "provenance", "weight_files"),
    },
    "compare": {
        *("compare_configs", "compare_training", "compare_weights", "json_files", "provenance"),
    },
    "training_boxes": {"names"},
    "reports": {"atomic", "config", "data", "findings", "json_files", "training_boxes"},
    "best_anchors": {"training_boxes"},
    "anchor_fit": {"anchors", "best_anchors", "training_boxes"},
    "anchor_report": {"anchor_fit", "best_anchors", "names", "reports", "training_boxes"},
    "level_report": {"level_keys", "names", "reports", "training_boxes"},
    "look": {
        *("atomic", "best_anchors", "drawing", "levels", "names", "predict", "training_boxes"),
    },
    "visualize": {"predict", "drawing", "levels"},
}


def imports_of(file):
    """Modules of this package that a file of it imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fpn_ext"):
            found.add(node.module.partition(".")[2])
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("fpn_ext")}
    return found & MODULES


def test_every_module_has_its_place():
    assert set(ALLOWED) == MODULES


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_go_one_way(module):
    assert imports_of(PACKAGE / f"{module}.py") <= ALLOWED[module]


def test_files_are_read_by_the_modules_that_guard_it():
    """Detectron2's own loading and pickle run what a file says; these modules stand before them."""
    guarded = {
        r"\bDetectionCheckpointer\(": set(),  # SafeCheckpointer
        r"\bDefaultPredictor\(": {"fpn_ext/inference/pictures.py"},
        r"\bpickle\.(loads?|Unpickler)\b": {"fpn_ext/files/safe_pickle.py"},
        r"\btorch\.load\((?!.*weights_only=True)": set(),
        r"allow_pickle=True|yaml\.(unsafe_load|load)\(|(?<![.\w])(eval|exec)\(": set(),
    }
    for file in (*PACKAGE.glob("*.py"), Path("train_net.py"), *Path("benchmarks").glob("*.py")):
        text = file.read_text()
        for pattern, allowed in guarded.items():
            assert not re.search(pattern, text) or str(file) in allowed, f"{file}: {pattern}"


def test_the_components_are_written_from_scratch():
    """No subclass of, and no call into, Detectron2's FPN, anchor generator or ROIPooler."""
    for file in ("fpn.py", "anchors.py", "pooler.py", "roi_heads.py", "all_levels.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        forbidden = {"FPN", "DefaultAnchorGenerator", "ROIPooler", "poolers", "anchor_generator"}
        assert not imported & forbidden
    for component in (fpn_ext.FeaturePyramid, fpn_ext.PyramidAnchorGenerator):
        bases = {base.__name__ for base in component.__mro__}
        assert not bases & {"FPN", "DefaultAnchorGenerator"}


def test_everything_public_is_exported_and_described():
    public = {"FeaturePyramid", "PyramidAnchorGenerator", "LevelMappedROIPooler", "PyramidROIHeads"}
    functions = {"get_cfg", "add_fpn_ext_config", "assign_levels", "load_config", "check_config"}
    assert public | functions <= set(fpn_ext.__all__)
    for name in fpn_ext.__all__:
        assert getattr(fpn_ext, name).__doc__, f"{name} has no docstring"


DOCUMENTS = [Path("README.md"), *Path("docs").rglob("*.md"), *Path("configs").glob("*.md"),
             Path("datasets/README.md")]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_files_a_document_names_exist(document):
    """Paths in back-ticks and in commands, unless a run makes them; and links."""
    text = document.read_text()
    made_by_runs = ("output/", "datasets/", "out/", "my_", "/path/")
    named = set(re.findall(r"(?:`|\s)((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|txt|sh|in))\b", text))
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    missing = [
        path
        for path in sorted(named | links)
        if not path.startswith(("http", *made_by_runs))
        and not Path(path).exists()
        and not (document.parent / path).exists()
    ]
    assert missing == []


def test_the_commands_of_the_readme_exist():
    readme = Path("README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", Path("Makefile").read_text(), flags=re.M))
    commands = set(re.findall(r"(?:^    |`)make ([a-z]+)", readme, flags=re.M))
    assert {"demo", "test"} <= commands <= targets
    for module in re.findall(r"python -m fpn_ext\.(\w+)", readme):
        assert module in MODULES


def test_ci_runs_the_readmes_test_command():
    script = Path(".ci/run").read_text().splitlines()
    assert "make test" in script


def test_the_errors_the_documents_quote_are_real():
    """Each is raised here, or its fixed parts stand in the source; <...> is what varies."""
    page = Path("docs/start/troubleshooting.md")
    quoted = re.findall(r"^> `(.+)`$", page.read_text(), flags=re.M)
    assert len(quoted) >= 5
    raised = []
    with pytest.raises(KeyError) as error:
        Registry("BACKBONE").get("FeaturePyramid")
    raised.append(error.value.args[0])
    with pytest.raises(KeyError) as error:
        get_detectron2_cfg().merge_from_file("configs/demo/faster_rcnn_R_18_FPN.yaml")
    raised.append(error.value.args[0])
    with pytest.raises(ImportError) as error:
        exec("from detectron2 import _NoSuchModule")
    raised.append("ImportError: " + str(error.value).replace("_NoSuchModule", "_C"))

    source = "".join(file.read_text() for file in PACKAGE.glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # join adjacent string literals
    source = re.sub(r"\{[^{}]*\}", "<>", source)  # what an f-string fills in
    source += Path("requirements/install.sh").read_text()
    for message in quoted:
        fixed_parts = re.split(r"<[^>]*>", message)
        assert any(message in text for text in raised) or all(
            part.strip() in source for part in fixed_parts
        ), message


@pytest.mark.parametrize("document", ["docs/guides/swapping.md", "datasets/README.md"])
def test_the_python_in_a_document_runs(document):
    (code,) = re.findall(r"```python\n(.*?)```", Path(document).read_text(), flags=re.S)
    exec(compile(code, document, "exec"), {})


def test_the_yaml_in_the_readme_is_a_config(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", Path("README.md").read_text(), flags=re.S)
    (tmp_path / "swap.yaml").write_text(text)
    cfg = fpn_ext.load_config(str(tmp_path / "swap.yaml"))
    assert cfg.MODEL.FPN_EXT == fpn_ext.get_cfg().MODEL.FPN_EXT, "the defaults are shown"
    assert cfg.MODEL.BACKBONE.NAME == "FeaturePyramid"
