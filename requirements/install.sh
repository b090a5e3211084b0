#!/bin/sh
# Sets up a virtual environment with everything this project needs: requirements/install.sh FOLDER
#
# - FOLDER does not exist: it is made with $PYTHON, or the first Python 3.10-3.12 found, and filled
#   with the pinned versions of tested.txt and Detectron2 v0.6 (its Python files, no compiler).
# - FOLDER is an environment that has its own Detectron2: that one, and all that is installed
#   beside it, stays untouched; only what is missing is added.
set -eu
venv=${1:?usage: requirements/install.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$here")
uv_version=0.13.8

right_version() {
    "$1" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

if [ ! -x "$venv/bin/python" ]; then
    python=
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 python}; do
        if right_version "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "No Python 3.10, 3.11 or 3.12 found. Install one, or say where it is:" >&2
        echo "    make setup PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    echo "Making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        # Debian ships Python without ensurepip; uv needs neither that nor pip.
        if ! command -v uv >/dev/null || ! uv venv -q --python "$python" "$venv"; then
            rm -rf "$venv"
            echo "$python cannot make virtual environments. Install its venv package" >&2
            echo "(Debian, Ubuntu: apt install python3-venv) or uv, and run again." >&2
            exit 1
        fi
    fi
elif ! right_version "$venv/bin/python"; then
    echo "$venv has $("$venv/bin/python" --version); Python 3.10, 3.11 or 3.12 is needed" >&2
    exit 1
fi

# uv, because pip from version 26 refuses the Detectron2 package (an optional extra of it declares
# a direct URL). A mirror set for pip serves uv too.
if [ -n "${PIP_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
fi
if [ -x "$venv/bin/pip" ]; then
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "uv==$uv_version"
    uv=$venv/bin/uv
elif command -v uv >/dev/null; then
    uv=uv
else
    echo "$venv has no pip, and there is no uv: add one of them and run again" >&2
    exit 1
fi
install() { "$uv" pip install -q --python "$venv/bin/python" "$@"; }

has_own_detectron2() {
    "$venv/bin/python" - <<'END'
import importlib.metadata, importlib.util
ours = any(d.metadata["Name"] == "pb1-detectron2" for d in importlib.metadata.distributions())
raise SystemExit(ours or importlib.util.find_spec("detectron2") is None)
END
}

if has_own_detectron2; then
    echo "Using the Detectron2 that $venv has"
    installed=$(mktemp)
    trap 'rm -f "$installed"' EXIT
    "$uv" pip freeze -q --python "$venv/bin/python" --exclude-editable |
        grep -v ' @ ' >"$installed"
    # Nothing installed may change: a compiled Detectron2 fits one torch only.
    install --constraint "$installed" -e "$project[dev]"
else
    install -r "$here/tested.txt"
    # The alias packages Detectron2's Python files without compiling; for this package only.
    DIST_EXTRA_CONFIG="$here/detectron2-python-only.cfg" \
        install --no-deps --no-build-isolation --require-hashes -r "$here/detectron2.txt"
    install --no-deps --no-build-isolation -e "$project"
fi
