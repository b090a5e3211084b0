"""What the departures of other implementations from the paper cost, each alone, in one table.

    python benchmarks/departures.py --seeds 1 2 3
    python benchmarks/departures.py --seeds 1 --only UnsmoothedTopPyramid
    python benchmarks/departures.py --report-only

The departures are those of easy-fpn.pytorch and jwyang's fpn.pytorch (fpn_ext/variants/peers.py).
Each is row (c) of Table 3 at the small scale of fpn_ext.paper.reproduce with a name or two changed,
and compared with that row seed by seed: the seed fixes the first weights and the order of the
images. Re-running skips completed runs and resumes an interrupted one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import level_rules
from fpn_ext.data.datasets import register_datasets
from fpn_ext.paper.reproduce import CONFIGS, Reproduction, Run, train_all
from fpn_ext.reporting.json_files import write_json

PROJECT = Path(__file__).parents[1]
BASELINE = "the paper"
PYRAMID, RULE = "MODEL.BACKBONE.NAME", "MODEL.FPN_EXT.LEVEL_RULE"
PER_LEVEL = ("MODEL.PROPOSAL_GENERATOR.NAME", "PerLevelRPN")
DEPARTURES: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "UnsmoothedTopPyramid": (PYRAMID, "UnsmoothedTopPyramid"),
    "SmoothedRecursionPyramid": (PYRAMID, "SmoothedRecursionPyramid"),
    "BilinearPyramid": (PYRAMID, "BilinearPyramid"),
    "NaturalLogRule": (RULE, "NaturalLogRule"),
    "RoundedRule": (RULE, "RoundedRule"),
    "RoundedNaturalLogRule": (RULE, "RoundedNaturalLogRule"),
    "PerLevelRPN": PER_LEVEL,
    "easy-fpn": (PYRAMID, "UnsmoothedTopPyramid", *PER_LEVEL),
    "jwyang-fpn": (PYRAMID, "JwyangPyramid", RULE, "RoundedNaturalLogRule"),
}


class Departure(Run):
    """Row (c) of Table 3 with the departure ``row``."""

    @property
    def name(self) -> str:
        return f"{self.row.replace(' ', '_')}_seed{self.seed}"

    @property
    def file(self) -> Path:
        return CONFIGS / "table3" / "c.yaml"

    @property
    def opts(self) -> Sequence[str]:
        return DEPARTURES[self.row]

    @property
    def identity(self) -> dict[str, Any]:
        return {"rule": self.row, "seed": self.seed, "opts": list(self.opts)}


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """departures.md."""
    scores, differences = level_rules.tables(runs, DEPARTURES, BASELINE)
    kinds = {
        what: ", ".join(sorted({str(run[what]) for run in runs}))
        for what in ("iterations", "commit", "hardware", "versions")
    }
    return f"""# Departures from the paper in other implementations

    {command}

Row (c) of Table 3 at the small scale (`fpn_ext.paper.reproduce`), {kinds["iterations"]} iterations,
trained with each of them; on {kinds["hardware"]}; {kinds["versions"]}; commit {kinds["commit"]}.
What they are is said in docs/guides/variants.md.

Box AP in percent, mean ± standard deviation over the seeds:

{scores}

Differences from that row as the paper has it, seed by seed, mean ± standard error:

{differences}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--only", nargs="+", default=list(DEPARTURES), choices=list(DEPARTURES))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--work", type=Path, default=PROJECT / "output/reproduce/small")
    parser.add_argument("--output", type=Path, default=PROJECT / "results/departures")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides, for trials")
    args = parser.parse_args(argv)
    reproduction = Reproduction(
        "small", args.work.absolute(), args.output.absolute(), opts=args.opts
    )
    failed: list[str] = []
    if not args.report_only:
        names = [BASELINE, *(name for name in args.only if name != BASELINE)]
        wanted = [Departure(3, name, seed) for seed in args.seeds for name in names]
        register_datasets()
        reproduction.prepare(wanted[0])
        failed = train_all(reproduction, wanted, args.jobs)
    files = sorted((args.output / "runs").glob("*.json"))
    runs = [json.loads(file.read_text()) for file in files]
    if not runs:
        raise SystemExit(f"no results in {args.output / 'runs'}: run without --report-only first")
    seeds = " ".join(sorted({str(run["seed"]) for run in runs}))
    command = f"python benchmarks/departures.py --seeds {seeds}"
    (args.output / "departures.md").write_text(markdown(runs, command))
    rows = level_rules.summary(runs, DEPARTURES, BASELINE)
    write_json(args.output / "departures.json", {"command": command, "rows": rows, "runs": runs})
    print(args.output / "departures.md")
    if failed:
        print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
