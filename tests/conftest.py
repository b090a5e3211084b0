import json
import logging
import os
import tempfile
from pathlib import Path

# First: setuptools, needed by TensorBoard, fails once Python's own distutils is imported.
import setuptools  # noqa: F401

# isort: split

import fpn_ext
import pytest
import torch
from fpn_ext.data import demo_data
from fpn_ext.data.datasets import register_datasets
from fuzzing import tried
from hypothesis import HealthCheck, settings

# However busy the machine is: a test that takes long is not one that fails.
settings.register_profile(
    "any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any_machine")

# Tests use paths relative to the project root, wherever pytest is started.
os.chdir(Path(__file__).parents[1])

# No test reads or writes data in the project folder.
_real = os.environ.get("DETECTRON2_DATASETS", "datasets")
_datasets = tempfile.TemporaryDirectory(prefix="fpn_ext_tests_")
os.environ["DETECTRON2_DATASETS"] = _datasets.name
register_datasets()

# Nor in the user's cache folder; kernels that were compiled there are used. Layers are chosen by
# table, so that tests take the same ways everywhere; those of choosing measure.
os.environ["FPN_EXT_TUNE"] = "0"


@pytest.fixture(scope="session")
def demo_images():
    """``demo_multiscale_{train,val}`` with a few images; its folder."""
    root = Path(_datasets.name, "demo_multiscale")
    demo_data.ensure(root, num_train=6, num_val=4)
    return root


@pytest.fixture
def real_datasets():
    """The folder of a dataset that a user has fetched, by its name; skips where it is not."""

    def folder(name):
        if not Path(_real, name).is_dir():
            pytest.skip(f"no {name} in DETECTRON2_DATASETS ({_real})")
        return Path(_real, name)

    return folder


@pytest.fixture(autouse=True)
def logs_reach_pytest():
    """A training in this process, by train_net.main, keeps its log to handlers of its own.

    These also abbreviate the names in the records that pytest gets.
    """
    for name in ("fpn_ext", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.propagate = True
        logger.handlers = [h for h in logger.handlers if type(h) is not logging.StreamHandler]


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def number_of_threads():
    """``torch.set_num_threads``, restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_cfg():
    """A Faster R-CNN with this project's components over ResNet-18, small enough for a test."""
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return cfg


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest-xdist)
        session.config.workeroutput["tried"] = dict(tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    if tried:
        if file := os.environ.get("FUZZ_COUNTS"):  # tests/fuzz_long.py reads it
            Path(file).write_text(json.dumps(tried))
        found = ", ".join(f"{count} by {name}" for name, count in sorted(tried.items()))
        terminalreporter.write_line(f"{sum(tried.values())} fuzzed inputs: {found}")
