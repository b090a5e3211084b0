"""Repeatedly kills a training (SIGKILL), resumes it with --resume, and compares the bits.

    python tests/kill_resume.py --kills 20 --workers 2 --json results/kill_resume/workers_2.json

Every second kill waits until a checkpoint is being written; the others come at random moments. What
is compared with a run that nobody killed: everything in every checkpoint.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; a multithreaded process cannot be forked
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)

import tiny  # noqa: E402
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402  # seconds, once here instead of in every process
from detectron2.engine import defaults  # noqa: E402
from fpn_ext.__main__ import main as fpn_ext_main  # noqa: E402
from fpn_ext.engine import train  # noqa: E402, F401  # before the processes are forked
from fpn_ext.reporting.json_files import write_json  # noqa: E402
from fpn_ext.reporting.provenance import commit, hardware, versions  # noqa: E402


def start(folder, options, resume):
    """``fpn-ext train`` in a forked process, without repeating the imports."""
    process = os.fork()
    if process:
        return process
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        modes = ["--resume"] if resume else []
        words = ["--config-file", tiny.FILE, *modes, *tiny.options(folder, *options)]
        status = fpn_ext_main(["train", *words])
        sys.stderr.flush()
        os._exit(status)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(process, until=lambda: False):
    """Whether the process exited before ``until()`` was true."""
    while not until():
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0005)
    return None


def half_written(folder):
    """The files being written, or left by a kill: {(name, time)}"""
    found = set()
    for file in folder.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # completed meanwhile
            found.add((file.name, file.stat().st_mtime_ns))
    return found


def kill(process, after, at):
    """Kill it once the time has passed and ``at()`` is true, unless it exits first."""
    deadline = time.monotonic() + after
    status = wait(process, lambda: time.monotonic() > deadline and at())
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return status


def checkpoints(folder):
    """{file and path within it: leaf}"""
    return {
        (file.name, path): leaf
        for file in sorted(folder.glob("*.pth"))
        for path, leaf in tiny.leaves(torch.load(file, weights_only=True)).items()
    }


def check_same_bits(folder, expected):
    found = checkpoints(folder)
    if found.keys() != expected.keys():
        raise SystemExit(f"{folder} holds other things: {found.keys() ^ expected.keys()}")
    for place, leaf in found.items():
        same = torch.equal if isinstance(leaf, torch.Tensor) else lambda a, b: a == b
        if not same(leaf, expected[place]):
            raise SystemExit(f"{folder}: {place} is not what it is without a kill")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--workers", type=int, default=0, help="DATALOADER.NUM_WORKERS")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", metavar="FILE", help="file to write the counts to")
    args = parser.parse_args()
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as name:
        counts = run(Path(name), args, moments)
    report(*counts)
    if args.json:
        names = ("kills", "while_writing", "runs_to_the_end", "values")
        found = dict(zip(names, counts, strict=True))
        asked = {"workers": args.workers, "iterations": args.iterations, "seed": args.seed}
        write_json(args.json, {**facts, **asked, **found})


def run(work, args, moments):
    tiny.register(work / "images")
    options = [
        *("SOLVER.MAX_ITER", args.iterations),
        *("DATALOADER.NUM_WORKERS", args.workers),
        *("SOLVER.FPN_EXT.DETERMINISTIC", True),
    ]
    straight, folder = work / "straight", work / "killed"
    defaults.collect_env_info = str  # runs compilers for their versions: seconds per start
    began = time.monotonic()
    if wait(start(straight, options, resume=False)):
        raise SystemExit(straight.with_suffix(".log").read_text()[-3000:])
    duration = time.monotonic() - began
    expected = checkpoints(straight)

    kills = writing = runs = 0
    while True:
        left = half_written(folder)

        def writes(left=left):
            return bool(half_written(folder) - left)

        process = start(folder, options, resume=True)
        if kills < args.kills:
            at_writing = kills % 2 == 0
            after = moments.uniform(0, duration / 2 if at_writing else duration)
            status = kill(process, after, writes if at_writing else lambda: True)
        else:
            status = wait(process)
        if status is None:
            kills += 1
            writing += writes()
            continue
        log = folder.with_suffix(".log").read_text()
        # Killed after its last checkpoint, it has nothing left to do, and says so.
        if status and "nothing is left" not in log[-2000:]:
            raise SystemExit(log[-3000:])
        check_same_bits(folder, expected)
        runs += 1
        if kills == args.kills:
            return kills, writing, runs, len(expected)
        shutil.rmtree(folder)


def report(kills, writing, runs, leaves):
    print(
        f"{kills} kills, {writing} of them while a checkpoint was being written; {runs} run(s) to "
        f"the end with --resume: all {leaves} values of their checkpoints equal to the bit those "
        "of the run without a kill"
    )


if __name__ == "__main__":
    main()
