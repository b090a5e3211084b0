"""The tested matrix: what a run writes, and the tables that are made of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[x]"><failure message="m">text</failure></testcase>
<testcase classname="tests.test_b" name="test_three"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_b" name="test_four"><error message="at setup"/></testcase>
<testcase classname="tests.test_b" name="test_five"><failure/></testcase>
<testcase classname="tests.test_b" name="test_five"><error/></testcase>
</testsuite></testsuites>"""


def test_counts_of_a_report(tmp_path):
    """A test that fails and whose clean-up fails, too, stands in it twice."""
    (tmp_path / "report.xml").write_text(REPORT)
    assert matrix.counts_of(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 2,
        "errors": 2,
        "skipped": 1,
        "failures": [
            "tests.test_a::test_two[x]",
            "tests.test_b::test_five",
            "tests.test_b::test_four",
        ],
    }


def run(*words, **kwargs):
    command = [sys.executable, "tests/matrix.py", *words]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.slow
def test_a_run_of_one_test_is_written_with_where_it_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    chosen = "tests/test_names.py"
    status = matrix.main(["run", "--name", "one", "--", "-q", "-p", "no:cacheprovider", chosen])
    cell = json.loads((tmp_path / "one.json").read_text())
    assert status == 0 and cell["passed"] > 0 and cell["failed"] == cell["errors"] == 0
    assert cell["whole"] is False and cell["command"].endswith(f"-p no:cacheprovider {chosen}")
    assert cell["capability"] in ("DEFAULT", "NO AVX")
    assert cell["overrides"]["ATEN_CPU_CAPABILITY"] == "default"
    assert cell["python"] == ".".join(map(str, sys.version_info[:3]))
    assert str(Path.cwd()) not in json.dumps(cell)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "a/b"], "--name 'a/b': letters"),
        (["--name", "a", "--venv", "none"], "--venv none: no bin/python in it; make setup VENV=n"),
    ],
)
def test_what_cannot_be_run_is_said_first(words, message):
    done = run("run", *words)
    assert done.returncode == 2 and message in done.stderr


# The tables.


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CELL = {
    "name": "main",
    "command": "python -m pytest -q",
    "whole": True,
    "passed": 2383,
    "failed": 1,
    "errors": 2,
    "skipped": 82,
    "failures": ["tests.test_a::test_b[x|y]"],
    "seconds": 700,
    "python": "3.11.2",
    "torch": "2.11.0+cu130",
    "torchvision": "0.26.0",
    "numpy": "2.4.1",
    "detectron2": "0.6, after the tag (main)",
    "compiled": True,
    "processor": "2 x Some CPU",
    "capability": "AVX2",
    "detectron2_commit": "02b5c4e",
    "flags": ["avx2"],
    "overrides": {"ATEN_CPU_CAPABILITY": "avx2"},
    "commit": "9f1edeb",
    "dirty": True,
    "date": "2026-06-01",
    "detectron2_tests": {"passed": 20, "failed": 0, "skipped": 3, "deselected": 6},
}
PART = CELL | {
    "name": "part",
    "python": "3.9.1",
    "whole": False,
    "command": "python -m pytest -k x",
}


def rows(table):
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_a_row_for_each_run(generate, tmp_path):
    (tmp_path / "main.json").write_text(json.dumps(CELL))
    (tmp_path / "part.json").write_text(json.dumps(PART))
    heads, line, row = rows(generate.matrix(tmp_path, short=True))
    assert dict(zip(heads, row, strict=True)) == {
        "Python": "3.11.2",
        "torch": "2.11.0",
        "Detectron2": "0.6, after the tag (main), compiled",
        "vector instructions": "AVX2",
        "passed": "2383",
        "failed": "3",
        "skipped": "82",
    }
    assert len(line) == len(heads)
    heads, _, part, whole = rows(generate.matrix(tmp_path))
    assert [part[0], whole[0]] == ["part", "main"], "by the number of Python, not its letters"
    row = dict(zip(heads, whole, strict=True))
    assert row["Detectron2"].endswith("compiled, 02b5c4e; its own tests: 20 passed, 0 failed")
    assert row["vector instructions"] == "AVX2 (`ATEN_CPU_CAPABILITY=avx2`)"
    assert row["commit"] == "9f1edeb with changes, 2026-06-01"
    assert row["remarks"] == r"`tests.test_a::test_b[x\|y]`"
    assert "`python -m pytest -k x`; " in dict(zip(heads, part, strict=True))["remarks"]


def test_nothing_is_claimed_that_was_not_run(generate, tmp_path):
    assert generate.matrix(tmp_path) == "No run of the whole suite is recorded."
    (tmp_path / "part.json").write_text(json.dumps(PART))
    assert generate.matrix(tmp_path, short=True) == "No run of the whole suite is recorded."


# make test-main, as far as no checkout and no compiler is needed.


def build(source, venv="none", *words, **env):
    return subprocess.run(
        ["sh", "tests/detectron2_source.sh", str(source), str(venv), *words],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **env},
    )


def test_a_build_says_what_is_missing(tmp_path):
    for source, message in [
        ("", "SRC is not set; run make test-main SRC="),
        (tmp_path, "no setup"),
    ]:
        done = build(source)
        assert done.returncode == 2 and message in done.stderr
    (tmp_path / "setup.py").touch()
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").touch()
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 2
    assert "No C++ compiler (no-such-compiler)" in done.stderr and "PYTHON_ONLY=1" in done.stderr
    assert build(tmp_path, "none", "--check", PYTHON_ONLY="1").returncode == 0
    assert "make setup VENV=none" in build(tmp_path, PYTHON_ONLY="1").stderr
