"""Exported detectors in eight bits: what is quantised, what is scored, and when a file is kept."""

import importlib.util

import fpn_ext
import numpy as np
import pytest
import tiny
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.export import formats, write_int8
from fpn_ext.export.formats import load_exported
from fpn_ext.export.int8 import QUANTISERS
from fpn_ext.export.write_int8 import CalibrationImages
from fpn_ext.inference.predictor import Predictor, inference_config

SETS = ["DATASETS.TRAIN", (tiny.DATASET,), "DATASETS.TEST", (tiny.DATASET,)]
EXPORT = ["--int8", "--calibration-pictures", "3", "--format"]


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    tiny.register(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run of random weights that finds something."""
    folder = tmp_path_factory.mktemp("run")
    small = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 50]
    cfg = tiny.config(folder, *SETS, *small, "INPUT.MIN_SIZE_TEST", 96)
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 / weight[0].numel() ** 0.5)
    (folder / "config.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(folder)).save("model_final")
    return folder


def needs(format_name):
    for package in QUANTISERS[format_name].packages:
        pytest.importorskip(package, reason="an extra is not installed")


@pytest.fixture(scope="module")
def onnx_file(run_folder):
    needs("onnx")
    assert main(["export", "--run", str(run_folder), *EXPORT, "onnx"]) == 0
    return run_folder / "model_int8.onnx"


def test_layers_are_quantised_and_boxes_are_not(onnx_file):
    import onnx

    nodes = onnx.load(str(onnx_file)).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    layers = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert len(layers) > 15  # bottom-up, laterals, outputs, RPN on five levels, box head
    for layer in layers:
        assert [made_by[name].op_type for name in layer.input] == ["DequantizeLinear"] * 3, layer
    for node in nodes:
        if node.op_type in ("RoiAlign", "NonMaxSuppression", "TopK", "Exp", "Log", "Floor"):
            of = [made_by[name].op_type for name in node.input if name in made_by]
            assert node.op_type == "RoiAlign" or "DequantizeLinear" not in of, node


def test_only_standard_operators_of_onnx(onnx_file):
    import onnx

    model = onnx.load(str(onnx_file))
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


def test_the_file_says_what_eight_bits_cost(onnx_file):
    _, metadata = load_exported(onnx_file)
    about = metadata["int8"]
    assert about["calibrated_on"] == {"datasets": [tiny.DATASET], "pictures": 3}
    (score,) = about["scores"]
    assert (score["dataset"], score["score"]) == (tiny.DATASET, "bbox AP")
    assert score["float32"] - score["int8"] <= 1.0
    assert not (onnx_file.parent / "model.onnx").exists(), "the file in float32 was not asked for"


def test_a_detector_of_the_file(onnx_file, run_folder):
    of_file, of_run = (fpn_ext.Detector.load(path) for path in (onnx_file, run_folder))
    assert of_file.categories == of_run.categories
    found = of_file(tiny.photo(120, 160))
    assert len(found) > 0 and np.isfinite(found.boxes).all()
    assert found.boxes.min() >= 0 and found.boxes[:, 2].max() <= 160


@pytest.mark.slow
def test_openvino(run_folder):
    """A file whose layers are quantised, in the level mapping and elsewhere nothing."""
    needs("openvino")
    import openvino

    assert main(["export", "--run", str(run_folder), *EXPORT, "openvino"]) == 0
    file = run_folder / "model_int8.xml"
    operations = openvino.Core().read_model(str(file)).get_ordered_ops()

    def inputs(operation):
        return [value.get_node() for value in operation.input_values()]

    layers = [op for op in operations if op.get_type_name() in ("Convolution", "MatMul")]
    assert len(layers) > 15
    for layer in layers:
        source = inputs(layer)[0]
        while source.get_type_name() in ("MaxPool", "Reshape"):  # which choose and move numbers
            source = inputs(source)[0]
        assert source.get_type_name() == "FakeQuantize", layer
    for operation in operations:
        if operation.get_friendly_name().startswith(("/detections/", "/box_pooler/rule/")):
            assert "FakeQuantize" not in [op.get_type_name() for op in inputs(operation)]
    assert len(fpn_ext.Detector.load(file)(tiny.photo(120, 160))) > 0


def test_calibration_prepares_images_as_inference_does(run_folder):
    opts = ["MODEL.WEIGHTS", str(run_folder / "model_final.pth"), "MODEL.DEVICE", "cpu"]
    cfg, _ = inference_config(str(run_folder / "config.yaml"), opts)
    images = CalibrationImages(cfg, 100)
    assert len(images) == 6, "all there are"
    predictor = Predictor(cfg)
    from detectron2.data import DatasetCatalog

    for (array,), record in zip(images, DatasetCatalog.get(tiny.DATASET), strict=True):
        image = predictor.network_input(predictor.read(record["file_name"]))["image"]
        np.testing.assert_array_equal(array[0], image)
    again = [a.sum() for (a,) in CalibrationImages(cfg, 2)]
    assert again == [a.sum() for (a,) in CalibrationImages(cfg, 2)]
    assert again == [a.sum() for i, (a,) in enumerate(images) if i in (0, 5)], "first and last"


# When a file is kept.


@pytest.fixture
def fast(monkeypatch, run_folder, onnx_file):
    """Without exporting or quantising anything; scores are those given."""
    exported = onnx_file.read_bytes()

    def quantiser(file, pictures):
        assert len(list(pictures)) == len(pictures) == 3
        return lambda path, metadata: path.write_bytes(file.read_bytes())

    fake = QUANTISERS["onnx"]._replace(quantise=quantiser)
    monkeypatch.setitem(QUANTISERS, "onnx", fake)

    def write(cfg, model, classes, file, *_):
        file.write_bytes(exported)
        return []

    monkeypatch.setattr(write_int8, "export", write)

    def export(before, after, *options):
        scores = iter([before, after])
        monkeypatch.setattr(
            write_int8, "inference_on_dataset", lambda *_: {"bbox": {"AP": next(scores)}}
        )
        return main(["export", "--run", str(run_folder), *EXPORT, "onnx", *options])

    return export


def test_a_file_that_costs_too_much_is_not_kept(fast, tmp_path, capsys):
    file = tmp_path / "out" / "model.onnx"
    assert fast(50.0, 48.5, "--output", str(file)) == 1
    said = capsys.readouterr().err
    assert "| bbox AP | 50.00 | 48.50 | 1.50 |" in said and "--max-ap-loss 1" in said
    assert list(file.parent.iterdir()) == []
    file.write_text("of before")
    assert fast(50.0, float("nan"), "--output", str(file)) == 1
    assert "as it was before" in capsys.readouterr().err and file.read_text() == "of before"
    assert fast(50.0, 48.5, "--output", str(file), "--max-ap-loss", "2") == 0
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert load_exported(file)[1]["class_names"]


# Mistakes, before any work.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "pt2", "--int8"], "--int8 is for --format onnx and openvino"),
        (["--format", "onnx", "--max-ap-loss", "2"], "--max-ap-loss needs --int8"),
        (["--format", "onnx", "--int8", "--max-ap-loss", "nan"], "--max-ap-loss must be a number"),
        (["--format", "onnx", "--int8", "--calibration-pictures", "0"], "at least 1, got 0"),
        (["--format", "onnx", "--int8", "DATASETS.TRAIN", "()"], "append DATASETS.TRAIN"),
        (["--format", "onnx", "--int8", "DATASETS.TEST", "()"], "append DATASETS.TEST"),
    ],
)
def test_mistakes(words, said, run_folder, tmp_path, capsys):
    needs("onnx")
    file = tmp_path / "out" / "model.onnx"
    assert main(["export", "--run", str(run_folder), "--output", str(file), *words]) == 2
    assert said in capsys.readouterr().err
    assert not file.parent.exists()


def test_a_missing_package_is_named(run_folder, monkeypatch, capsys):
    needs("onnx")
    find = importlib.util.find_spec
    names = {"nncf": None}
    fake = {"openvino": True}
    monkeypatch.setattr(
        formats.importlib.util,
        "find_spec",
        lambda name: names.get(name, fake.get(name) or find(name)),
    )
    assert main(["export", "--run", str(run_folder), "--format", "openvino", "--int8"]) == 2
    said = capsys.readouterr().err
    assert "pip install nncf" in said and ".[int8]" in said
