#!/bin/sh
# torch 2.15.0: torch.jit.save and torch.export.save to a path end the process where the disk is
# full, though the program catches every exception.
#
# Input: a linear layer, traced and exported, saved to /dev/full, which answers as a full disk does,
# within try and except, each in a process of its own; and its weights by torch.save.
# Seen: after torch.save the program goes on, with a RuntimeError that it caught. torch.jit.save and
# torch.export.save end it by SIGABRT ("terminate called after throwing an instance of
# 'c10::Error'"): what writes the archive tries to finish it when it is destroyed, and throws there.
# Nothing can be cleaned up, and work that is not saved is lost. Expected: an exception. By way of
# io.BytesIO, written to the file as bytes, it is an OSError. Reported for torch.jit in
# https://github.com/pytorch/pytorch/issues/156955.
#
# Exit status 0 while that is so, 1 once it has changed. Needs Linux, Python 3.11 to 3.14 with pip or
# uv.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
packages="torch==2.15.0 numpy==2.4.6"
if command -v uv >/dev/null; then
    uv venv -q --python "$python" "$work/venv"
    # shellcheck disable=SC2086
    uv pip install -q --python "$work/venv/bin/python" $packages
else
    "$python" -m venv "$work/venv"
    # shellcheck disable=SC2086
    "$work/venv/bin/python" -m pip install -q $packages
fi
cd "$work"
cat >save.py <<'END'
import io
import sys

import torch

layer, example = torch.nn.Linear(300, 300), torch.rand(1, 300)


def in_memory():
    archive = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, example), archive)
    with open("/dev/full", "wb") as stream:
        stream.write(archive.getbuffer())


save = {
    "torch.save": lambda: torch.save(layer.state_dict(), "/dev/full"),
    "torch.jit.save": lambda: torch.jit.save(torch.jit.trace(layer, example), "/dev/full"),
    "torch.export.save": lambda: torch.export.save(
        torch.export.export(layer, (example,)), "/dev/full"
    ),
    "io.BytesIO": in_memory,
}[sys.argv[1]]
try:
    save()
except BaseException as error:
    print("caught", type(error).__name__)
END
as_described=yes
for how in torch.save torch.jit.save torch.export.save io.BytesIO; do
    status=0
    "$work/venv/bin/python" -W ignore save.py "$how" >out 2>err || status=$?
    echo "$how: exit status $status, $(head -n 1 out)"
    case $how in
    torch.jit.save | torch.export.save) expected=134 ;;
    *) expected=0 ;;
    esac
    [ "$status" = "$expected" ] || as_described=no
done
if [ "$as_described" = no ]; then
    echo "torch 2.15.0 no longer behaves as described above"
    exit 1
fi
echo "as described: both end the process"
