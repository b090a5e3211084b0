#!/bin/sh
# Builds a Detectron2 checkout into an environment in place of what is there:
# tests/detectron2_source.sh SRC VENV [--check]
#
# It is compiled against the PyTorch of VENV, some 6 minutes on two cores; with PYTHON_ONLY=1 its
# Python files alone are installed. Nothing else in VENV changes. With --check, it is
# said what is missing, and nothing is built.
set -eu
src=${1:-} venv=${2:?usage: tests/detectron2_source.sh SRC VENV}
requirements=$(cd "$(dirname "$0")/../requirements" && pwd)

stop() {
    printf '%s\n' "$@" >&2
    exit 2
}

usage="make test-main SRC=/path/to/detectron2 (a git checkout of Detectron2)"
[ -n "$src" ] || stop "SRC is not set; run $usage"
[ -f "$src/setup.py" ] && [ -f "$src/detectron2/__init__.py" ] ||
    stop "SRC=$src: no setup.py and detectron2/__init__.py in it; run $usage"
if [ -z "${PYTHON_ONLY:-}" ] && ! command -v "${CXX:-c++}" >/dev/null; then
    stop "No C++ compiler (${CXX:-c++}) to build Detectron2's operators with: apt install g++, or" \
        "PYTHON_ONLY=1 make test-main ... for its Python files alone"
fi
[ "${3:-}" != --check ] || exit 0
[ -x "$venv/bin/python" ] || stop "$venv is no virtual environment: make setup VENV=$venv"

if [ -x "$venv/.uv/bin/uv" ]; then
    pip="$venv/.uv/bin/uv pip" for_venv="--python $venv/bin/python" yes=
elif command -v uv >/dev/null; then
    pip="uv pip" for_venv="--python $venv/bin/python" yes=
else
    pip="$venv/bin/python -m pip" for_venv= yes=-y
fi
# Two distributions with the same files: removing one later would take the other's.
# shellcheck disable=SC2086  # words
$pip uninstall $yes $for_venv pb1-detectron2 detectron2 || true
if [ -n "${PYTHON_ONLY:-}" ]; then
    export DIST_EXTRA_CONFIG="$requirements/detectron2-python-only.cfg"
fi
# shellcheck disable=SC2086  # words
$pip install $for_venv --no-build-isolation --no-deps "$src"
