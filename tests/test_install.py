"""requirements/install.sh: what it says, hands to uv, refuses and continues; uv is a stand-in.

What is installed in the end is tested by every other test. Here nothing is downloaded.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

BOUNDS = re.search(
    r'^requires-python = ">=(3\.\d+),<3\.(\d+)"', Path("pyproject.toml").read_text(), re.M
)
OLDEST, NEWEST = BOUNDS.group(1), f"3.{int(BOUNDS.group(2)) - 1}"
STAND_IN_UV = """#!/bin/sh
echo "$@" >>"$LOG"
env | grep '^UV_\\|^SSL_' >"$LOG.env"
case "$*" in *"${FAILS:-nothing}"*) eval "${HOW:-exit 1}";; esac
"""


@pytest.fixture
def project(tmp_path):
    """A checkout, as far as install.sh reads it."""
    folder = tmp_path / "project"
    shutil.copytree("requirements", folder / "requirements")
    shutil.copy("pyproject.toml", folder)
    return folder


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python_of(path, version=None):
    """A Python that makes environments without pip, and may be of another version."""
    alter = f"import sys; sys.version_info = {version}" if version else ""
    return program(
        path,
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then exec {sys.executable} -c "{alter}\n$2"; fi\n'
        f'if [ "$1 $2" = "-m venv" ]; then exec {sys.executable} -m venv --without-pip "$3"; fi\n'
        f'if [ "$1" = --version ]; then echo "Python of {path.name}"; exit; fi\n'
        f'exec {sys.executable} "$@"\n',
    )


@pytest.fixture
def set_up(project, tmp_path):
    """Runs install.sh with the stand-in for uv; gives its exit code, its output and uv's calls."""
    log = tmp_path / "uv.log"
    program(tmp_path / "bin" / "uv", STAND_IN_UV)
    python = python_of(tmp_path / "python")

    def run(venv="venv", **environment):
        log.write_text("")
        base = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "PYTHON": str(python),
            "LOG": str(log),
        }
        done = subprocess.run(
            ["sh", project / "requirements" / "install.sh", tmp_path / venv],
            env={**base, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        calls = [c for c in log.read_text().splitlines() if c.startswith("pip install")]
        return done.returncode, done.stdout, calls

    return run


def uv_settings(tmp_path):
    lines = Path(tmp_path, "uv.log.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def put_detectron2_into(venv):
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").touch()


# Which Python.


def test_every_page_states_the_bounds_of_pyproject():
    pages = [Path("README.md"), Path("Makefile"), *Path("docs").rglob("*.md")]
    files = [*pages, *Path("fpn_ext").rglob("*.py"), *Path("requirements").iterdir()]
    stated = {
        (str(file), *found)
        for file in files
        for found in re.findall(r"\b(3\.1\d)(?: to |-|, 3.* or )(3\.\d+)\b", file.read_text())
        if "docs/evidence" not in str(file)
    }
    assert {found[1:] for found in stated} == {(OLDEST, NEWEST)}, stated
    assert {"README.md", "docs/start/install.md"} <= {found[0] for found in stated}
    assert f'python_version = "{OLDEST}"' in Path("pyproject.toml").read_text()  # mypy's


@pytest.mark.parametrize(
    ("version", "fits"),
    [((3, 9, 18), False), ((3, 10, 0), True), ((3, 14, 2), True), ((3, 15, 0), False)],
)
def test_a_python_within_the_bounds(set_up, tmp_path, version, fits):
    python = python_of(tmp_path / "named", version)
    code, said, calls = set_up(PYTHON=str(python))
    assert (code == 0) == fits and bool(calls) == fits
    if not fits:
        assert f"{python} is no Python {OLDEST} to {NEWEST}" in said
        assert not (tmp_path / "venv").exists()


def test_the_first_python_that_fits_is_taken(set_up, tmp_path):
    for name, version in {
        "python3": (3, 9, 2),
        "python3.15": (3, 15, 0),
        "python3.13": (3, 13, 1),
        "python3.10": (3, 10, 1),
        "python3.14": (3, 15, 0),  # not what its name says
    }.items():
        python_of(tmp_path / "bin" / name, version)
    code, said, _ = set_up(PYTHON="")
    assert code == 0 and said.startswith(f"Making {tmp_path / 'venv'} with Python of python3.13\n")


def test_no_python_that_fits(set_up, tmp_path):
    for minor in range(10, 15):
        python_of(tmp_path / "bin" / f"python3.{minor}", (3, 9, 0))
    for name in ("python", "python3"):
        python_of(tmp_path / "bin" / name, (3, 9, 0))
    code, said, _ = set_up(PYTHON="")
    assert code == 1
    assert f"No Python {OLDEST} to {NEWEST} found" in said and f"/path/to/python{NEWEST}" in said


# What is installed, and what is said.


def test_a_new_environment(set_up, project, tmp_path):
    code, said, calls = set_up()
    assert code == 0
    sizes, done = said.index("3 GB"), said.index(f"Set up {tmp_path / 'venv'} in ")
    assert said.index("Making") < sizes < done and "minutes" in said[sizes:done]
    folder = project / "requirements"
    pins, detectron2, package = (call.partition("venv/bin/python ")[2] for call in calls)
    assert pins == f"--constraint {folder}/tested.txt -r {folder}/tested.in"
    assert detectron2.endswith(f"--require-hashes -r {folder}/detectron2.txt")
    assert package == f"--no-deps --no-build-isolation -e {project}"


@pytest.mark.parametrize(
    ("stated", "used"),
    [
        ({}, "true"),
        ({"UV_SYSTEM_CERTS": "false"}, "false"),
        ({"UV_NATIVE_TLS": "false"}, "false"),
    ],
)
def test_the_systems_certificates_are_trusted(set_up, tmp_path, stated, used):
    set_up(**stated)
    settings = uv_settings(tmp_path)
    assert settings["UV_SYSTEM_CERTS"] == settings["UV_NATIVE_TLS"] == used
    assert "SSL_CERT_FILE" not in settings


def test_pips_certificate_and_index_are_used(set_up, tmp_path):
    pip = {"PIP_CERT": "/company.pem", "PIP_INDEX_URL": "file:///mirror"}
    set_up(**pip)
    settings = uv_settings(tmp_path)
    assert settings["SSL_CERT_FILE"] == "/company.pem"
    assert settings["UV_DEFAULT_INDEX"] == "file:///mirror"
    set_up(**pip, SSL_CERT_FILE="/mine.pem", UV_DEFAULT_INDEX="file:///nearer")
    settings = uv_settings(tmp_path)
    assert settings["SSL_CERT_FILE"] == "/mine.pem"
    assert settings["UV_DEFAULT_INDEX"] == "file:///nearer"


def test_an_environment_with_its_own_detectron2(set_up, project, tmp_path):
    python_of(tmp_path / "python")
    subprocess.run([tmp_path / "python", "-m", "venv", tmp_path / "theirs"], check=True)
    code, said, calls = set_up("theirs")
    assert code == 1 and calls == [] and "without Detectron2" in said
    put_detectron2_into(tmp_path / "theirs")
    code, said, calls = set_up("theirs")
    assert code == 0 and "GB" not in said
    (call,) = calls
    assert re.search(rf" --constraint \S+ -e {project}\[dev\]$", call)
    assert "tested" not in call


def test_a_folder_of_something_else(set_up, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").touch()
    code, said, calls = set_up("photos")
    assert code == 1 and calls == [] and "is no virtual environment" in said


# Interrupted.


def test_killed_while_installing(set_up, tmp_path):
    code, _, calls = set_up(FAILS="tested.in", HOW="kill -9 $PPID")
    assert code == -signal.SIGKILL and len(calls) == 1
    code, said, calls = set_up()
    assert code == 0 and "Continuing an interrupted set-up" in said and "Making" not in said
    assert ["--reinstall" in call for call in calls] == [True, True, False]
    code, said, calls = set_up()
    assert code == 0 and "Continuing" not in said
    assert not any("--reinstall" in call for call in calls)


@pytest.mark.parametrize("files", [[], [".made_by_fpn_ext"]])
def test_killed_before_there_was_a_python(set_up, tmp_path, files):
    (tmp_path / "venv").mkdir()
    for file in files:
        (tmp_path / "venv" / file).touch()
    code, said, calls = set_up()
    assert code == 0 and "Making" in said and len(calls) == 3


def test_killed_while_uv_was_brought(set_up, tmp_path):
    """What is there of it does not run: the one on PATH is used."""
    program(tmp_path / "venv" / ".uv" / "bin" / "uv", "\x7fELF")
    (tmp_path / "venv" / ".made_by_fpn_ext").touch()
    code, _, calls = set_up()
    assert code == 0 and len(calls) == 3


def test_the_python_it_was_made_with_has_gone(set_up, tmp_path):
    assert set_up()[0] == 0
    python = tmp_path / "venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "no_such_python")
    code, said, calls = set_up()
    assert code == 1 and calls == []
    assert f"rm -r '{tmp_path / 'venv'}'" in said and "make setup VENV=" in said


# Detectron2's package could vanish from the index.


def test_without_the_detectron2_package(set_up, project, tmp_path):
    code, said, calls = set_up(FAILS="detectron2.txt")
    assert code == 1 and len(calls) == 2
    assert "pb1-detectron2" in said and "docs/start/install.md" in said
    (command,) = re.findall(r"^    (.*) CHECKOUT$", said, flags=re.M)
    put_detectron2_into(tmp_path / "venv")  # as the command would
    assert command.startswith("uv pip install --python ") and "--no-build-isolation" in command
    code, _, calls = set_up(FAILS="detectron2.txt")
    assert code == 0
    assert not any("detectron2.txt" in call for call in calls)


# A torch for the CPU, by uv itself from a folder of empty wheels.


@pytest.fixture(scope="module")
def uv():
    brought = Path(sys.prefix, ".uv", "bin", "uv")
    found = str(brought) if brought.is_file() else shutil.which("uv")
    return found or pytest.skip("there is no uv here")


def wheel(folder, name, version, *requirements):
    stem = f"{re.sub('[-_.]+', '_', name)}-{version}"
    metadata = [f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata]))
        file.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def pins():
    """The pins for this Python: name to version."""
    lines = Path("requirements/tested.txt").read_text().splitlines()
    asked = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in asked}


@pytest.fixture
def resolve(uv, pins, tmp_path):
    """What the lines of requirements would bring: name to version."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in pins.items():
        if name not in ("torch", "torchvision"):
            wheel(wheels, name, version)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)

    def dry_run():
        done = subprocess.run(
            [
                *(uv, "pip", "install", "--dry-run", "--offline", "--no-cache", "--no-index"),
                *("--find-links", wheels, "--python", environment / "bin" / "python"),
                *("--constraint", "requirements/tested.txt", "-r", "requirements/tested.in"),
            ],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("UV_")},
        )
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, flags=re.M))

    dry_run.wheels, dry_run.environment = wheels, environment
    return dry_run


def of_cuda(names):
    return [name for name in names if name.startswith(("nvidia-", "triton", "cuda-"))]


def test_a_cuda_torch_brings_its_libraries_at_the_pins(resolve, pins):
    if sys.platform != "linux":
        pytest.skip("CUDA's libraries are pinned for Linux")
    libraries = of_cuda(pins)
    assert len(libraries) > 15
    wheel(resolve.wheels, "torch", pins["torch"], *libraries)
    wheel(resolve.wheels, "torchvision", pins["torchvision"], f"torch>={pins['torch']}")
    brought = resolve()
    assert {name: brought[name] for name in libraries} == {name: pins[name] for name in libraries}


@pytest.mark.parametrize("already_installed", [False, True])
def test_a_cpu_torch_brings_nothing_of_cuda(resolve, pins, already_installed):
    target = resolve.wheels
    if already_installed:
        target = resolve.wheels.parent
    cpu = {name: f"{pins[name]}+cpu" for name in ("torch", "torchvision")}
    for name, version in cpu.items():
        wheel(target, name, version)
        if already_installed:
            (site,) = resolve.environment.glob("lib/python*/site-packages")
            zipfile.ZipFile(target / f"{name}-{version}-py3-none-any.whl").extractall(site)
    brought = resolve()
    assert of_cuda(brought) == [] and len(brought) > 25
    expected = {} if already_installed else cpu
    assert {name: brought[name] for name in cpu if name in brought} == expected
