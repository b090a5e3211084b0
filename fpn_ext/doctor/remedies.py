"""Commands that mend an installation, made of what this machine has.

No line names a program that is not here: neither ``make setup`` outside the checkout, nor ``pip``
where this Python has none, nor a package manager that the system does not use.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import fpn_ext

PROJECT = Path(fpn_ext.__file__).resolve().parents[1]
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git"
# Of the package managers that name their C compiler gcc and its C++ part gcc-c++ or g++.
SYSTEM_INSTALL = {
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "zypper": "zypper install",
    "apk": "apk add",
    "pacman": "pacman -S",
}


def project_file() -> str:
    """The text of pyproject.toml; "" where this is an installed package, not a checkout."""
    file = PROJECT / "pyproject.toml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text if 'name = "fpn-ext"' in text else ""


def python_bounds() -> str:
    """``requires-python`` of pyproject.toml: ``">=3.A,<3.B"``; "" if that is not known."""
    stated = re.search(r'^requires-python = "(.*)"', project_file(), re.M)
    if stated:
        return stated.group(1)
    try:
        return importlib.metadata.metadata("fpn-ext")["Requires-Python"] or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def minor_versions() -> range:
    """The N of each Python 3.N within :func:`python_bounds`.

    >>> [f"3.{n}" for n in minor_versions()]
    ['3.10', '3.11', '3.12', '3.13', '3.14']
    """
    bounds = {sign: int(minor) for sign, minor in re.findall(r"(>=|<)3\.(\d+)", python_bounds())}
    return range(bounds.get(">=", 0), bounds.get("<", 0))


def set_up(**variables: str) -> str:
    """``make setup NAME=value ...``, or without make what it runs; "" outside the checkout."""
    if not project_file():
        return ""
    if shutil.which("make"):
        return " ".join(
            [*_from(PROJECT), "make setup", *(f"{k}={v}" for k, v in variables.items())]
        )
    folder = variables.pop("VENV", ".venv")
    stated = [f"{k}={v}" for k, v in variables.items()]
    return " ".join([*_from(PROJECT), *stated, "sh requirements/install.sh", folder])


def _from(folder: Path) -> list[str]:
    return [] if Path.cwd() == folder else [f"cd {str(folder)!r} &&"]


def new_environment() -> str:
    """An environment of a Python that is within the bounds."""
    names = [f"python3.{minor}" for minor in reversed(minor_versions())]
    python = next(filter(None, map(shutil.which, names)), "")
    if python:
        return set_up(PYTHON=python, VENV=".venv-new") or f"{python} -m venv NEW_FOLDER"
    if not names:
        return "install a newer Python"
    uv = find_uv()
    if uv:
        return f"{uv} venv --python {names[0].removeprefix('python')} NEW_FOLDER"
    return f"install one of {', '.join(reversed(names))}"


def find_uv() -> str:
    """The uv that ``make setup`` brought, or the one on PATH; "" without either."""
    brought = Path(sys.prefix, ".uv", "bin", "uv")
    return str(brought) if os.access(brought, os.X_OK) else "uv" if shutil.which("uv") else ""


@functools.cache
def pip_install() -> str:
    """Installs packages into this Python."""
    python = sys.executable
    if sys.prefix == sys.base_prefix and _externally_managed():
        python = "NEW_FOLDER/bin/python"
        return f"{sys.executable} -m venv NEW_FOLDER && {python} -m pip install"
    if importlib.util.find_spec("pip"):
        return f"{python} -m pip install"
    uv = find_uv()
    if uv:
        return f"{uv} pip install --python {python}"
    if importlib.util.find_spec("ensurepip"):
        return f"{python} -m ensurepip && {python} -m pip install"
    first = system_install("python3-pip") or f"install pip for {python}"
    return f"{first}; then {python} -m pip install"


def _externally_managed() -> bool:
    """Whether pip leaves this Python to the system (PEP 668), as Debian's does."""
    return Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file()


def install(*what: str) -> str:
    return f"{pip_install()} {' '.join(repr(w) for w in what)}"


def system_install(package: str) -> str:
    """Installs a package of the system; "" if this system's way is not known."""
    manager = next(filter(shutil.which, SYSTEM_INSTALL), "")
    return f"{SYSTEM_INSTALL[manager]} {package}" if manager else ""


def first_a_compiler(*names: str) -> str:
    """ "" if one of the compilers is here, else what installs gcc, and "; then "."""
    if any(map(shutil.which, names)):
        return ""
    package = "g++" if "c++" in names else "gcc"
    if package == "g++" and not (shutil.which("apt-get") or shutil.which("apk")):
        package = "gcc" if shutil.which("pacman") else "gcc-c++"
    return f"{system_install(package) or f'install {package}'}; then "


def build_detectron2() -> str:
    """Detectron2 with its compiled operators, from its source, replacing one that is here."""
    command = f"{pip_install()} --no-build-isolation --force-reinstall --no-deps"
    compiler = first_a_compiler("c++", "g++", "clang++")
    if shutil.which("git"):
        return f"{compiler}{command} '{DETECTRON2_SOURCE}'"
    return f"{compiler}{command} DETECTRON2 (a folder with its source; there is no git here)"


def any_detectron2() -> str:
    """A Detectron2 where there is none: the pure-Python one, or one built from source."""
    pure = set_up()
    return f"{pure} (a pure-Python one), or {build_detectron2()}" if pure else build_detectron2()
