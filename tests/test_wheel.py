"""The wheel contains every room and config, and trains outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `pip wheel .` builds it, from a copy: the build writes into its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("fpn_ext", "configs"):
        shutil.copytree(name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_it_has_every_room_and_every_config(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(file) for file in Path("fpn_ext").rglob("*.py")}
    configs = {f"fpn_ext/{file}" for file in Path("configs").rglob("*.yaml")}
    assert len(modules) > 150 and len(configs) > 40
    assert modules | configs <= packed
    others = {name for name in packed if name.startswith("fpn_ext/")} - modules - configs
    assert others == {"fpn_ext/configs/README.md"}


def test_it_trains_outside_the_checkout(wheel, demo_images, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [
        *(str(site / "bin" / "fpn-ext"), "train", "--config-file", DEMO),
        *("OUTPUT_DIR", str(tmp_path / "run"), "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2"),
        *(
            "SOLVER.IMS_PER_BATCH",
            "2",
            "INPUT.MIN_SIZE_TRAIN",
            "(64,)",
            "INPUT.MIN_SIZE_TEST",
            "64",
        ),
        *("DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model_final.pth").is_file()
    # The package that ran is the installed one, with its own configs.
    where = "import fpn_ext.files.shipped as s; print(s.configs())"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(site / "fpn_ext" / "configs")
