#!/bin/sh
# Sets up a virtual environment with everything this project needs: requirements/install.sh FOLDER
#
# - FOLDER does not exist: it is made with $PYTHON, or the first Python 3.10-3.12 found, and filled
#   with the pinned versions of tested.txt and Detectron2 v0.6 (its Python files, no compiler).
#   With LOWEST=1, the oldest versions that pyproject.toml allows instead of the pinned ones.
# - FOLDER is an environment that has its own Detectron2: that one, and all that is installed
#   beside it, stays untouched; only what is missing is added.
# Any other folder is refused.
set -eu
venv=${1:?usage: requirements/install.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$here")
uv_version=0.13.8
made_here=$venv/.made_by_fpn_ext

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

right_version() {
    "$1" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if right_version "$PYTHON"; then echo "$PYTHON"; fi
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        if right_version "$candidate"; then echo "$candidate"; return; fi
    done
}

# uv serves where pip does not: pip from version 26 refuses the Detectron2 package (an optional
# extra of it declares a direct URL), and uv needs neither ensurepip nor pip in the environment.
# Taken from PATH, else brought by the pip of the Python given, into the environment's folder.
find_uv() {
    if [ -x "$venv/.uv/bin/uv" ]; then
        echo "$venv/.uv/bin/uv"
    elif command -v uv >/dev/null; then
        echo uv
    elif "$1" -m pip --version >/dev/null 2>&1; then
        "$1" -m pip install -q --disable-pip-version-check --upgrade \
            --target "$venv/.uv" "uv==$uv_version" >&2 || return 0
        echo "$venv/.uv/bin/uv"
    fi
}

make_environment() {
    python=$(find_python)
    [ -n "$python" ] || stop "No Python 3.10, 3.11 or 3.12 found. Install one, or say where it is:" \
        "    make setup PYTHON=/path/to/python3.11"
    echo "Making $venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$made_here"
    # Debian's Python has no ensurepip unless python3-venv is installed.
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    uv=$(find_uv "$python")
    [ -n "$uv" ] && "$uv" venv -q --allow-existing --python "$python" "$venv" && return
    stop "$python can make no virtual environment: it has neither ensurepip nor pip, and there is" \
        "no uv. Install one of them (Debian, Ubuntu: apt install python3-venv) and run again."
}

has_detectron2() {
    "$venv/bin/python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("detectron2"))'
}

if [ ! -e "$venv" ] || { [ -e "$made_here" ] && [ ! -x "$venv/bin/python" ]; }; then
    make_environment
elif [ ! -x "$venv/bin/python" ]; then
    stop "$venv exists and is no virtual environment; name another folder (VENV=...)"
elif ! right_version "$venv/bin/python"; then
    stop "$venv has $("$venv/bin/python" --version); Python 3.10, 3.11 or 3.12 is needed"
elif [ ! -e "$made_here" ] && ! has_detectron2; then
    stop "$venv is an environment of yours without Detectron2. Install Detectron2 into it, or name" \
        "a folder that does not exist (VENV=...) to get a complete environment there."
fi

uv=$(find_uv "$venv/bin/python")
[ -n "$uv" ] || stop "$venv has no pip, and there is no uv: add one of them and run again"
# uv does not read pip's settings; its index is the one that matters behind a firewall.
index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$index" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
fi
install() { "$uv" pip install -q --python "$venv/bin/python" "$@"; }

if [ ! -e "$made_here" ]; then
    echo "Using the Detectron2 that $venv has"
    # Nothing installed may change: a compiled Detectron2 fits one torch only.
    installed=$(mktemp)
    trap 'rm -f "$installed"' EXIT
    "$venv/bin/python" - >"$installed" <<'END'
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
for name in sorted(found.keys() - {"fpn-ext"}):
    print(f"{name}=={found[name]}")
END
    install --constraint "$installed" -e "$project[dev]"
    exit
fi

if [ -n "${LOWEST:-}" ]; then
    install --resolution lowest-direct -e "$project[dev]"
    "$uv" pip freeze -q --python "$venv/bin/python" --exclude-editable |
        grep -v '^iopath=' >"$venv/lowest.txt"  # fvcore's newest; Detectron2 sets a bound
    # What Detectron2 needs has no bound of ours; of these, what is current.
    sed -n '/^# What Detectron2/,/^$/p' "$here/tested.in" >"$venv/detectron2-needs.in"
    install --constraint "$venv/lowest.txt" -r "$venv/detectron2-needs.in"
else
    install -r "$here/tested.txt"
fi
# The alias packages Detectron2's Python files without compiling; for this package only.
DIST_EXTRA_CONFIG="$here/detectron2-python-only.cfg" \
    install --no-deps --no-build-isolation --require-hashes -r "$here/detectron2.txt"
install --no-deps --no-build-isolation -e "$project"
