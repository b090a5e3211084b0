"""The wheel contains every room and config, and trains outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

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
    assert others == {"fpn_ext/configs/README.md", "fpn_ext/kernels/compiled/kernels.c"}


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Installs the wheel, by name alone, into an environment with nothing in it but pip's sight.

    What the wheel requires comes from this environment's folder, so that nothing is downloaded; a
    requirement that this folder does not satisfy is an error. Gives the environment's folder, and
    sets which entries of this environment it sees.
    """

    def environment(seen):
        folder = tmp_path_factory.mktemp("bare")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        libraries = folder / "libraries"
        libraries.mkdir()
        for entry in Path(torch.__file__).parents[1].iterdir():
            # An editable fpn_ext is a .pth file and a record.
            if entry.suffix != ".pth" and "fpn_ext" not in entry.name and seen(entry.name):
                (libraries / entry.name).symlink_to(entry)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(str(libraries))
        install = ["install", "--no-index", "--find-links", str(wheel.parent), "fpn-ext"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder)]
        done = subprocess.run([*pip, *install], capture_output=True, text=True, env=clean())
        assert done.returncode == 0, done.stderr
        return folder

    return environment


def clean(**more):
    """The environment variables, without what tells Python or pip where things are."""
    hidden = ("PYTHON", "PIP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return {**kept, "OMP_NUM_THREADS": "1", "PIP_CONFIG_FILE": os.devnull, **more}


def test_it_trains_outside_the_checkout(bare, demo_images, tmp_path):
    folder = bare(lambda name: True)
    command = [
        *(str(folder / "bin" / "fpn-ext"), "train", "--config-file", DEMO),
        *("OUTPUT_DIR", str(tmp_path / "run"), "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2"),
        *("SOLVER.IMS_PER_BATCH", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("DATALOADER.NUM_WORKERS", "2", "TEST.EVAL_PERIOD", "0"),
    ]
    strict = clean(PYTHONWARNINGS="error::FutureWarning")
    done = subprocess.run(command, cwd=tmp_path, env=strict, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model_final.pth").is_file()
    # The package that ran is the installed one, with its own configs.
    where = [
        folder / "bin" / "python",
        "-c",
        "import fpn_ext.files.shipped as s; print(s.configs())",
    ]
    found = subprocess.run(where, cwd=tmp_path, env=clean(), capture_output=True, text=True)
    (site,) = folder.glob("lib/python*/site-packages")
    assert found.stdout.strip() == str(site / "fpn_ext" / "configs")


def test_without_detectron2_the_first_command_says_how_to_get_it(bare, tmp_path):
    folder = bare(lambda name: "detectron2" not in name)
    command = [folder / "bin" / "fpn-ext", "train", "--config-file", DEMO]
    done = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip()
    assert message.startswith("fpn-ext train: error: fpn_ext needs Detectron2, which is not inst")
    assert "no release on PyPI" in message and "fpn-ext doctor" in message
    doctor = [folder / "bin" / "fpn-ext", "doctor"]
    said = subprocess.run(doctor, cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert said.returncode == 1
    remedy = said.stdout.partition("Detectron2          not installed")[2].splitlines()[1]
    assert "make setup" not in remedy and "--no-build-isolation" in remedy
