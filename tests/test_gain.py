"""The runner that measures what a pyramid adds: its runs, its configs, what it makes of results."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fpn_ext
import pytest
from detectron2.modeling import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gain


def write(folder, run, **scores):
    file = folder / "runs" / f"{run.name}.json"
    file.parent.mkdir(exist_ok=True)
    facts = {"commit": "abc1234", "hardware": "2 x CPU"}
    file.write_text(json.dumps({**run._asdict(), "scores": scores, **facts}))


def test_every_run_has_a_file_of_its_own():
    runs = [
        gain.Run(network, side, data, seed)
        for network in gain.NETWORKS
        for side in gain.SIDES
        for data in gain.DATA
        for seed in (1, 2)
    ]
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and not set(name) & set(" ,/") for name in names)


def test_a_seed_counts_where_both_sides_are_done(tmp_path):
    for side, seed, ap in (("one_map", 1, 10), ("pyramid", 1, 12), ("one_map", 2, 11)):
        write(tmp_path, gain.Run("ResNet-18", side, "BCCD", seed), AP=ap)
    write(tmp_path, gain.Run("ResNet-18", "pyramid", "DeepPCB", 1), AP=1)
    (row,) = gain.summary(tmp_path)
    assert (row["data"], row["network"], row["seeds"]) == ("BCCD", "ResNet-18", [1])
    assert row["scores"] == {"one_map": [{"AP": 10}], "pyramid": [{"AP": 12}]}
    gain.draw([row], tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_with_other_options_is_not_taken_for_this_one(tmp_path, monkeypatch):
    def train(words, log, threads):
        folder = Path(words[-1])
        (folder / "inference/BCCD_val").mkdir(parents=True, exist_ok=True)
        (folder / "inference/BCCD_val/results.json").write_text('{"bbox": {"AP": 1.0}}')
        (folder / "last_checkpoint").touch()
        return 3.0

    monkeypatch.setattr("fpn_ext.engine.jobs.run", train)
    run, folder = gain.Run("ResNet-18", "pyramid", "BCCD", 1), tmp_path / "work"
    options = SimpleNamespace(work=folder, results=tmp_path, data=tmp_path, opts=[], jobs=1)
    for seconds in (3, 6):  # as it was begun, it goes on
        assert gain.train(run, options)["cpu_seconds"] == seconds
    options.opts = ["SOLVER.AMP.ENABLED", "True"]
    with pytest.raises(ValueError, match="bccd_resnet-18_pyramid_seed1 with another config"):
        gain.train(run, options)


@pytest.mark.parametrize("network", ["ResNet-18", "ResNet-50, a quarter as wide"])
def test_the_two_sides(network):
    models = {}
    for side in gain.SIDES:
        words = [*gain.NETWORKS[network], "MODEL.DEVICE", "cpu"]
        cfg = fpn_ext.prepare(f"configs/gain/{side}.yaml", words, training=False).cfg
        models[side] = build_model(cfg)
    one_map, pyramid = models["one_map"], models["pyramid"]
    assert list(one_map.backbone.output_shape()) == ["p4"]
    assert list(pyramid.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    per_cell = {s: m.proposal_generator.anchor_generator.num_anchors for s, m in models.items()}
    assert per_cell == {"one_map": [15], "pyramid": [3] * 5}
    heads = [m.roi_heads.state_dict() for m in (one_map, pyramid)]
    assert {k: v.shape for k, v in heads[0].items()} == {k: v.shape for k, v in heads[1].items()}


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    import evidence_tables

    return evidence_tables


def test_the_tables_of_the_page(tmp_path, pages):
    every = {
        "AP50": 1.0,
        "AP75": 0.5,
        "APsmall": 2.0,
        "APmedium": None,
        "APlarge": 4.0,
        "ARsmall": 3.0,
    }
    for side, aps in (("one_map", (10.0, 12.0)), ("pyramid", (14.0, 13.0))):
        for seed, ap in enumerate(aps, 1):
            write(tmp_path, gain.Run("ResNet-18", side, "BCCD", seed), AP=ap, **every)
    table = pages.gain_table(tmp_path, "BCCD")
    assert "| network | map | AP | AP50 | AP75 | APs | APm | APl | ARs | parameters, M |" in table
    assert "| ResNet-18 | C4 | 11.0 (10.0 to 12.0) | 1.0 (1.0 to 1.0) |" in table
    assert "|  | P2 to P6 | 13.5 (13.0 to 14.0) |" in table
    assert "4 runs, commit abc1234 on 2 x CPU. Continued by `python benchmarks/gain.py" in table
    assert table.endswith("Not run yet: `python benchmarks/gain.py --cost`.")


def test_the_cost_beside_the_gain(tmp_path, pages):
    scores = dict.fromkeys(("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "ARsmall"), 1.0)
    rows = []
    for side, million, memory in (("one_map", 3, 20.4), ("pyramid", 12, None)):
        write(tmp_path, gain.Run("ResNet-18", side, "BCCD", 1), **scores)
        cost = {"parameters": million * 10**6, "ms": 57.2, "above_model_mib": memory}
        rows.append({"network": "ResNet-18", "side": side, **cost})
    facts = {"size": "256x256", "rounds": 10, "commit": "of_cost", "hardware": "2 x CPU"}
    (tmp_path / "cost.json").write_text(json.dumps({**facts, "rows": rows}))
    table = pages.gain_table(tmp_path, "BCCD")
    assert "| 3.0 | 57 | 20 |" in table and "| 12.0 | 57 |  |" in table
    assert "the median of 10 rounds, and memory above the loaded model: commit of_cost" in table


def test_the_gain_in_words(tmp_path, pages):
    """AP 11 to 13.5, 20 to 19 and 30 to 34: +2.5, -1 and +4. APl 10 to 9 everywhere."""
    assert pages.gain_in_words(tmp_path).startswith("Not run yet: `python benchmarks/")
    found = {"ResNet-18": (11.0, 13.5), "GhostNet x0.5": (20.0, 19.0), "RegNetX-400MF": (30, 34)}
    for network, aps in {**found, "ConvNeXt-Atto": (0.7, 0.9)}.items():
        for side, ap, large in zip(gain.SIDES, aps, (10.0, 9.0), strict=True):
            scores = {
                "AP": ap,
                "AP50": 2 * ap + (side == "pyramid") * 3,
                "AP75": ap,
                "APsmall": 2 * ap,
                "APmedium": ap,
                "APlarge": large,
            }
            write(tmp_path, gain.Run(network, side, "BCCD", 1), **scores)
    words = pages.gain_in_words(tmp_path)
    assert words.startswith("BCCD, one seed a network: with the pyramid, of 3 networks AP is")
    assert "AP is higher for 2 (-1.0 to +4.0, +2.5 in the median), AP50 is higher for 3" in words
    assert "in the median, APs +5.0, APm +2.5, APl -1.0." in words
    assert "AP is not higher for GhostNet x0.5 (-1.0)." in words
    assert "an AP below 1 either way: ConvNeXt-Atto." in words
    assert "Not measured yet: " in words and "ShuffleNetV2 x0.5" in words


def test_where_nothing_is_learned_there_is_no_gain(tmp_path, pages):
    for side in gain.SIDES:
        write(tmp_path, gain.Run("ConvNeXt-Atto", side, "BCCD", 1), AP=0.5)
    assert "no network learns anything" in pages.gain_in_words(tmp_path)
