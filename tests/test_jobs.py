"""Commands that another one starts: they do not outlive it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from fpn_ext.engine import jobs
from fpn_ext.parent import STARTED_BY, end_with_the_parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_ends_with_the_one_that_started_it(number):
    ready, tell = os.pipe()
    parent = os.fork()
    if not parent:
        started = str(os.getpid())
        if not os.fork():
            end_with_the_parent({STARTED_BY: started})
            os.write(tell, str(os.getpid()).encode())
        time.sleep(30)
        os._exit(0)
    command = int(os.read(ready, 100))
    os.kill(parent, number)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{command}") and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{command}/status").read_text():  # nobody has asked for it
            return
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{command}")


def test_one_whose_starter_is_gone_does_not_begin():
    with pytest.raises(SystemExit) as info:
        end_with_the_parent({STARTED_BY: "1"})
    assert info.value.code == 128 + signal.SIGTERM


def test_one_that_was_started_by_hand_is_left_alone():
    environment = {"HOME": "/"}
    end_with_the_parent(environment)
    assert environment == {"HOME": "/"}


def test_a_command_is_told_who_started_it_and_its_own_are_not(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "${STARTED_BY}: $*"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    jobs.run(["train", "--resume"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"{os.getpid()}: -m fpn_ext train --resume\n"


def test_what_it_starts_itself_is_not_told():
    process = os.fork()
    if not process:
        end_with_the_parent(environment := {STARTED_BY: str(os.getppid())})
        os._exit(len(environment))
    assert os.waitpid(process, 0)[1] == 0
