"""Training beside another busy process: how OpenMP's threads wait decides what is left of it.

    python benchmarks/busy_machine.py [--rounds 3] [--threads 2] [--json results.json]

A step of the demo's training, with OpenMP as it comes and with what the commands set
(``fpn_ext.__main__``), each on a machine that is idle otherwise and beside as many endless loops as
``--busy`` says. OpenMP reads its settings once, when torch is loaded, so each measurement is a
process of its own; the four take turns within every round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from fpn_ext.__main__ import WAITING, yield_the_core_while_waiting

DEMO = "configs/demo/faster_rcnn_R_18_FPN.yaml"
LOOP = "while True: pass"
SIDES = ("as OpenMP comes", "as the commands set it")


def time_steps(steps: int, threads: int) -> None:
    """Print the seconds of each training step of the demo, after two that are not counted."""
    import torch
    from fpn_ext import prepare  # before detectron2, where that is not compiled
    from detectron2.utils.events import EventStorage
    from fpn_ext.engine.trainer import Trainer

    torch.set_num_threads(threads)
    trainer = Trainer(prepare(DEMO, ["OUTPUT_DIR", "output/busy_machine"], training=True).cfg)
    with EventStorage() as trainer.storage:
        for iteration in range(steps + 2):
            trainer.iter = iteration
            start = time.perf_counter()
            trainer.run_step()
            if iteration > 1:
                print("seconds", time.perf_counter() - start)


def step_seconds(side: str, busy: int, options: argparse.Namespace) -> float:
    """Median seconds of a training step, in a process of its own."""
    environment = {name: text for name, text in os.environ.items() if name not in WAITING}
    if side != SIDES[0]:
        yield_the_core_while_waiting(environment)
    words = [sys.executable, __file__, "--worker", "--steps", str(options.steps)]
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(busy)]
    try:
        done = subprocess.run(
            [*words, "--threads", str(options.threads)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for loop in loops:
            loop.kill()
    lines = [line.split() for line in done.stdout.splitlines()]
    return statistics.median(float(line[1]) for line in lines if line[:1] == ["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--busy", type=int, default=1, help="endless loops beside the training")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        time_steps(options.steps, options.threads)
        return
    cells = [(side, busy) for side in SIDES for busy in (0, options.busy)]
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for _ in range(options.rounds):
        for cell in cells:
            seconds[cell].append(step_seconds(*cell, options))
    report(seconds, options)


def report(seconds: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    # These load torch, which must not happen where the environment is prepared for others.
    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.measuring import markdown_table
    from fpn_ext.reporting.provenance import command_line, commit, hardware, versions

    sides = []
    for name in SIDES:
        idle, busy = seconds[name, 0], seconds[name, options.busy]
        times = [b / i for b, i in zip(busy, idle, strict=True)]
        sides.append(
            {
                "side": name,
                "idle_s": statistics.median(idle),
                "busy_s": statistics.median(busy),
                "busy_over_idle": statistics.median(times),
                "busy_over_idle_range": [min(times), max(times)],
            }
        )
    rows = [
        [
            side["side"],
            f"{side['idle_s']:.3f}",
            f"{side['busy_s']:.3f}",
            "{:.2f} ({:.2f} to {:.2f})".format(
                side["busy_over_idle"], *side["busy_over_idle_range"]
            ),
        ]
        for side in sides
    ]
    header = ["OpenMP's threads wait", "idle, s a step", "busy, s a step", "busy / idle"]
    print(markdown_table(header, rows))
    if options.json:
        facts = {
            "command": command_line(),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "threads": options.threads,
            "busy_processes": options.busy,
            "rounds": options.rounds,
        }
        write_json(options.json, {**facts, "sides": sides})


if __name__ == "__main__":
    main()
