"""Runs Detectron2's own tests of anchors, pooler, RPN and RoI heads on this project's classes.

    make test-detectron2 SRC=/path/to/detectron2

``SRC`` is a source checkout of the Detectron2 that is installed. In this process alone, its names
stand for our classes: where its tests import them, and in the registries that its configs look them
up in, with the defaults that they have there. Tests of rotated boxes are left out, by name: they
need compiled operators, or classes that we do not replace. The last line counts what became of the
tests; the exit status is pytest's, or 2 where there is nothing to run.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FILES = ("test_anchor_generator.py", "test_roi_pooler.py", "test_rpn.py", "test_roi_heads.py")

# Detectron2's class: our replacement.
SWAPPED = {
    "DefaultAnchorGenerator": "PyramidAnchorGenerator",
    "ROIPooler": "LevelMappedROIPooler",
    "RPN": "PyramidRPN",
    "StandardROIHeads": "PyramidROIHeads",
}

# Skipped tests, and why.
ROTATED = {
    "TestAnchorGenerator::test_rrpn_anchor_generator": "tests RotatedAnchorGenerator",
    "TestROIPooler::test_roialignv2_roialignrotated_match_cpu": "pools by ROIAlignRotated",
    "TestROIPooler::test_roialignv2_roialignrotated_match_cuda": "pools by ROIAlignRotated",
    "RPNTest::test_rrpn": "tests RRPN on RotatedAnchorGenerator",
    "RPNTest::test_rrpn_scriptability": "tests RRPN on RotatedAnchorGenerator",
    "ROIHeadsTest::test_rroi_heads": "tests RROIHeads, which pool by ROIAlignRotated",
}


def files_of(source: str) -> list[Path]:
    """The four files of a source checkout.

    Raises:
        ValueError: none is named, or a file is not there.
    """
    usage = "make test-detectron2 SRC=/path/to/detectron2 (a source checkout, with tests/modeling)"
    if not source:
        raise ValueError(f"SRC is not set; run {usage}")
    files = [Path(source).resolve() / "tests" / "modeling" / name for name in FILES]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"SRC={source}: no {', '.join(missing)}; run {usage}")
    return files


def swap() -> None:
    """Replace Detectron2's classes by ours for the rest of this process."""
    import fpn_ext
    from detectron2 import modeling
    from detectron2.modeling import poolers

    originals = {
        "DefaultAnchorGenerator": modeling.anchor_generator.DefaultAnchorGenerator,
        "ROIPooler": poolers.ROIPooler,
        "RPN": modeling.proposal_generator.RPN,
        "StandardROIHeads": modeling.StandardROIHeads,
    }
    modules = [
        module
        for name, module in sys.modules.items()
        if f"{name}.".startswith("detectron2.modeling.")
    ]
    registries = (
        modeling.ANCHOR_GENERATOR_REGISTRY,
        modeling.PROPOSAL_GENERATOR_REGISTRY,
        modeling.ROI_HEADS_REGISTRY,
    )
    for name, original in originals.items():
        ours = getattr(fpn_ext, SWAPPED[name])
        for module in modules:
            if getattr(module, name, None) is original:
                setattr(module, name, ours)
        for registry in registries:
            if name in registry:
                registry._obj_map[name] = ours


def find_configs(source: Path) -> None:
    """The model zoo's configs from the checkout, if the installed Detectron2 has none."""
    from detectron2.model_zoo import model_zoo

    if (Path(model_zoo.__file__).parent / "configs").is_dir():
        return
    print(f"The installed Detectron2 has no configs; taken from {source / 'configs'}")
    model_zoo.get_config_file = lambda path: str(source / "configs" / path)


class Suite:
    """A plugin of pytest: leaves out what is in ``ROTATED``, and counts."""

    def __init__(self):
        self.counts = dict.fromkeys(("passed", "failed", "skipped", "deselected"), 0)
        self.left_out = []

    def pytest_collection_modifyitems(self, config, items):
        self.left_out = [item for item in items if name_of(item) in ROTATED]
        config.hook.pytest_deselected(items=self.left_out)
        items[:] = [item for item in items if name_of(item) not in ROTATED]
        self.counts["deselected"] = len(self.left_out)

    def pytest_collectreport(self, report):
        self.counts["failed"] += report.failed

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter):
        for item in self.left_out:
            reason = ROTATED[name_of(item)]
            terminalreporter.write_line(f"DESELECTED {name_of(item)}: {reason}")


def name_of(item) -> str:
    """``Class::test``, without the file."""
    return item.nodeid.partition("::")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="?", default="", help="a source checkout of Detectron2")
    source = parser.parse_args().source
    try:
        files = files_of(source)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    import fpn_ext  # noqa: F401  # before detectron2
    import detectron2
    import pytest
    from scripting import detectron2_scripting

    print(f"Detectron2 {detectron2.__version__} in {Path(detectron2.__file__).parent}")
    detectron2_scripting()
    swap()
    root = Path(source).resolve()
    find_configs(root)
    suite = Suite()
    # Ignore the checkout's settings and detectron2 package.
    options = ["-c", os.devnull, f"--rootdir={root}", f"--confcutdir={root}"]
    options += ["--import-mode=importlib", "-p", "no:cacheprovider", "--disable-warnings", "-v"]
    options += ["--continue-on-collection-errors"]
    status = pytest.main([*options, "-rsf", *map(str, files)], plugins=[suite])
    print(", ".join(f"{number} {outcome}" for outcome, number in suite.counts.items()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
