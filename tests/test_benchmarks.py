"""The whole-model benchmark on a tiny model: it runs, and the models agree."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import deployment
import networks
import whole_model
from calibrated import calibrated_weights
from fpn_ext.reporting import measuring
from fpn_ext.reporting.measuring import ratio_text
from sides import LeftOut, builtin_config

SMALL = [
    *("MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"),
]
ARGUMENTS = [
    *("--rounds", "1", "--sizes", "96x128", "--train-size", "96x128"),
    *("--calibrated-at", "192x256", "--batch", "1"),
]
FLOAT32 = 2e-4  # of the largest value there is


def is_positive(number):
    return math.isfinite(number) and number > 0


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output of all parts; memory measured in this process, which saves four imports."""
    folder = tmp_path_factory.mktemp("whole_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_model, "in_a_fresh_process", whole_model.memory_of_one)
        whole_model.main([*ARGUMENTS, "--output", str(folder), *SMALL])
    return folder


@pytest.fixture(scope="module")
def results(output):
    return json.loads((output / "whole_model.json").read_text())


def sides(rows):
    return {row["side"] for row in rows}


@pytest.mark.slow
def test_every_part_has_times(results):
    assert {"Detectron2", "this project"} <= sides(results["inference"])
    for part in ("inference", "stages", "training"):
        assert results[part]
        for row in results[part]:
            assert is_positive(row["ms"]) and is_positive(row["ratio"]), row
    assert {row["stage"] for row in results["stages"]} == set(whole_model.STAGES)


@pytest.mark.slow
def test_torchvision_is_left_out_where_its_network_is_another(results):
    assert "torchvision" in results["left_out"]
    assert "torchvision" not in sides(results["inference"])


@pytest.mark.slow
def test_stages_agree_with_detectron2(results):
    compared = [row for row in results["stages"] if row.get("difference") is not None]
    assert {row["stage"] for row in compared} == set(whole_model.STAGES) - {"input"}
    for row in compared:
        if "bfloat16" not in row["side"]:
            assert row["difference"] <= FLOAT32 * max(1, row["largest"]), row
            assert row.get("count") == row.get("count_reference"), row


@pytest.mark.slow
def test_whole_models_agree_with_detectron2(results):
    for row in results["inference"]:
        assert row["detections"] > 0
        # Rounding may decide between two boxes that overlap by just the threshold.
        assert row["found_again"] >= 0.9 * row["detections"], row
        assert row["score_difference"] <= FLOAT32, row


@pytest.mark.slow
def test_losses_agree_with_detectron2(results):
    for row in results["training"]:
        differences = row["relative_difference_of_losses"]
        assert set(differences) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert max(differences.values()) <= FLOAT32, row


@pytest.mark.slow
def test_targets_of_other_sizes_are_not_measured(results):
    by_part = {row["part"]: row["met"] for row in results["targets"] if row["size"]}
    assert by_part == {"inference": None, "stages": None, "memory": None}


@pytest.mark.slow
def test_report_and_chart_are_written(output):
    report = (output / "whole_model.md").read_text()
    for heading in ("Inference", "Stages, 96x128", "Training", "Targets"):
        assert f"\n## {heading}" in report
    assert str(output) not in report, "the folder is nobody's business"
    assert (output / "whole_model.png").stat().st_size > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.slow
def test_memory_in_a_process_of_its_own():
    options = whole_model.parse([*ARGUMENTS, *SMALL])
    weights = calibrated_weights(builtin_config("cpu", SMALL), (96, 128))
    (row,) = whole_model.memory(weights, "inference", "192x256", ["this project"], options)
    assert row["peak"] > row["before"] > 0
    assert row["ratio"] == 1


def test_the_document_shows_what_was_measured():
    """Its ratios match the committed run digit by digit."""
    figures = json.loads(Path("results/speed-cpu/amx/whole_model.json").read_text())
    page = Path("docs/evidence/speed.md").read_text()
    amx = page[page.index("## Batches of two") :]

    def row(part, **wanted):
        (found,) = [r for r in figures[part] if wanted.items() <= r.items()]
        return found

    inference = {"batch": 1, "side": "optimised"}
    expected = [
        ratio_text(row("inference", size="800x1333", **inference)),
        ratio_text(row("inference", size="480x640", **inference)),
        ratio_text(row("inference", size="800x1333", batch=1, side="optimised, bfloat16")),
        ratio_text(row("training", side="this project")),
        ratio_text(row("training", side="this project, channels_last")),
        ratio_text(row("training", side=whole_model.TRAINING_SIDES[-1])),
    ]
    assert [ratio for ratio in expected if ratio not in amx] == []
    assert figures["about"]["commit"] in page and "dirty" not in figures["about"]["commit"]


def test_times_are_of_one_call(monkeypatch):
    seconds = itertools.count()  # a second between two looks at the clock
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(seconds))
    called = []
    sides = {name: (lambda name=name: called.append(name) or len(called)) for name in "ab"}
    times, results = measuring.measure(sides, rounds=2, calls=4)
    assert "".join(called) == "aaaabbbb" * (2 + measuring.WARM_UP), "in turn, four in a row"
    assert results == {"a": len(called) - 4, "b": len(called)}
    assert times == {"a": [250.0, 250.0], "b": [250.0, 250.0]}


# Exported detectors.


@pytest.mark.slow
def test_exported_sides_agree_with_detectron2(tmp_path):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="an extra is not installed")
    file = tmp_path / "speed.json"
    arguments = ["--rounds", "1", "--sizes", "96x128", "--calibrated-at", "192x256"]
    deployment.main([*arguments, "--memory", "--json", str(file), *SMALL])
    results = json.loads(file.read_text())
    rows = {row["side"]: row for row in results["rows"]}
    assert {*rows} | {*results["left_out"]} == {*deployment.NAMES}
    assert "torchvision, OpenVINO" in results["left_out"], "it is another network"
    for name, row in rows.items():
        assert is_positive(row["ms"]) and is_positive(row["ratio"]), row
        if "int8" not in name and "bfloat16" not in name:
            assert row["found_again"] >= 0.9 * row["detections"] > 0, row
            assert row["score_difference"] <= FLOAT32, row
    assert any(
        "Convolution" in layer for layer in results["primitives"]["exported, OpenVINO"]["layers"]
    )
    assert "--json" not in results["command"]
    memory = {row["side"]: row for row in results["memory"]}
    assert {"Detectron2", "optimised", "exported, ONNX Runtime", "exported, OpenVINO"} <= {*memory}
    for row in memory.values():
        assert row["peak"] >= row["before"] > 0
    assert memory["exported, ONNX Runtime"]["ratio"] < 0.75, "there is no PyTorch in that process"


@pytest.mark.parametrize(
    ("primitive", "limit", "is_above"),
    [
        ("brgconv_avx512_1x1_f32", "AVX2", True),
        ("brgconv_avx512_amx_I8", "AVX512_CORE_VNNI", True),
        ("brgconv_avx2_f32", "AVX2", False),
        ("brgconv_avx2_f32", "AVX2_VNNI", False),
        ("jit_uni_f32", "SSE41", False),
        ("jit_avx_f32", "SSE41", True),
        ("brgconv_avx512_amx_bf16", "", False),
        ("brgconv_avx512_amx_bf16", "ALL", False),
    ],
)
def test_instructions_above_a_limit(primitive, limit, is_above):
    primitives = {("Convolution", primitive): 3}
    assert deployment.above_limit(primitives, limit) == (primitives if is_above else {})


def test_what_cannot_be_held_to_instructions_is_left_out(monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(LeftOut, match="cannot be held to ONEDNN_MAX_CPU_ISA"):
        deployment.in_a_runtime("exported, ONNX Runtime", None, 1, {})


def test_networks_are_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "TRAINED_ON", (64, 64))
    monkeypatch.setattr(networks, "DETECTED_ON", (64, 64))
    words = ["--networks", "torchvision/resnet18", "--rounds", "1"]
    for _ in range(2):
        networks.main([*words, "--json", str(tmp_path / "networks.json")])
    assert capsys.readouterr().out.count("torchvision/resnet18 training") == 1
    (row,) = json.loads((tmp_path / "networks.json").read_text())["networks"].values()
    for name in ("training", "inference"):
        assert row[name].keys() == {"ms", "ratio", "ratio_range"}
        exact, fast = (row[name]["ms"][kind] for kind in networks.KINDS)
        assert row[name]["ratio"] == pytest.approx(exact[0] / fast[0])
