"""Tables of the documents from files of results: what they say, also without one."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import Conv2d
from fpn_ext.paper import tables
from fpn_ext.paper.published import METRICS
from fpn_ext.speed.layers import CONVOLUTIONS, Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import agreement
import evidence_tables
import layers
import measured_tables
import paper_tables
import seeds
import walkthrough

RESULTS = Path(__file__).parents[1] / "results"


def test_without_a_file_the_command_that_writes_it(tmp_path):
    file = tmp_path / "results/speed-cpu/avx512/roi_pooling.json"
    said = measured_tables.or_not_run(file, str, measured_tables.ROI_POOLING)
    assert said == (
        "Not run yet: `python benchmarks/roi_pooling.py --rounds 11 --json "
        "results/speed-cpu/avx512/roi_pooling.json`."
    )
    file.parent.mkdir(parents=True)
    file.write_text('{"rows": 3}')
    assert measured_tables.or_not_run(file, str, "") == "{'rows': 3}"
    assert measured_tables.kills(tmp_path).startswith("Not run yet: `python tests/kill_resume.py")


def test_roi_pooling():
    row = {"case": "forward, NCHW maps", "largest_error": 7.2e-7}
    record = {
        "about": {
            **{"boxes": 1000, "size": [800, 1333], "channels": 256, "bins": 7, "rounds": 11},
            **{"hardware": "2 x CPU", "threads": 2, "torch": "2.15.0", "commit": "abc1234"},
        },
        "rows": [
            {**row, "side": "Detectron2", "ms": 474.0, "ratio": 1.0, "ratio_range": [1.0, 1.0]},
            {**row, "side": "weighted_rows", "ms": 120.4, "ratio": 4.0, "ratio_range": [3.0, 6.0]},
        ],
    }
    text = measured_tables.roi_pooling(record)
    assert text.startswith("1000 boxes on P2 to P5 of 800x1333, 256 channels, 7x7; 2 x CPU, 2 thr")
    assert "| forward, NCHW maps | weighted_rows | 120 | 4.00 (3.00 to 6.00) | 7.2e-07 |" in text


def test_the_memory_of_a_long_run():
    record = {
        "about": {"hardware": "2 x CPU", "versions": {"torch": "2.15"}, "commit": "abc1234"}
        | {"recorded_every": 20},
        "training": {"growth_mb": 1.5, "resident_mb": [500, 620, 610]},
        "prediction": {"growth_mb": -2.0, "resident_mb": [600, 590]},
    }
    text = measured_tables.long_run(record)
    assert text.startswith("2 x CPU, torch 2.15, commit abc1234 ([plot](")
    assert "| training | 60 iterations | 500 | 620 | +1.5 |" in text
    assert "| prediction | 40 images | 600 | 600 | -2.0 |" in text


def test_fuzzing_counts_the_rounds_that_passed():
    found = {"inputs": {"test_boxes": 600, "commands": 8}, "passed": True, "commit": "abc1234"}
    rounds = [{**found, "seed": 1}, {**found, "seed": 2, "passed": False, "commit": "0123456"}]
    text = measured_tables.fuzzing({"rounds": rounds})
    assert text.startswith(
        "608 inputs in 1 rounds without a failure; seed 2 found a fault in 0123456"
    )
    assert ", and fails; commit abc1234:" in text
    text = measured_tables.fuzzing({"rounds": [*rounds, {**found, "seed": 2}]})
    assert text.startswith("1,216 inputs in 2 rounds without a failure; seed 2 found a fault in")
    assert "in 0123456, and passed in abc1234; commit abc1234:" in text
    assert "| `test_boxes` | 1,200 |" in text and "Continued by `make fuzz-million`." in text


def test_scores_by_class():
    def run(seed, ap):
        box = {"AP": ap, "AP50": 90.0, "AP-cell": ap + 1, "AP50-cell": 91.0}
        return {"seed": seed, "cpu_seconds": 600.0, "results": {"val": {"bbox": box}}}

    record = {"runs": [run(1, 50.0), run(2, 52.0)], "hardware": "2 x CPU", "commit": "abc1234"}
    text = measured_tables.classes(record)
    assert text.startswith("Seeds 1, 2, mean (least to largest); 10 minutes of CPU time each")
    assert "| AP | 51.0 (50.0 to 52.0) | 52.0 (51.0 to 53.0) |" in text


def test_layers_are_counted_by_what_they_compute():
    """A 1x1 convolution of 8 to 4 channels on 5x6 pixels; a view of features computes nothing."""
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1), Rows())
    found = defaultdict(lambda: [0.0, 0.0, 0])
    with layers.timed(model, found):
        model(torch.rand(1, 8, 5, 6))
    ((_, gflop, calls),) = found.values()
    assert list(found) == ["1x1"] and calls == 1
    assert gflop == pytest.approx(2e-9 * 8 * 4 * 5 * 6)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("way", CONVOLUTIONS)
def test_layers_are_counted_alike_in_whatever_way_they_are_computed(way, side):
    convolution = Conv2d(32, 32, side, padding=side // 2).requires_grad_(False)
    if not CONVOLUTIONS[way].serves(convolution):
        pytest.skip("not a way of this layer, here")
    model = torch.nn.Sequential(CONVOLUTIONS[way].make(convolution))
    found = defaultdict(lambda: [0.0, 0.0, 0])
    with layers.timed(model, found), torch.no_grad():
        model(torch.rand(1, 32, 5, 6))
    ((kind, (_, gflop, calls)),) = found.items()
    assert kind.startswith(f"{side}x{side}") and calls == 1
    assert gflop == pytest.approx(2e-9 * 32 * 32 * 5 * 6 * side**2)


def test_deeppcb_by_class():
    runs = [{"AP50": 90.0, "AP50-short": short, "AP50-open": 97.0} for short in (70.0, 80.0)]
    assert evidence_tables.by_class(runs) == "open 97.0, short 75.0"


def test_differences_are_counted_by_their_verdict():
    counts = paper_tables.verdicts(RESULTS / "paper-small")
    text = "".join(
        (RESULTS / f"paper-small/table{table}.md").read_text().partition("seed by seed:")[2]
        for table in (1, 2, 3)
    )
    cells = [cell.strip() for cell in text.split("|")]
    for verdict, count in counts.items():
        assert count == sum(cell.endswith(f" {verdict}") for cell in cells) > 0


def test_what_has_run_names_the_command_that_continues_it(tmp_path):
    (tmp_path / "figure1/runs").mkdir(parents=True)
    run = {"commit": "abc1234", "hardware": "2 x CPU"}
    (tmp_path / "figure1/runs/b.json").write_text(json.dumps(run))
    lines = evidence_tables.generated_images(tmp_path).splitlines()
    assert (
        "| [Figure 1](../paper/reproducing.md) | 1 runs, commit abc1234 on 2 x CPU. "
        "| `python benchmarks/figure1.py --seeds 1 2 3` |" in lines
    )
    assert all("No run." in line for line in lines[2:] if "Figure 1" not in line)


def test_a_table_that_a_benchmark_wrote_goes_without_its_title_and_command(tmp_path):
    (tmp_path / "figure1").mkdir()
    assert evidence_tables.benchmark_table(tmp_path, "figure1") == (
        "Not run yet: `python benchmarks/figure1.py --seeds 1 2 3`."
    )
    text = "# Figure 1\n\n    python benchmarks/figure1.py\n\nSeed 1.\n\n| AP |\n| --- |\n"
    (tmp_path / "figure1/figure1.md").write_text(text)
    assert evidence_tables.benchmark_table(tmp_path, "figure1") == "Seed 1.\n\n| AP |\n| --- |"


def test_the_table_of_segmentation_proposals(tmp_path):
    assert paper_tables.mask_proposals(tmp_path).startswith("Not run yet: `fpn-ext reproduce ")
    ours = {"n": 2, "mean": 20.0, "sd": 1.0}
    score = {"ours": ours, "paper": 43.4}
    row = {"what": "windows of 5x5", "against": None, "seeds": [2, 1]}
    row["metrics"] = dict.fromkeys(METRICS[6], score)
    origin = {"cpu_minutes": 7, "hardware": ["2 x CPU"], "commit": ["abc1234"]}
    summary = {"table": 6, "rows": {"5x5": row}, "origin": origin}
    (tmp_path / "table6.json").write_text(json.dumps(summary))
    text = paper_tables.mask_proposals(tmp_path)
    assert text.startswith("Seeds 1, 2: 7 minutes of CPU time on 2 x CPU, commit abc1234; mean")
    assert "| (5x5) | windows of 5x5 | 20.0 ± 1.0 (43.4) |" in text


def summary_of(folder, **aps):
    """Table 2 of `fpn-ext reproduce`, of two seeds: (AP of a row), and one more with the second."""
    metrics = ("AP50", "AP", "APs", "APm", "APl")
    found = [
        {"table": 2, "row": row, "seed": seed, "scores": dict.fromkeys(metrics, ap + seed)}
        for row, ap in aps.items()
        for seed in (1, 2)
    ]
    origin = {"command": "fpn-ext x", "hardware": ["2 x CPU"], "commit": [f"of_{folder.name}"]}
    folder.mkdir()
    summary = {**tables.summarize(2, found), "origin": origin}
    (folder / "table2.json").write_text(json.dumps(summary))


def test_rows_under_other_settings(tmp_path):
    said = paper_tables.changed(tmp_path / "longer", 2, "fpn-ext reproduce --table 2")
    assert said == "Not run yet: `fpn-ext reproduce --table 2`."
    summary_of(tmp_path / "longer", c=17.0, f=18.0)
    text = paper_tables.changed(tmp_path / "longer", 2, "fpn-ext reproduce --table 2")
    assert text.startswith("Seeds 1, 2, commit of_longer on 2 x CPU, `fpn-ext x`:\n\n| row |")
    assert "| (f) - (c) | P2 alone | +1.0 ± 0.0 (-0.6) reversed |" in text


def test_levels_that_boxes_are_pooled_from(tmp_path):
    """(c) two levels coarser and as it is, and (f); a level finer has not been run."""
    assert paper_tables.resolutions(tmp_path).count("Not run yet: `fpn-ext reproduce") == 4
    summary_of(tmp_path / "coarser", c=7.0, f=18.0)
    summary_of(tmp_path / "unsmoothed", c=15.0)
    text = paper_tables.resolutions(tmp_path)
    values = [line.split(" | ")[3] for line in text.splitlines() if line.startswith("| ")][2:]
    assert values == ["8.5 ± 0.7", "16.5 ± 0.7", "19.5 ± 0.7"]
    assert "Commit of_coarser, of_unsmoothed on 2 x CPU: `fpn-ext reproduce MODEL." in text
    assert text.endswith("--rows c --work output/reproduce/finer --output results/finer`.")


def test_what_is_recognised_without_surroundings(tmp_path):
    assert paper_tables.context(tmp_path).startswith("Not run yet: `python benchmarks/context.py")
    for seed, share in ((1, 40.0), (2, 50.0)):
        rows = [{"size": "small", "objects": 9, "recognised": {"0": share, "all": 60.0}}]
        record = {"rows": rows, "commit": "abc1234", "hardware": "2 x CPU"}
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(record))
    text = paper_tables.context(tmp_path)
    assert "| objects | of them | 0 px | the whole image |" in text
    assert "| small | 9 | 45.0 (40.0 to 50.0) | 60.0 (60.0 to 60.0) |" in text
    assert "of 2 trainings; commit abc1234 on 2 x CPU." in text


def test_selective_search_beside_an_rpn(tmp_path):
    box = {"AP": 40.0, "AP50": 70.0, "AP75": 10.0}  # VOC's scores, without those by size
    boxes = [{**box, "AP": 40.0 + seed} for seed in (1, 2)]
    runs = [{"seed": n, "results": {"bccd_test": {"bbox": b}}} for n, b in enumerate(boxes, 1)]
    record = {"runs": runs, "commit": "abc1234", "hardware": "2 x CPU"}
    (tmp_path / "rpn.json").write_text(json.dumps(record))
    text = walkthrough.selective_search(tmp_path)
    assert "| Faster R-CNN, seeds 1, 2 | 41.0, 42.0 | 70.0, 70.0 | 10.0, 10.0 |" in text
    assert "Not run yet: `python benchmarks/seeds.py --config-file configs/gain/selective" in text
    assert walkthrough.unsmoothed(tmp_path / "table1.json", ("AP",)).startswith("Not run yet: ")


def test_seeds_are_added_to_what_is_on_record(tmp_path, monkeypatch):
    trained = []

    def train(options, seed, folder):
        trained.append(seed)
        box = {"AP": 50.0 + seed, "AP50": 90.0}
        return {"seed": seed, "seconds": 1.0, "cpu_seconds": 1.0, "results": {"v": {"bbox": box}}}

    monkeypatch.setattr(seeds, "train", train)
    file = tmp_path / "seeds.json"
    words = ["--config-file", "a.yaml", "--json", str(file), "--seeds"]
    seeds.main([*words, "1"])
    seeds.main([*words, "1", "2"])
    assert trained == [1, 2]
    assert [run["seed"] for run in json.loads(file.read_text())["runs"]] == [1, 2]
    with pytest.raises(SystemExit):
        seeds.main(["--config-file", "b.yaml", "--json", str(file)])
    assert trained == [1, 2]


def test_agreement_scores_every_side(tmp_path, monkeypatch):
    """The commands alone: what `fpn-ext eval` does has tests of its own."""
    ran = []

    def run(words, **options):
        ran.append(words)
        folder = Path(words[words.index("OUTPUT_DIR") + 1], "inference/val")
        folder.mkdir(parents=True)
        scores = {"bbox": {"AP": 50.0, "AP50": 80.0, "AP75": 51.0, "APs": None}}
        (folder / "results.json").write_text(json.dumps(scores))

    monkeypatch.setattr(agreement, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    file = tmp_path / "agreement.json"
    agreement.main(["--config-file", "a.yaml", "--weights", "w.pth", "--json", str(file)])
    record = json.loads(file.read_text())
    assert [row["side"] for row in record["rows"]] == list(agreement.SIDES)
    assert ["StandardROIHeads" in words for words in ran] == [True, False, False, False]
    assert "| Detectron2 | 50.000 | 80.000 | 51.000 |" in measured_tables.agreement(record)
