"""Sequences of commands in random order, with random keys and kills, and what must always hold.

A folder of photographs, one run folder, and commands as users and batch systems give them: train,
resume, extend, kill, predict, eval, train again into the same folder. After each command:

- no traceback, and an exit status of 0, 2 (a user's mistake) or that of the signal;
- no lost score: what results.json or metrics.json of the run had, it still has;
- no mixed folder: a training into a used folder is refused, and changes nothing in it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import photographs

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/start/faster_rcnn_fast_cpu.yaml"
TINY = [
    *("MODEL.FPN_EXT.BOTTOM_UP", "torchvision/mobilenet_v3_small"),
    *("MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.MAX_ITER", "9"),
]
EXTRA = [
    ("SOLVER.FPN_EXT.EMA_DECAY", "0.9"),
    ("TEST.EVAL_PERIOD", "3"),
    ("SEED", "7"),
    ("SOLVER.BASE_LR", "0.001"),
    ("MODEL.FPN_EXT.NUMERICS", "exact"),
    ("MODEL.FPN_EXT.LEVEL_RULE", "LongerSideRule"),
    ("SOLVER.IMS_PER_BATCH", "zwei"),  # a mistake
]
# In which every command may say something; what a killed process leaves, and the next one takes.
UNCOUNTED = ("log.txt", "events.", "run.lock")
ALLOWED = {
    0,
    2,
    -signal.SIGTERM,
    -signal.SIGKILL,
    -signal.SIGINT,
    128 + signal.SIGTERM,
    128 + signal.SIGINT,
}


def scores_of(run: Path) -> set[str]:
    """Everything that a run has been scored with."""
    found = {f.read_text() for f in run.glob("inference/*/results.json")}
    metrics = run / "metrics.json"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return found | {line for line in lines if "bbox/AP" in line}


def files_of(run: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    files = (f for f in run.rglob("*") if f.is_file() and not f.name.startswith(UNCOUNTED))
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


def command(choice: random.Random, folder: Path) -> tuple[str, list[str], float | None]:
    """A name, the words after ``fpn-ext``, and after how many seconds to kill it."""
    run, data = folder / "run", folder / "photos"
    extra = [word for pair in choice.sample(EXTRA, choice.randint(0, 2)) for word in pair]
    train = ["train", "--data", str(data), "--config-file", str(CONFIG)]
    tail = [*TINY, *extra, "OUTPUT_DIR", str(run)]
    name = choice.choice(["train", "resume", "resume", "kill", "kill", "extend", "predict", "eval"])
    if name == "train":
        return name, [*train, *tail], None
    if name == "resume":
        return name, [*train, "--resume", *tail], None
    if name == "kill":
        resume = ["--resume"] if run.exists() else []
        return name, [*train, *resume, *tail], choice.uniform(3, 25)
    if name == "extend":
        more = ["SOLVER.MAX_ITER", str(choice.choice([6, 12]))]
        more += ["MODEL.WEIGHTS", str(run / "model_final.pth")]
        into = choice.choice([str(folder / "longer"), str(run)])
        return name, [*train, "--extend", *TINY, *more, *extra, "OUTPUT_DIR", into], None
    if name == "predict":
        return (
            name,
            ["predict", "--run", str(run), str(data), "--output", str(folder / "drawn")],
            None,
        )
    return name, ["eval", "--run", str(run)], None


def run_one(words: list[str], kill_after: float | None, choice: random.Random) -> tuple[int, str]:
    """Exit status and output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fpn_ext", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(choice.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT]))
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def run_sequence(seed: int, length: int) -> tuple[int, str]:
    """Run commands one after another; how many, and what did not hold ("" if all did)."""
    choice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs.write_coco(folder / "photos")
        history: list[str] = []
        for number in range(1, length + 1):
            what, words, kill_after = command(choice, folder)
            run = folder / "run"
            scores, files = scores_of(run), files_of(run)
            status, output = run_one(words, kill_after, choice)
            history.append(f"{what} ({kill_after or 'to its end'}) -> {status}: {' '.join(words)}")
            problem = ""
            if "Traceback" in output:
                problem = "a traceback"
            elif status not in ALLOWED:
                problem = f"exit status {status}"
            elif lost := scores - scores_of(run):
                problem = f"lost scores: {lost}"
            elif status == 2 and files and files != files_of(run):
                changed = {Path(name).name for name, _ in files.items() ^ files_of(run).items()}
                problem = f"what was refused changed {changed}"
            elif what == "train" and status == 0 and "model_final.pth" in "".join(files):
                problem = "a training into a used folder was not refused"
            if problem:
                said = json.dumps(history, indent=1)
                return number, f"\nseed {seed}, command {number}: {problem}\n{said}\n{output}\n"
    return length, ""


if __name__ == "__main__":
    ran, found = run_sequence(int(sys.argv[1]), int(sys.argv[2]))
    print(found or f"{ran} commands, all as they should be")
    sys.exit(bool(found))
