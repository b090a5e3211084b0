"""Which of Python, PyTorch, Detectron2, CUDA and this package are installed and work.

Needs only Python's standard library; everything that may fail is probed in a subprocess.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import pyexpat
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import _d2_compat
from .._d2_compat import detectron2_folder, has_compiled_operators
from ..reporting.findings import Finding
from . import remedies
from .remedies import PROJECT

PROBE_SECONDS = 300  # the first import of PyTorch from a cold network disk is slow

# Each probe prints one line of JSON. A crash, even of the interpreter, counts as its result.
TORCH_FACTS = """
import json, torch
facts = {
    "cuda": torch.version.cuda,
    "available": torch.cuda.is_available(),
    "threads": torch.get_num_threads(),
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "devices": [],
    "fault": "",
}
if facts["available"]:
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:
        facts["fault"] = str(error).strip().splitlines()[0]
"""
TORCH_PROBE = TORCH_FACTS + "print(json.dumps(facts))"
OPERATORS_PROBE = """
import json, torch
from detectron2 import _C
print(json.dumps({"cuda": _C.get_cuda_version(), "compiler": _C.get_compiler_version()}))
"""
PACKAGE_PROBE = f"""
import fpn_ext, os
{TORCH_FACTS}
import detectron2.engine, detectron2.evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog
from fpn_ext.data import datasets
from fpn_ext.kernels import compiled, roi_align_cuda
from fpn_ext.kernels.compiled import build
datasets.register_datasets()
def there(name):
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        return os.path.isfile(metadata.json_file)
    lists = os.path.join(metadata.get("dirname", ""), "ImageSets", "Main")
    return os.path.isfile(os.path.join(lists, metadata.get("split", "") + ".txt"))
facts["there"] = sorted(filter(there, DatasetCatalog.keys()))
facts["fused"] = roi_align_cuda.missing()
facts["kernels"] = build.instructions() if compiled.kernels() else ""
print(json.dumps(facts))
"""


def probe(code: str) -> tuple[dict[str, Any], str]:
    """A probe's parsed output and "", or {} and the last line it printed before failing."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer in {PROBE_SECONDS} seconds"
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    if done.returncode == 0:
        for line in reversed(done.stdout.splitlines()):
            if line.startswith("{"):
                return json.loads(line), ""
    last = [line for line in lines if line][-1:]
    if done.returncode < 0:
        last.append(f"(killed by signal {-done.returncode})")
    return {}, " ".join(last) or f"exit code {done.returncode}"


def python_version() -> Iterable[Finding]:
    version = platform.python_version()
    bounds = remedies.python_bounds()
    if satisfies(version, bounds):
        yield Finding("ok", "Python", f"{version}, {sys.executable}")
    else:
        wrong = f"{version}; {bounds} is needed"
        yield Finding("error", "Python", wrong, remedies.new_environment())
    if pyexpat.version_info < (2, 4, 1):
        yield Finding(
            "warning",
            "expat",
            f"{pyexpat.EXPAT_VERSION}: a hostile XML file can expand without bound; 2.4.1 does not "
            "let it",
            "install a newer Python, or libexpat from your system's updates",
        )


def requirements() -> list[str]:
    """This project's requirements, as in pyproject.toml: ``["torch>=2.4", ...]``."""
    text = remedies.project_file()
    if text:
        # Python 3.10 has no tomllib.
        listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
        return re.findall(r'"([^"]+)"', listed.group(1)) if listed else []
    try:
        asked = importlib.metadata.requires("fpn-ext") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [requirement for requirement in asked if ";" not in requirement]


def packages() -> Iterable[Finding]:
    for requirement in requirements():
        name = re.split(r"[<>=!~ ]", requirement)[0]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", name, "not installed", remedies.install(requirement))
            continue
        if satisfies(version, requirement[len(name) :]):
            yield Finding("ok", name, version)
        else:
            wrong = f"{version}; {requirement} is needed"
            yield Finding("error", name, wrong, remedies.install(requirement))


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds as in pyproject.toml (``>=``, ``<`` and ``!=``).

    >>> satisfies("2.11.0+cu130", ">=2.4"), satisfies("0.1.6", ">=0.1.5,<0.1.6")
    (True, False)
    >>> satisfies("2.0.10", ">=2.0.8,!=2.0.9,!=2.0.10")
    False
    """
    found = _release(version)
    for bound in filter(None, bounds.replace(" ", "").split(",")):
        relation = bound.rstrip("0123456789.")
        wanted = _release(bound[len(relation) :])
        length = max(len(found), len(wanted))
        a, b = (r + (0,) * (length - len(r)) for r in (found, wanted))
        holds = {">=": a >= b, "<": a < b, "<=": a <= b, ">": a > b, "==": a == b, "!=": a != b}
        if not holds[relation]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """(2, 11, 0) for "2.11.0+cu130": the leading numbers."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


def torch_import(facts: dict[str, Any], fault: str) -> Iterable[Finding]:
    if fault and importlib.util.find_spec("torch"):
        yield Finding(
            "error",
            "import torch",
            fault,
            remedies.install("--force-reinstall", "torch", "torchvision"),
        )
    elif facts:
        yield Finding("ok", "import torch", "works")


def detectron2(torch: dict[str, Any]) -> Iterable[Finding]:
    try:
        folder = detectron2_folder()
    except ModuleNotFoundError:
        yield Finding("error", "Detectron2", "not installed", remedies.any_detectron2())
        return
    yield Finding("ok", "Detectron2", f"{_d2_compat.version(folder)}, {folder}")
    if not has_compiled_operators():
        yield Finding(
            "ok",
            "compiled operators",
            "none: rotated boxes and deformable convolution are not to be had, all else is "
            "(docs/start/install.md, 'Your own Detectron2')",
        )
        return
    operators, fault = probe(OPERATORS_PROBE)
    if fault:
        yield Finding(
            "error", "compiled operators", f"do not load: {fault}", remedies.build_detectron2()
        )
        return
    # "CUDA 12.4", or "not available" for a CPU-only build of Detectron2.
    built = _release(re.sub(r"^\D*", "", operators["cuda"]))
    ours = _release(torch.get("cuda") or "")
    value = f"load; built with {operators['compiler']}, CUDA: {operators['cuda']}"
    if torch.get("available") and built[:1] != ours[:1]:
        wrong = f"{value}; PyTorch is built for CUDA {torch['cuda']}"
        yield Finding("error", "compiled operators", wrong, remedies.build_detectron2())
    else:
        yield Finding("ok", "compiled operators", value)


def cuda(torch: dict[str, Any]) -> Iterable[Finding]:
    driver = printed_by("nvidia-smi", pattern=r"CUDA Version: *([\d.]+)")
    compiler = printed_by("nvcc", "--version", pattern=r"release ([\d.]+)")
    built = torch.get("cuda")
    value = (
        f"PyTorch: {built or 'none'}, driver: {driver or 'none'}, nvcc: {compiler or 'none'}; "
        + (", ".join(torch.get("devices", [])) or "no GPU in use")
    )
    fault = _cuda_fault(torch, driver)
    if fault and torch:
        yield Finding("error", "CUDA", f"{value}. {fault[0]}", fault[1])
    else:
        yield Finding("ok", "CUDA", value)
    if built and compiler and _release(built)[0] != _release(compiler)[0]:
        toolkit = Path(f"/usr/local/cuda-{built}")
        yield Finding(
            "warning",
            "nvcc",
            f"is of CUDA {compiler}, PyTorch of {built}: Detectron2's operators cannot be compiled",
            f"export CUDA_HOME={toolkit}"
            if toolkit.is_dir()
            else f"install the toolkit of CUDA {built}, and export CUDA_HOME with its folder",
        )


def _cuda_fault(torch: dict[str, Any], driver: str) -> tuple[str, str] | None:
    if not driver:
        return None
    if not torch.get("cuda"):
        return "This PyTorch is for the CPU alone", _reinstall_torch(driver)
    if _release(torch["cuda"])[0] > _release(driver)[0]:
        return (
            f"The driver supports CUDA up to {driver}",
            f"update the NVIDIA driver, or {_reinstall_torch(driver)}",
        )
    if not torch["available"]:
        hidden = "unset CUDA_VISIBLE_DEVICES; " if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        return "PyTorch sees no GPU", f"{hidden}nvidia-smi (does it list the GPU?)"
    if torch["fault"]:
        return f"PyTorch cannot use the GPU: {torch['fault']}", _reinstall_torch(driver)
    return None


def _reinstall_torch(driver: str) -> str:
    return (
        f"{remedies.install('--force-reinstall', 'torch', 'torchvision')} from the index that "
        f"https://pytorch.org/get-started/locally names for CUDA {driver}"
    )


def printed_by(*command: str, pattern: str) -> str:
    """The pattern's group in a program's output; "" if there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(pattern, done.stdout)
    return found.group(1) if found else ""


def package(facts: dict[str, Any], fault: str) -> Iterable[Finding]:
    if facts:
        yield Finding("ok", "import fpn_ext", "works, with Detectron2's trainer and evaluators")
        return
    missing = re.search(r"No module named '([\w.]+)'", fault)
    remedy = " or ".join(filter(None, [remedies.set_up(), "the remedies above"]))
    if missing and missing.group(1) not in ("torch", "detectron2"):
        remedy = remedies.install(missing.group(1).partition(".")[0])
    yield Finding("error", "import fpn_ext", fault, remedy)


def triton(torch: dict[str, Any], package: dict[str, Any]) -> Iterable[Finding]:
    if not torch.get("available") or not package:
        return  # fused RoI pooling is for GPUs
    if package["fused"] is None:
        yield Finding("ok", "Triton", "fused RoI pooling works")
    else:
        yield Finding(
            "warning",
            "Triton",
            f"RoI pooling goes level by level, slower, because of {package['fused']}",
            f"{remedies.first_a_compiler('cc', 'gcc', 'clang')}{remedies.install('triton')}",
        )
