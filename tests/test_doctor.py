"""The doctor finds faults, names the command that fixes each, and never fails itself."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.util import resolve_name
from pathlib import Path

import pytest
from fpn_ext.doctor import installation, machine, remedies
from fpn_ext.reporting.findings import Finding, table

PROJECT = str(Path(__file__).parents[1])
TORCH = {"cuda": "13.0", "available": True, "threads": 2, "cpu": "AVX2", "devices": ["H100"]}
TORCH["fault"] = ""


def run(python, *arguments, path=()):
    done = subprocess.run(
        [python, "-m", "fpn_ext", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([PROJECT, *map(str, path)])},
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout


def only(findings):
    (finding,) = findings
    return finding


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An empty virtual environment."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


def test_this_environment_is_healthy(tmp_path):
    code, printed = run(sys.executable, "--output", str(tmp_path))
    assert code == 0, printed
    assert "\n0 error(s), " in printed
    for name in ("torch", "Detectron2", "compiled operators", "import fpn_ext", "CPU"):
        assert re.search(rf"^(ok|warning) +{name} ", printed, flags=re.M), name


def test_nothing_installed(bare_python, tmp_path):
    code, printed = run(bare_python, "--json", str(tmp_path / "report.json"))
    assert code == 1
    findings = json.loads((tmp_path / "report.json").read_text())["findings"]
    wrong = {f["subject"]: f for f in findings if f["status"] == "error"}
    assert {"torch", "numpy", "Pillow", "Detectron2", "import fpn_ext"} <= set(wrong)
    # Whichever way to install there is here; each of them is tested below.
    assert bare_python in wrong["torch"]["remedy"]
    assert wrong["torch"]["remedy"].endswith(" 'torch>=2.4'")
    assert "make setup" in wrong["Detectron2"]["remedy"]
    assert all(f["remedy"] for f in wrong.values())
    assert f"-> {wrong['torch']['remedy']}" in printed


def test_detectron2_missing_alone(bare_python, tmp_path):
    import torch

    for entry in Path(torch.__file__).parents[1].iterdir():
        if "detectron2" not in entry.name and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    code, printed = run(bare_python, path=[tmp_path])
    assert code == 1
    wrong = re.findall(r"^error +(\S+(?: \S+)*)  ", printed, flags=re.M)
    assert wrong == ["Detectron2", "import fpn_ext"]
    assert "detectron2.git" in printed or shutil.which("git") is None  # the remedy needs git


def test_only_the_doctor_goes_without_the_package(bare_python):
    done = subprocess.run(
        [bare_python, "-c", "import fpn_ext; fpn_ext.get_cfg()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PROJECT},
    )
    assert "fpn_ext needs Detectron2, which is not installed" in done.stderr


def test_the_doctor_needs_the_standard_library_alone():
    """The transitive imports of the entry point and the verb's file."""
    todo, seen = ["fpn_ext.__main__", "fpn_ext.tools.doctor"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        todo += set(imports(module)) - seen
    rooms = ("doctor.installation", "doctor.machine", "reporting.findings", "_d2_compat")
    assert {f"fpn_ext.{module}" for module in rooms} <= seen
    assert {name.partition(".")[0] for name in seen} <= {*sys.stdlib_module_names, "fpn_ext"}


def imports(module):
    """The modules that a module of this package imports, and its package.

    At module level; for the verb, which imports its room once it runs, in functions too.
    """
    if module.partition(".")[0] != "fpn_ext":
        return
    path = Path(PROJECT, *module.split("."))
    package = module if path.is_dir() else module.rpartition(".")[0]
    yield package
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if module == "fpn_ext.tools.doctor" else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = Path(PROJECT, *base.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{base}.{alias.name}" if is_module else base


def test_the_requirements_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10")
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert installation.requirements() == project["dependencies"]
    assert remedies.python_bounds() == project["requires-python"] == ">=3.10,<3.15"


def test_an_installed_package_knows_the_same_bounds(outside_the_checkout, monkeypatch):
    asked = {"Requires-Python": "<3.15,>=3.10"}
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: asked)
    assert remedies.python_bounds() == "<3.15,>=3.10"
    assert list(remedies.minor_versions()) == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.4.0", ">=2.4", True),
        ("2.4", ">=2.4.0", True),
        ("2.10", ">=2.4", True),
        ("2.3.9", ">=2.4", False),
        ("0.1.5.post20221221", ">=0.1.5,<0.1.6", True),
        ("0.1.6", ">=0.1.5,<0.1.6", False),
        ("2.4.0a1+cpu", ">=2.4", True),
        ("unknown", ">=2.4", False),
        ("1", "", True),
    ],
)
def test_bounds(version, bounds, fits):
    assert installation.satisfies(version, bounds) == fits


def test_a_version_out_of_bounds(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.6")
    found = {f.subject: f for f in installation.packages()}
    assert found["fvcore"].text == "0.1.6; fvcore>=0.1.5,<0.1.6 is needed"
    assert found["fvcore"].remedy.endswith("pip install 'fvcore>=0.1.5,<0.1.6'")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("3.9.18", "error"),
        ("3.10.0", "ok"),
        ("3.14.9", "ok"),
        ("3.15.0a1", "error"),
    ],
)
def test_pythons_out_of_bounds(monkeypatch, version, status):
    monkeypatch.setattr("platform.python_version", lambda: version)
    finding = next(iter(installation.python_version()))
    assert finding.status == status and finding.text.startswith(version)
    assert bool(finding.remedy) == (status == "error")


# Remedies name what is on this machine, and nothing else.


@pytest.fixture
def only_these_programs(monkeypatch, tmp_path):
    """Sets which programs there are, in a folder that is the whole of PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # without the uv that `make setup` brings

    def programs(*names):
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
        return folder

    remedies.pip_install.cache_clear()
    yield programs
    remedies.pip_install.cache_clear()


@pytest.fixture
def only_these_modules(monkeypatch):
    """Sets which of pip and ensurepip this Python has."""

    def modules(*names):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, package=None: name in names or None
        )

    return modules


@pytest.fixture
def outside_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(remedies, "PROJECT", tmp_path / "site-packages")


@pytest.mark.parametrize(
    ("modules", "programs", "command"),
    [
        (["pip", "ensurepip"], ["uv"], "{python} -m pip install"),
        (["ensurepip"], ["uv"], "uv pip install --python {python}"),
        (["ensurepip"], ["apt-get"], "{python} -m ensurepip && {python} -m pip install"),
        ([], ["apt-get"], "apt-get install python3-pip; then {python} -m pip install"),
        ([], ["dnf"], "dnf install python3-pip; then {python} -m pip install"),
        ([], [], "install pip for {python}; then {python} -m pip install"),
    ],
)
def test_how_packages_are_installed(
    only_these_programs, only_these_modules, modules, programs, command
):
    only_these_programs(*programs)
    only_these_modules(*modules)
    assert remedies.install("yacs") == command.format(python=sys.executable) + " 'yacs'"


def test_the_uv_that_set_up_brought(only_these_programs, only_these_modules):
    only_these_programs()
    only_these_modules("ensurepip")
    uv = Path(sys.prefix, ".uv", "bin", "uv")
    uv.parent.mkdir(parents=True)
    uv.touch(0o755)
    assert remedies.pip_install() == f"{uv} pip install --python {sys.executable}"


def test_a_python_that_the_system_manages(only_these_programs, monkeypatch, tmp_path):
    """Debian's pip installs nothing outside of an environment (PEP 668)."""
    only_these_programs("apt-get")
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "-m venv" not in remedies.install("yacs")
    remedies.pip_install.cache_clear()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    made, _, then = remedies.install("yacs").partition(" && ")
    assert made == f"{sys.executable} -m venv NEW_FOLDER"
    assert then == "NEW_FOLDER/bin/python -m pip install 'yacs'"


def test_set_up_is_offered_in_the_checkout_alone(only_these_programs, monkeypatch, request):
    monkeypatch.chdir(PROJECT)
    only_these_programs()
    stated = {"PYTHON": "python3.14", "VENV": "v"}
    assert remedies.set_up(**stated) == "PYTHON=python3.14 sh requirements/install.sh v"
    only_these_programs("make")
    assert remedies.set_up() == "make setup"
    assert remedies.set_up(**stated) == "make setup PYTHON=python3.14 VENV=v"
    monkeypatch.chdir("/")
    assert remedies.set_up() == f"cd {PROJECT!r} && make setup"
    request.getfixturevalue("outside_the_checkout")
    assert remedies.set_up() == ""
    assert "make" not in remedies.any_detectron2()
    fault = "ModuleNotFoundError: No module named 'torch'"
    assert only(installation.package({}, fault)).remedy == "the remedies above"


def test_a_python_that_fits(only_these_programs, outside_the_checkout, monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.metadata", lambda n: {"Requires-Python": "<3.12,>=3.10"}
    )
    assert remedies.new_environment() == "install one of python3.10, python3.11"
    folder = only_these_programs("uv")
    assert remedies.new_environment() == "uv venv --python 3.11 NEW_FOLDER"
    only_these_programs("python3.10", "python3.12")
    assert remedies.new_environment() == f"{folder}/python3.10 -m venv NEW_FOLDER"


def test_a_python_that_fits_in_the_checkout(only_these_programs, monkeypatch):
    monkeypatch.chdir(PROJECT)
    folder = only_these_programs("make", "python3.12", "python3.14", "python3.15")
    expected = f"make setup PYTHON={folder}/python3.14 VENV=.venv-new"
    assert remedies.new_environment() == expected


@pytest.mark.parametrize(
    ("programs", "first"),
    [
        (["c++", "apt-get"], ""),
        (["apt-get"], "apt-get install g++; then "),
        (["dnf"], "dnf install gcc-c++; then "),
        (["pacman"], "pacman -S gcc; then "),
        ([], "install gcc-c++; then "),
    ],
)
def test_detectron2_is_built_with_what_there_is(
    only_these_programs, only_these_modules, programs, first
):
    only_these_modules("pip")
    only_these_programs(*programs)
    begin = f"{first}{sys.executable} -m pip install --no-build-isolation"
    without_git = remedies.build_detectron2()
    assert without_git.startswith(begin) and "git+https" not in without_git
    only_these_programs("git")
    with_git = remedies.build_detectron2()
    assert with_git.startswith(begin) and with_git.endswith("detectron2.git'")


# Probes.


def test_a_probe_that_crashes_python():
    facts, fault = installation.probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert facts == {} and fault == "(killed by signal 11)"


def test_a_probe_that_hangs(monkeypatch):
    monkeypatch.setattr(installation, "PROBE_SECONDS", 0.5)
    assert installation.probe("import time; time.sleep(60)") == ({}, "no answer in 0.5 seconds")


def test_a_probe_among_other_output():
    assert installation.probe("print('{\"a\": 1}'); print('bye')") == ({"a": 1}, "")
    facts, fault = installation.probe("print('hello'); 1 / 0")
    assert facts == {} and fault == "ZeroDivisionError: division by zero"


def test_a_torch_that_does_not_import():
    fault = "ImportError: libcudart.so.12: cannot open shared object file"
    finding = only(installation.torch_import({}, fault))
    assert (finding.status, finding.text) == ("error", fault)
    assert "'--force-reinstall' 'torch' 'torchvision'" in finding.remedy


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("ModuleNotFoundError: No module named 'yacs.config'", "install 'yacs'"),
        ("ModuleNotFoundError: No module named 'torch'", "make setup"),
        ("AttributeError: module 'numpy' has no attribute 'x'", "make setup"),
    ],
)
def test_a_package_that_does_not_import(fault, remedy):
    finding = only(installation.package({}, fault))
    assert (finding.status, finding.text) == ("error", fault) and remedy in finding.remedy


# Detectron2's operators and CUDA.


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A compiled Detectron2, judging by its files; returns a setter for its probe's answer."""
    (tmp_path / "__init__.py").write_text('__version__ = "0.6"\n')
    monkeypatch.setattr(installation, "detectron2_folder", lambda: tmp_path)
    monkeypatch.setattr(installation, "has_compiled_operators", lambda: True)
    return lambda answer: monkeypatch.setattr(installation, "probe", lambda code: answer)


@pytest.mark.parametrize(
    ("built", "torch", "status"),
    [
        ("CUDA 13.0", TORCH, "ok"),
        ("CUDA 13.1", TORCH, "ok"),  # minor versions support each other
        ("CUDA 12.4", TORCH, "error"),
        ("not available", TORCH, "error"),
        ("not available", {**TORCH, "available": False}, "ok"),
        ("not available", {**TORCH, "cuda": None, "available": False}, "ok"),
    ],
)
def test_compiled_operators_that_load(compiled, built, torch, status):
    compiled(({"cuda": built, "compiler": "GCC 12"}, ""))
    folder, operators = installation.detectron2(torch)
    assert folder.text.startswith("0.6 (tag), ")
    assert operators.status == status
    assert built in operators.text
    assert ("--no-build-isolation" in operators.remedy) == (status == "error")


def test_compiled_operators_that_do_not_load(compiled):
    compiled(({}, "ImportError: _C.so: undefined symbol: _ZN2at"))
    _, operators = installation.detectron2(TORCH)
    assert (operators.status, operators.text) == (
        "error",
        "do not load: ImportError: _C.so: undefined symbol: _ZN2at",
    )


def test_a_compiled_module_that_is_none(tmp_path, monkeypatch):
    """The real probe, on a file that is not a library."""
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").touch()
    suffix = __import__("importlib.machinery").machinery.EXTENSION_SUFFIXES[0]
    (package / f"_C{suffix}").write_text("no library")
    monkeypatch.setattr(installation, "PROJECT", tmp_path)  # comes first in the probe's path
    facts, fault = installation.probe(installation.OPERATORS_PROBE)
    assert facts == {} and fault.startswith("ImportError")


@pytest.mark.parametrize(
    ("torch", "driver", "message"),
    [
        (TORCH, "13.1", None),
        (TORCH, "12.4", "The driver supports CUDA up to 12.4"),
        ({**TORCH, "cuda": "12.8"}, "12.2", None),  # minor versions support each other
        ({**TORCH, "cuda": None, "available": False}, "13.0", "is for the CPU alone"),
        ({**TORCH, "available": False}, "13.0", "PyTorch sees no GPU"),
        ({**TORCH, "fault": "no kernel image"}, "13.0", "cannot use the GPU: no kernel image"),
        ({**TORCH, "available": False, "devices": []}, "", None),
    ],
)
def test_cuda(monkeypatch, torch, driver, message):
    monkeypatch.setattr(
        installation,
        "printed_by",
        lambda *command, pattern: driver if command[0] == "nvidia-smi" else "",
    )
    finding = only(installation.cuda(torch))
    assert finding.status == ("error" if message else "ok")
    assert (message or "") in finding.text
    assert bool(finding.remedy) == bool(message)


def test_a_compiler_of_another_cuda(monkeypatch):
    monkeypatch.setattr(
        installation, "printed_by", lambda *command, pattern: "12.4" if command[0] == "nvcc" else ""
    )
    _, compiler = installation.cuda(TORCH)
    assert compiler.status == "warning" and "is of CUDA 12.4, PyTorch of 13.0" in compiler.text


def test_what_a_program_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert installation.printed_by("nvcc", "--version", pattern=r"release ([\d.]+)") == "12.4"
    assert installation.printed_by("no_such_program", pattern="(x)") == ""


def test_triton():
    assert list(installation.triton({**TORCH, "available": False}, {"fused": "no GPU"})) == []
    assert only(installation.triton(TORCH, {"fused": None})).status == "ok"
    finding = only(installation.triton(TORCH, {"fused": "a Python without Triton"}))
    assert finding.status == "warning" and "install 'triton'" in finding.remedy


def test_triton_needs_a_compiler(only_these_programs):
    only_these_programs("dnf")
    remedy = only(installation.triton(TORCH, {"fused": "no C compiler"})).remedy
    assert remedy.startswith("dnf install gcc; then ")
    only_these_programs("cc")
    remedy = only(installation.triton(TORCH, {"fused": "no C compiler"})).remedy
    assert "gcc" not in remedy


def test_the_cuda_toolkit_that_is_here(monkeypatch):
    monkeypatch.setattr(
        installation, "printed_by", lambda *command, pattern: "12.4" if command[0] == "nvcc" else ""
    )
    for there in (True, False):
        monkeypatch.setattr(Path, "is_dir", lambda self, there=there: there)
        _, compiler = installation.cuda(TORCH)
        assert ("export CUDA_HOME=/usr/local/cuda-13.0" in compiler.remedy) == there


@pytest.mark.parametrize("hidden", [True, False])
def test_a_gpu_that_is_hidden(monkeypatch, hidden):
    monkeypatch.setattr(installation, "printed_by", lambda *command, pattern: "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = only(installation.cuda({**TORCH, "available": False}))
    assert ("unset CUDA_VISIBLE_DEVICES" in finding.remedy) == hidden


# The machine.


@pytest.mark.parametrize(
    ("threads", "variable", "status", "remedy"),
    [
        (2, "2", "ok", ""),
        (2, "", "ok", ""),
        (8, "8", "warning", "export OMP_NUM_THREADS=2"),
        (2, "many", "warning", "unset OMP_NUM_THREADS"),
    ],
)
def test_threads(monkeypatch, threads, variable, status, remedy):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.5)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    finding = only(machine.cpu({**TORCH, "threads": threads}))
    assert (finding.status, finding.remedy) == (status, remedy)


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", 4.0)])
def test_a_containers_quota(monkeypatch, text, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert machine.usable_cores() == cores


def test_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    finding = only(machine.datasets({"there": ["bccd_test"]}))
    assert finding.status == "ok" and "bccd_test" in finding.text
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    finding = only(machine.datasets({}))
    assert finding.status == "warning" and f"mkdir -p {tmp_path / 'none'}" in finding.remedy


def test_a_folder_that_cannot_be_written_into(monkeypatch, tmp_path):
    (tmp_path / "file").touch(0o755)
    assert only(machine.output_folder(tmp_path / "new" / "run")).status == "ok"
    assert only(machine.output_folder(tmp_path / "file" / "run")).status == "error"
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = only(machine.output_folder(tmp_path / "run"))
    assert finding.status == "error" and "OUTPUT_DIR" in finding.remedy


def test_little_room(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(total=64 * 1024**2, free=64 * 1024**2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert only(machine.output_folder(tmp_path)).status == "warning"
    if os.path.isdir("/dev/shm"):
        finding = only(machine.shared_memory())
        assert finding.text.startswith("/dev/shm has 64 MB")
        assert "DATALOADER.NUM_WORKERS 0" in finding.remedy
        for file, remedy in (("none", "mount -o remount"), ("is", "container with --shm-size")):
            (tmp_path / "is").touch()
            monkeypatch.setattr(machine, "CONTAINER_FILES", (str(tmp_path / file),))
            assert remedy in only(machine.shared_memory()).remedy


def test_every_fault_has_its_remedy_in_the_table():
    findings = [Finding("ok", "a", "x"), Finding("error", "b", "y", "mend it")]
    lines = table(findings).splitlines()
    assert lines[2].strip() == "-> mend it" and lines[-1] == "1 error(s), 0 warning(s)"


def test_compiled_kernels_are_said_to_be_there():
    assert list(machine.kernels({})) == [], "no package, said elsewhere"
    assert only(machine.kernels({"kernels": "AVX2"})).text == "for AVX2"
    finding = only(machine.kernels({"kernels": ""}))
    assert finding.status == "note" and finding.remedy == "fpn-ext doctor --compile"
