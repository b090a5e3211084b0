"""A million inputs nobody foresaw, and sequences of commands; interruptible, counted in results/.

    make fuzz-million                                # until a million; hours
    python tests/fuzz_long.py --until 20000 --examples 500 --json FILE   # a trial

Round after round, every fuzz test of the suite gets new inputs from a seed of its own, and one
sequence of commands is run (tests/fuzz_commands.py). After each round the file says how many inputs
each test had, and which failed; started again, it first tries the seeds that failed, then goes on
with the next. The exit status is 1 if an input failed and its seed has not passed since: pytest's
output, with the input, is kept beside the file. Inputs of rounds that failed do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TESTS = ("test_fuzz.py", "test_formats_fuzz.py", "test_data_check.py")


def one_round(number: int, examples: int, log: Path) -> tuple[dict[str, int], bool]:
    """Inputs per test, and whether all went well."""
    counts = log.with_suffix(".counts.json")
    environment = {
        **os.environ,
        "FUZZ_EXAMPLES": str(examples),
        "FUZZ_COUNTS": str(counts),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "pytest", "-q", "-k", "fuzz", "-p", "no:cacheprovider"]
    words += [f"--hypothesis-seed={number}", *(f"tests/{name}" for name in TESTS)]
    with log.open("w") as output:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
    found = json.loads(counts.read_text()) if counts.is_file() else {}
    counts.unlink(missing_ok=True)
    return found, done.returncode == 0


def to_be_mended(rounds: list[dict]) -> list[int]:
    """Seeds that failed and have not passed since.

    >>> to_be_mended([{"seed": s, "passed": p} for s, p in [(1, False), (2, False), (1, True)]])
    [2]
    """
    last = {done["seed"]: done["passed"] for done in rounds}
    return [seed for seed, passed in last.items() if not passed]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--until", type=int, default=1_000_000, help="inputs in all")
    parser.add_argument("--examples", type=int, default=1000, help="of each test, in a round")
    parser.add_argument("--commands", type=int, default=8, help="commands in a round's sequence")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()

    from fpn_ext.reporting.json_files import write_json
    from fpn_ext.reporting.provenance import commit, hardware, versions
    from fuzz_commands import run_sequence

    log_folder = options.json.parent
    log_folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(options.json.read_text()) if options.json.is_file() else {"rounds": []}
    again = to_be_mended(record["rounds"])

    def counted() -> Counter[str]:
        counts: Counter[str] = Counter()
        for done in record["rounds"]:
            counts.update(done["inputs"] if done["passed"] else {})
        return counts

    while again or counted().total() < options.until:
        number = (
            again.pop(0) if again else max((r["seed"] for r in record["rounds"]), default=0) + 1
        )
        begin, log = time.time(), log_folder / f"round_{number:04}.log"
        facts = {"commit": commit(), "hardware": hardware(), "versions": versions()}
        inputs, passed = one_round(number, options.examples, log)
        ran, problem = run_sequence(number, options.commands)
        if problem:
            with log.open("a") as output:
                output.write(problem)
        good = passed and not problem
        if good:
            log.unlink()
        record["rounds"].append(
            {
                "seed": number,
                "inputs": inputs | {"commands": ran},
                "passed": good,
                "seconds": round(time.time() - begin),
                **facts,
            }
        )
        write_json(options.json, record)
        print(f"round {number}: {counted().total()} inputs", flush=True)
        if not good:
            print(f"round {number} failed: {log}", file=sys.stderr)
    counts = counted()
    for name, count in sorted(counts.items()):
        print(f"{count:9} {name}")
    failed = to_be_mended(record["rounds"])
    print(f"{counts.total()} inputs in {len(record['rounds'])} rounds; to be mended: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
