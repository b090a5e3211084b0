#!/bin/sh
# Sets up a virtual environment with everything this project needs: requirements/install.sh FOLDER
#
# - FOLDER does not exist: it is made with $PYTHON, or the first Python that pyproject.toml allows,
#   and filled with tested.in at the versions of tested.txt and Detectron2 v0.6 (its Python files,
#   no compiler). With LOWEST=1, the oldest versions that pyproject.toml allows instead.
# - FOLDER was made here before: what is missing or was interrupted is installed. A Detectron2 that
#   was put there otherwise stays.
# - FOLDER is an environment that has its own Detectron2: that one, and all that is installed
#   beside it, stays untouched; only what is missing is added.
# Any other folder is refused.
set -eu
venv=${1:?usage: requirements/install.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
project=$(dirname "$here")
uv_version=0.13.8
made_here=$venv/.made_by_fpn_ext
unfinished=$venv/.unfinished

# The minor versions in `requires-python = ">=3.A,<3.B"`: A, and the last one before B.
minor='s/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$'
oldest=$(sed -n "$minor/\1/p" "$project/pyproject.toml")
newest=$(($(sed -n "$minor/\2/p" "$project/pyproject.toml") - 1))

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

right_version() {
    "$1" -c "import sys; raise SystemExit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" \
        >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if right_version "$PYTHON"; then echo "$PYTHON"; fi
        return
    fi
    candidates=python3
    version=$newest
    while [ "$version" -ge "$oldest" ]; do
        candidates="$candidates python3.$version"
        version=$((version - 1))
    done
    for candidate in $candidates python; do
        if right_version "$candidate"; then echo "$candidate"; return; fi
    done
}

# uv serves where pip does not: pip from version 26 refuses the Detectron2 package (an optional
# extra of it declares a direct URL), and uv needs neither ensurepip nor pip in the environment.
# Taken from PATH, else brought by the pip of the Python given, into the environment's folder.
find_uv() {
    if "$venv/.uv/bin/uv" --version >/dev/null 2>&1; then
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
    if [ -z "$python" ] && [ -n "${PYTHON:-}" ]; then
        stop "$PYTHON is no Python 3.$oldest to 3.$newest that runs."
    fi
    [ -n "$python" ] ||
        stop "No Python 3.$oldest to 3.$newest found. Install one, or say where it is:" \
            "    make setup PYTHON=/path/to/python3.$newest"
    echo "Making $venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$made_here"
    # Debian's Python has no ensurepip unless python3-venv is installed.
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    uv=$(find_uv "$python")
    [ -n "$uv" ] && "$uv" venv -q --allow-existing --python "$python" "$venv" && return
    advice="Install python3-venv or pip for it, or uv, and run again."
    if command -v apt-get >/dev/null; then
        advice="Install one of them (apt-get install python3-venv) and run again."
    fi
    stop "$python can make no virtual environment: it has neither ensurepip nor pip, and there is" \
        "no uv. $advice"
}

has_detectron2() {
    "$venv/bin/python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("detectron2"))'
}

detectron2_is_from_pypi() {
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("pb1-detectron2")' 2>/dev/null
}

say_what_comes() {
    echo "Setting up $venv. To download: about 3 GB, most of it CUDA's libraries for PyTorch, which"
    echo "is used on a CPU too; on the disk: 6 GB. That takes a few minutes; interrupted, it"
    echo "continues when run again. For a CPU alone, 0.4 GB: docs/start/install.md."
}

say_what_was_done() {
    "$venv/bin/python" - "$venv" "$(($(date +%s) - started))" <<'END'
import sys
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
shown = ["torch", "torchvision", "numpy", "detectron2", "pb1-detectron2"]
print(
    f"Set up {sys.argv[1]} in {sys.argv[2]} s: Python {sys.version.split()[0]},",
    ", ".join(f"{name} {found[name]}" for name in shown if name in found)
    + f"; {len(found)} packages",
)
END
}

started=$(date +%s)
if [ ! -e "$made_here" ] && [ -d "$venv" ] && [ -z "$(ls -A "$venv")" ]; then
    make_environment  # an empty folder
elif [ ! -e "$venv" ] || { [ -e "$made_here" ] && [ ! -e "$venv/bin/python" ] &&
    [ ! -L "$venv/bin/python" ]; }; then
    make_environment
elif [ -e "$made_here" ] && ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    stop "$venv/bin/python does not run: the Python it was made with has gone. Make $venv again:" \
        "    rm -r '$venv'" "    make setup VENV='$venv'"
elif [ ! -x "$venv/bin/python" ]; then
    stop "$venv exists and is no virtual environment; name another folder (VENV=...)"
elif ! right_version "$venv/bin/python"; then
    stop "$venv has $("$venv/bin/python" --version); Python 3.$oldest to 3.$newest is needed"
elif [ ! -e "$made_here" ] && ! has_detectron2; then
    stop "$venv is an environment of yours without Detectron2. Install Detectron2 into it, or name" \
        "a folder that does not exist (VENV=...) to get a complete environment there."
fi

uv=$(find_uv "$venv/bin/python")
if [ -z "$uv" ] && [ -e "$made_here" ]; then
    make_environment  # interrupted before it had pip
    uv=$(find_uv "$venv/bin/python")
fi
[ -n "$uv" ] || stop "$venv has no pip, and there is no uv: add one of them and run again"
# uv does not read pip's settings: its index and its certificate are those that matter behind a
# firewall. Nor does uv look at the system's certificates, as pip does, unless it is told to; its
# releases before 0.11 know the setting by the second name.
pip_setting() { "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
if [ -n "$index" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
fi
certificate=${PIP_CERT:-$(pip_setting cert)}
if [ -n "$certificate" ] && [ -z "${SSL_CERT_FILE:-}" ]; then
    export SSL_CERT_FILE="$certificate"
fi
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-${UV_NATIVE_TLS:-true}}"
export UV_NATIVE_TLS="$UV_SYSTEM_CERTS"
quiet=-q
if [ -t 2 ]; then quiet=; fi  # its bars of progress, for a person
install() { "$uv" pip install $quiet --python "$venv/bin/python" "$@"; }

if [ ! -e "$made_here" ]; then
    echo "Using the Detectron2 that $venv has; what is missing beside it is added"
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
    say_what_was_done
    exit
fi

say_what_comes
# What a killed uv has left may look complete: another time all is installed again, from its cache.
again=
if [ -e "$unfinished" ]; then
    echo "Continuing an interrupted set-up"
    again=--reinstall
fi
touch "$unfinished"
if [ -n "${LOWEST:-}" ]; then
    install $again --resolution lowest-direct -e "$project[dev]"
    "$uv" pip freeze -q --python "$venv/bin/python" --exclude-editable |
        grep -v '^iopath=' >"$venv/lowest.txt"  # fvcore's newest; Detectron2 sets a bound
    # What Detectron2 needs has no bound of ours; of these, what is current.
    sed -n '/^# What Detectron2/,/^$/p' "$here/tested.in" >"$venv/detectron2-needs.in"
    install --constraint "$venv/lowest.txt" -r "$venv/detectron2-needs.in"
else
    install $again --constraint "$here/tested.txt" -r "$here/tested.in"
fi
if detectron2_is_from_pypi || ! has_detectron2; then
    # The alias packages Detectron2's Python files without compiling; for this package only.
    DIST_EXTRA_CONFIG="$here/detectron2-python-only.cfg" install $again \
        --no-deps --no-build-isolation --require-hashes -r "$here/detectron2.txt" ||
        stop "" \
            "PyPI's pb1-detectron2 (Detectron2 v0.6, republished) could not be installed; the rest is." \
            "The second way is Detectron2's source, which needs a C++ compiler:" \
            "    $uv pip install --python $venv/bin/python --no-deps --no-build-isolation CHECKOUT" \
            "and run make setup again, as before (docs/start/install.md, 'Your own Detectron2')."
fi
install --no-deps --no-build-isolation -e "$project"
rm "$unfinished"
say_what_was_done
