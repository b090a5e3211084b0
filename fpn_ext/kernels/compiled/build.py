"""Compiles kernels.c for this processor, once, into the user's cache folder.

    fpn-ext doctor --compile

``make setup`` does it where a C compiler is. Without the library everything is computed by torch's
operators, with the same results to rounding.
"""

import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
# By torch.backends.cpu.get_cpu_capability(), which ATEN_CPU_CAPABILITY holds down.
FLAGS = {
    "AVX2": ("-DLANES=8", "-mavx2", "-mfma"),
    "AVX512": (
        *("-DLANES=16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
COMMON_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
TIME_LIMIT = 120  # seconds; it takes about two


class CannotCompile(Exception):
    """Why there is no library, and what would help."""


def instructions() -> str:
    """The key of :data:`FLAGS` for the instructions torch uses here, or "" if there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in FLAGS else ""


@functools.cache
def openmp_of_torch() -> Path | None:
    """torch's own libgomp: with a second OpenMP, each would have its threads on the same cores."""
    packages = Path(torch.__file__).parent
    folders = (packages / "lib", packages.parent / "torch.libs")
    found = [file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))]
    return found[0] if found else None


def cache_folder() -> Path:
    """Where libraries and measured choices are kept: ``$XDG_CACHE_HOME/fpn_ext``.

    Raises:
        RuntimeError: there is neither that variable nor a home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpn_ext"


def library_file(isa: str) -> Path:
    """Where the library for these instructions is kept: another source, flags or torch, another
    file.

    Raises:
        RuntimeError: as for :func:`cache_folder`.
    """
    return cache_folder() / f"kernels-{isa.lower()}-{_digest(SOURCE, isa)}.so"


@functools.cache
def _digest(source: Path, isa: str) -> str:
    told = (source.read_text(), *COMMON_FLAGS, *FLAGS[isa], torch.__version__, openmp_of_torch())
    return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()[:16]


def is_trusted(file: Path) -> bool:
    """Whether only this user, or root, could have written the file."""
    facts = file.stat()
    return facts.st_uid in (os.getuid(), 0) and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def compile_library(isa: str) -> Path:
    """Compile kernels.c for these instructions, unless that was done; returns the library.

    The file is whole or not there, whatever interrupts this.

    Raises:
        CannotCompile: there is no GCC, torch has another OpenMP, the folder cannot be written, the
            compiler fails.
    """
    if not sys.platform.startswith("linux"):
        raise CannotCompile(f"the kernels are for Linux on x86-64, this is {sys.platform}")
    openmp = openmp_of_torch()
    if openmp is None:
        raise CannotCompile("this torch does not come with GCC's OpenMP (libgomp)")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise CannotCompile("there is no C compiler; on Debian: apt-get install gcc libc6-dev")
    try:
        file = library_file(isa)
    except RuntimeError as error:
        raise CannotCompile(f"{error} Set XDG_CACHE_HOME to a folder of yours") from None
    if file.exists() and is_trusted(file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder, file.name)
            command = [compiler, *COMMON_FLAGS, *FLAGS[isa], SOURCE, "-o", made, openmp, "-lm"]
            subprocess.run(
                list(map(str, command)),
                check=True,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
            made.chmod(0o755)
            made.replace(file)
    except subprocess.CalledProcessError as error:
        last = "\n".join(error.stderr.strip().splitlines()[-5:])
        raise CannotCompile(f"{compiler} failed: {last}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{file}: {error}") from None
    return file


def main() -> None:
    """Compile for the instructions of this processor, and say what came of it in one line."""
    isa = instructions()
    if not isa:
        print(
            "No compiled kernels: they need AVX2 or AVX-512, and torch has "
            f"{torch.backends.cpu.get_cpu_capability()} here"
        )
        return
    try:
        # An AVX-512 processor can be held to AVX2 (ATEN_CPU_CAPABILITY).
        for each in FLAGS if isa == "AVX512" else (isa,):
            file = compile_library(each)
        print(f"Kernels compiled for {isa} into {file.parent}")
    except CannotCompile as error:
        print(f"No compiled kernels: {error}. Results are the same, inference is slower.")
