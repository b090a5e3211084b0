"""Runs the suite in one environment and writes what became of it: a cell of the tested matrix.

    python tests/matrix.py run --name NAME [--venv VENV] [--detectron2 SRC] [-- PYTEST ARGUMENTS]

``results/matrix/NAME.json`` gets counts, names of failed tests, versions, commit and processor;
docs/generate.py makes the tables of README.md and docs/start/install.md of these files, and claims
nothing else there. Without pytest's arguments the whole suite is run; with them, a part of it, and
the file says so. The exit status is pytest's.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/matrix"

WHOLE_SUITE = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
# What the environment may tell libraries to do without, whatever the processor has.
OVERRIDES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")

# Asked in the environment that is tested, which need not be the one that runs this file.
FACTS = """
import json, warnings
warnings.simplefilter("ignore")
import fpn_ext, torch
from fpn_ext import _d2_compat
from fpn_ext.reporting import provenance
folder = _d2_compat.detectron2_folder()
print(json.dumps({
    **provenance.versions(),
    "detectron2": _d2_compat.version(folder),
    "compiled": _d2_compat.has_compiled_operators(),
    "folder": str(folder),
    "processor": provenance.hardware(),
    "capability": torch.backends.cpu.get_cpu_capability(),
}))
"""


def counts_of(report: Path) -> dict[str, Any]:
    """Counts and failed tests of pytest's JUnit report.

    Returns:
        ``passed``, ``failed``, ``errors`` and ``skipped``, numbers, and ``failures``: the names of
        the tests that failed or ended in an error, sorted, as ``tests.test_x::test_y``.
    """
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        counts["failed"] += "failure" in outcomes
        counts["errors"] += "error" in outcomes
        counts["skipped"] += "skipped" in outcomes
        counts["passed"] += not outcomes & {"failure", "error", "skipped"}
    return {**counts, "failures": sorted(set(failures))}


def processor_flags(cpuinfo: str) -> list[str]:
    """Those of ``FLAGS`` that the text of /proc/cpuinfo lists.

    >>> processor_flags("model name : X\\nflags\\t\\t: fpu avx2 avx512f")
    ['avx2', 'avx512f']
    """
    listed = re.search(r"^flags\s*:(.*)$", cpuinfo, re.M)
    return [flag for flag in FLAGS if listed and flag in listed[1].split()]


def git(folder: Path, *arguments: str) -> str:
    """What git says in a folder; "" where there is none, or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def facts_of(python: str, environment: dict[str, str], source: str) -> dict[str, Any]:
    """Versions, processor and commits, as the interpreter that runs the tests sees them."""
    done = subprocess.run(
        [python, "-c", FACTS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{python} cannot import this package:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    folder = Path(source or facts["folder"])
    del facts["folder"]
    cpuinfo = Path("/proc/cpuinfo")
    return {
        **facts,
        "detectron2_commit": git(folder, "rev-parse", "--short", "HEAD")
        if git(folder, "ls-files", "detectron2" if source else ".")
        else "",
        "flags": processor_flags(cpuinfo.read_text() if cpuinfo.is_file() else ""),
        "overrides": {name: os.environ[name] for name in OVERRIDES if name in os.environ},
        "commit": git(ROOT, "rev-parse", "--short", "HEAD"),
        # What other cells of the matrix have written is no change of what is tested.
        "dirty": bool(git(ROOT, "status", "--porcelain", "--", ".", ":!results/matrix")),
        "date": datetime.date.today().isoformat(),
    }


def detectron2_tests(python: str, environment: dict[str, str], source: str) -> dict[str, int]:
    """Counts of Detectron2's own tests with our classes (tests/detectron2_suite.py).

    Raises:
        RuntimeError: it ended without counting.
    """
    command = [python, "tests/detectron2_suite.py", source]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    counts = re.findall(r"(\d+) (passed|failed|skipped|deselected)", done.stdout.splitlines()[-1])
    if len(counts) != 4:
        raise RuntimeError(f"{shlex.join(command)} ended without counts, status {done.returncode}")
    return {outcome: int(number) for number, outcome in counts}


def run(name: str, venv: str, source: str, arguments: list[str]) -> int:
    """Run the tests, write ``results/matrix/NAME.json``; returns pytest's exit status."""
    # Not resolved: an environment's python is a link to the one it was made with.
    python = str(Path(venv).absolute() / "bin" / "python") if venv else sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    facts = facts_of(python, environment, source)
    chosen = arguments or WHOLE_SUITE
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [python, "-m", "pytest", *chosen, f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report, exit status {status}")
        counts = counts_of(report)
    cell = {
        "name": name,
        "command": shlex.join(["python", "-m", "pytest", *chosen]),
        "whole": not arguments,
        **counts,
        "seconds": round(time.monotonic() - begun),
        **facts,
    }
    if source:
        cell["detectron2_tests"] = detectron2_tests(python, environment, source)
        status = status or int(cell["detectron2_tests"]["failed"] > 0)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(cell, indent=2) + "\n")
    print(f"{file}: {counts['passed']} passed, {counts['failed']} failed")
    return status


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["run"])
    parser.add_argument("--name", required=True, help="of the file: letters, digits, . _ -")
    parser.add_argument("--venv", default="", help="environment to test, default this Python's")
    parser.add_argument(
        "--detectron2", default="", metavar="SRC", help="a checkout: its own tests are run, too"
    )
    # Not left to argparse: how it takes "--" depends on the version of Python.
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    if not re.fullmatch(r"[\w.-]+", args.name):
        parser.error(f"--name {args.name!r}: letters, digits, '.', '_' and '-' make a name")
    if args.venv and not Path(args.venv, "bin", "python").exists():
        parser.error(f"--venv {args.venv}: no bin/python in it; make setup VENV={args.venv}")
    return run(args.name, args.venv, args.detectron2, words[at + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
