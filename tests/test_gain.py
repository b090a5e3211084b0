"""The runner that measures what a pyramid adds: its runs, its configs, what it makes of results."""

import json
import sys
from pathlib import Path

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


def test_the_tables_of_the_page(tmp_path, monkeypatch):
    """AP 10 and 12 on one map, 14 and 13 with the pyramid: 2.5 more, in one of two networks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    import evidence_tables

    assert evidence_tables.gain_in_words(tmp_path).startswith("Not run yet: `python benchmarks/")
    every = {"AP50": 1.0, "APsmall": 2.0, "ARsmall": 3.0}
    for side, aps in (("one_map", (10.0, 12.0)), ("pyramid", (14.0, 13.0))):
        for seed, ap in enumerate(aps, 1):
            write(tmp_path, gain.Run("ResNet-18", side, "BCCD", seed), AP=ap, **every)
            write(tmp_path, gain.Run("GhostNet x0.5", side, "BCCD", seed), AP=11.0, **every)
    table = evidence_tables.gain_table(tmp_path, "BCCD")
    assert "| ResNet-18 | C4 | 11.0 (10.0 to 12.0) | 1.0 (1.0 to 1.0) |" in table
    assert "|  | P2 to P6 | 13.5 (13.0 to 14.0) |" in table
    assert "8 runs, commit abc1234 on 2 x CPU. Continued by `python benchmarks/gain.py" in table
    words = evidence_tables.gain_in_words(tmp_path)
    assert "higher with the pyramid for 1 of 2 networks" in words and "+0.0 to +2.5" in words
