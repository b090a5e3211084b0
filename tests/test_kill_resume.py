"""A short run of tests/kill_resume.py, which is a command for longer runs."""

import re
import subprocess
import sys


def test_killed_and_resumed_ends_with_the_same_bits():
    command = [sys.executable, "tests/kill_resume.py", "--kills", "3", "--iterations", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, writing, runs, values = map(int, re.findall(r"\d+", done.stdout))
    assert kills == 3 and writing >= 1 and runs >= 1 and values > 500
