"""Whole detectors exported and proved, the verb, the guard, and the example without PyTorch."""

import ctypes
import errno
import os
import runpy
import shutil
import signal
import subprocess
import sys

import fpn_ext
import numpy as np
import pytest
import tiny
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.data.reading import read_picture
from fpn_ext.export import formats, proof
from fpn_ext.export.formats import FORMATS, load_exported
from fpn_ext.export.graph import detector_graph
from fpn_ext.export.runtime import ExportedModel
from fpn_ext.export.suppression import Suppression
from fpn_ext.export.write import batches_of, export, put_in_place
from fpn_ext.modeling import fpn
from PIL import Image

NAMES = ["circle", "square", "star"]
CLASSES = dict(zip((3, 5, 8), NAMES, strict=True))
KINDS = ("rpn", "faster", "mask", "keypoint", "retinanet", "fast")


def options(kind):
    """A small detector of random weights that finds something."""
    base = {
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 300,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 200,
        "MODEL.ROI_HEADS.NUM_CLASSES": len(NAMES),
        "INPUT.MIN_SIZE_TEST": 96,
        "DATASETS.TRAIN": (),  # tiny's, of other classes, which another test may have registered
    }
    retinanet = {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.RETINANET.NUM_CLASSES": len(NAMES),
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6"],
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256]],
    }
    own = {
        "rpn": {"MODEL.META_ARCHITECTURE": "ProposalNetwork"},
        "faster": {},
        "mask": {
            "MODEL.MASK_ON": True,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        },
        "keypoint": {
            "MODEL.KEYPOINT_ON": True,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
            "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        },
        "retinanet": retinanet,
        "fast": {
            "MODEL.LOAD_PROPOSALS": True,
            "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
        },
    }
    return [word for pair in {**base, **own[kind]}.items() for word in pair]


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    tiny.register(tmp_path_factory.mktemp("data"))


def detector(kind, folder, *opts):
    torch.manual_seed(0)
    cfg = tiny.config(folder, *options(kind), *opts)
    model = build_model(cfg).eval()
    wide = 1.0 if kind == "retinanet" else 1.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, wide / weight[0].numel() ** 0.5)
            elif kind == "retinanet" and name.endswith("cls_score.bias"):
                weight.fill_(-2.0)
    return cfg, model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run: config and weights of a Faster R-CNN."""
    folder = tmp_path_factory.mktemp("run")
    cfg, model = detector("faster", folder, "TEST.FPN_EXT.CLASS_NAMES", NAMES)
    (folder / "config.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(folder)).save("model_final")
    return folder


@pytest.fixture(scope="module")
def onnx_file(run_folder):
    """What `fpn-ext export --run DIR --format onnx` writes."""
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    assert main(["export", "--run", str(run_folder), "--format", "onnx"]) == 0
    return run_folder / "model.onnx"


def cases():
    for kind in KINDS:
        for name in FORMATS:
            quick = name == "torchscript" or (kind, name) == ("mask", "onnx")
            marks = [] if quick else [pytest.mark.skipif(
                "EXPORT_ALL" not in os.environ, reason="takes a minute: make test-export"
            )]  # fmt: skip
            yield pytest.param(kind, name, marks=marks, id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "format_name"), list(cases()))
def test_a_whole_detector(kind, format_name, tmp_path):
    for package in FORMATS[format_name].packages:
        pytest.importorskip(package, reason="an extra is not installed")
    cfg, model = detector(kind, tmp_path)
    file = tmp_path / f"model{FORMATS[format_name].suffix}"
    rows = export(cfg, model, CLASSES, file, format_name)
    assert all(row.is_equal and row.expected == row.found for row in rows)
    assert sum(row.expected for row in rows) > 50
    assert len({row.size for row in rows}) == 3 and {row.batch for row in rows} == {1, 2}
    assert any(row.expected == 0 for row in rows)
    _, metadata = load_exported(file)
    assert metadata["class_names"] == NAMES and metadata["category_ids"] == [3, 5, 8]
    assert "NAME: FeaturePyramid" in metadata["config"]
    left = {path.suffix for path in tmp_path.iterdir() if path.stem == "model"}
    assert left == ({".xml", ".bin"} if format_name == "openvino" else {file.suffix})


def test_the_graph_finds_what_detectron2_finds_in_a_batch(tmp_path):
    _, model = detector("mask", tmp_path)
    graph = detector_graph(model, Suppression()).eval()
    images = torch.rand(3, 3, 90, 130) * 255

    def run(array):
        with torch.no_grad():
            return [x.numpy() for x in graph(torch.from_numpy(array))]

    found = proof.compared("pictures", model, run, graph.outputs, [images.numpy()])
    assert found.is_equal and found.unpaired == 0 and found.expected > 20


@pytest.mark.parametrize("format_name", ["onnx", "openvino", "torchscript"])
def test_a_picture_without_proposals(format_name, tmp_path):
    form = FORMATS[format_name]
    for package in form.packages:
        pytest.importorskip(package, reason="an extra is not installed")
    _, model = detector("fast", tmp_path)
    graph = detector_graph(model, form.suppression()).eval()
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 70, 90)).astype(np.float32)
    boxes = np.array([[[5, 5, 60, 50]]] * 2, np.float32)
    file = tmp_path / f"model{form.suffix}"
    form.write(graph, (torch.from_numpy(images), torch.from_numpy(boxes)), file, "{}")
    run, _ = form.load(file)
    assert [len(x) for x in run(images, np.zeros((2, 0, 4), np.float32))] == [0] * 4
    one = proof.compared("pictures", model, run, graph.outputs, [images, boxes])
    assert one.is_equal and one.expected == one.found > 0


@pytest.mark.parametrize("name", ["model[1]", "v2.1", "*", "größe 1"])
def test_whatever_the_file_is_called_it_is_put_in_place(name, tmp_path):
    (tmp_path / "written").mkdir()
    for suffix in (".xml", ".bin", ".pt"):
        (tmp_path / "written" / f"{name}{suffix}").write_text(suffix)
    put_in_place(tmp_path / "written" / f"{name}.xml", tmp_path / f"{name}.xml")
    assert {path.name for path in tmp_path.iterdir()} == {
        "written", f"{name}.xml", f"{name}.bin"
    }  # fmt: skip
    put_in_place(tmp_path / "written" / f"{name}.pt", tmp_path / f"{name}.pt")
    assert (tmp_path / f"{name}.pt").read_text() == ".pt"
    with pytest.raises(FileNotFoundError, match="was not written"):
        put_in_place(tmp_path / "written" / f"{name}.pt", tmp_path / f"{name}.pt")


def test_a_file_that_finds_something_else_is_not_kept(tmp_path, monkeypatch):
    """A file that suppresses at half of the threshold; one that was there before stays."""
    cfg, model = detector("faster", tmp_path)
    make = FORMATS["torchscript"]

    class Careless(Suppression):
        def forward(self, boxes, scores, threshold):
            return super().forward(boxes, scores, threshold / 2)

    monkeypatch.setitem(FORMATS, "torchscript", make._replace(suppression=Careless))
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=r"does not find what the model finds.*not written"):
        export(cfg, model, CLASSES, tmp_path / "out" / "model.pt", "torchscript")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "model.pt").write_text("of before")
    with pytest.raises(RuntimeError, match="as it was before"):
        export(cfg, model, CLASSES, tmp_path / "out" / "model.pt", "torchscript")
    assert (tmp_path / "out" / "model.pt").read_text() == "of before"


def test_a_file_without_top_down_sums_is_not_kept(tmp_path, monkeypatch):
    """What ONNX's exporter made of them before the pyramid asked whether it is recorded."""
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    monkeypatch.setattr(fpn, "records_a_graph", lambda: False)
    cfg, model = detector("rpn", tmp_path)
    with pytest.raises(RuntimeError, match="does not find what the model finds"):
        export(cfg, model, {1: "object"}, tmp_path / "model.onnx", "onnx")
    assert not (tmp_path / "model.onnx").exists()


def row(**changes):
    same = proof.Row("picture", (9, 9), 1, 100, 100, 0, 0.0, 0.0, 0.0)
    return same._replace(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"unpaired": 2}, {"boxes": 0.2}, {"scores": 0.01}, {"masks": 0.1}],
)
def test_what_counts_as_different(changes):
    assert row().is_equal and row(unpaired=1).is_equal
    assert not row(**changes).is_equal


def test_what_is_not_there_is_not_compared():
    without = row(masks=None)
    assert without.is_equal
    assert proof.table([without]).splitlines()[-1].endswith("| 0.0e+00 | 0.0e+00 | - |")


def test_the_verb_writes_what_the_model_finds(onnx_file, run_folder):
    _, model = detector("faster", run_folder)
    exported = ExportedModel(onnx_file)
    assert exported.metadata["class_names"] == NAMES
    assert exported.metadata["resize"]["shortest_side"] == 96
    assert exported.metadata["versions"]["torch"] == torch.__version__
    entry = {"image": torch.rand(3, 96, 130) * 255, "height": 192, "width": 260}
    with torch.no_grad():
        expected = model([dict(entry)])[0]["instances"]
    found = exported([entry])[0]["instances"]
    assert len(found) == len(expected) > 0 and found.image_size == (192, 260)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


def test_a_file_of_weights_that_the_training_has_no_more(onnx_file, run_folder, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)

    def warnings_of_loading(file):
        caplog.clear()
        detector = fpn_ext.Detector.load(file)
        assert detector.model.weights == f"{file}, exported from model_final.pth"
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert warnings_of_loading(run / onnx_file.name) == []
    (run / "model_best.pth").write_bytes(b"of a training that went on")
    (said,) = warnings_of_loading(run / onnx_file.name)
    assert "was exported from model_final.pth" in said and "others now (model_best.pth)" in said
    assert warnings_of_loading(shutil.copy(run / onnx_file.name, tmp_path)) == []


def test_detector_of_a_file_and_of_the_run_it_was_made_from(onnx_file, run_folder, tmp_path):
    picture = tiny.photo()
    Image.fromarray(picture).save(tmp_path / "photo.png")
    of_file, of_run = (fpn_ext.Detector.load(path) for path in (onnx_file, run_folder))
    assert of_file.categories == of_run.categories
    expected = of_run(picture)
    for source in (picture, tmp_path / "photo.png", Image.fromarray(picture)):
        found = of_file(source)
        assert (found.height, found.width) == picture.shape[:2]
        assert len(found) == len(expected) > 0 and found.class_names == expected.class_names
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.1)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    annotations = [[entry["category_id"] for entry in d.to_coco()] for d in (found, expected)]
    assert annotations[0] == annotations[1]
    assert len(of_file([picture, picture])) == 2


def test_what_a_detector_of_a_file_has_not(onnx_file, tmp_path):
    box = [[0, 0, 9, 9]]
    exported = fpn_ext.Detector.load(onnx_file)
    with pytest.raises(TypeError, match="an exported file gives detections alone"):
        exported.features(tiny.photo(), box)
    with pytest.raises(TypeError, match="proposes boxes itself, and takes none"):
        exported(tiny.photo(), proposals=box)
    with pytest.raises(TypeError, match="its weights and config are in it"):
        fpn_ext.Detector.load(onnx_file, opts=["MODEL.DEVICE", "cpu"])
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="what PyTorch saves may hold code"):
        fpn_ext.Detector.load(tmp_path / "model.pt")


def test_a_file_needs_its_runtime_alone(onnx_file, monkeypatch):
    """Not what it was written with."""
    find, hidden = formats.importlib.util.find_spec, {"onnx"}
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    assert len(fpn_ext.Detector.load(onnx_file)(tiny.photo())) > 0
    hidden.add("onnxruntime")
    with pytest.raises(ImportError, match=r"model\.onnx needs onnxruntime, not .*\[onnx\]"):
        fpn_ext.Detector.load(onnx_file)


def test_only_standard_operators_of_onnx(onnx_file):
    import onnx

    model = onnx.load(str(onnx_file))
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in model.opset_import] == [""]
    (images,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
        "batch", 3, "height", "width"
    ]  # fmt: skip


def test_the_example_runs_it_without_pytorch(onnx_file, tmp_path):
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (120, 200, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'fpn_ext', 'detectron2'): sys.modules[name] = None\n"
        f"sys.argv = ['onnx_predict.py', {str(onnx_file)!r}, {str(tmp_path / 'a.png')!r},"
        " '--min-score', '0.3']\n"
        "runpy.run_path('examples/onnx_predict.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines and {line[2] for line in lines} <= set(NAMES)

    from fpn_ext.inference.predictor import Predictor, load_inference_config

    opts = ["MODEL.WEIGHTS", str(onnx_file.parent / "model_final.pth")]
    predictor = Predictor(load_inference_config(str(onnx_file.parent / "config.yaml"), opts))
    expected = predictor(predictor.read(tmp_path / "a.png"))["instances"]
    expected = expected[expected.scores >= 0.3]
    assert len(lines) == len(expected)
    found = np.array([[float(value) for value in line[3:]] for line in lines])
    # Equal scores may come in another order.
    apart = np.abs(found[:, None] - expected.pred_boxes.tensor.numpy()[None]).max(axis=2)
    assert apart.min(axis=0).max() < 0.2 and apart.min(axis=1).max() < 0.2


def test_pictures_that_are_not_resized(small_cfg):
    """MIN_SIZE_TEST 0: three sizes are compared all the same, and the example leaves pictures."""
    small_cfg.INPUT.MIN_SIZE_TEST = 0
    sizes = [arrays[0].shape[-2:] for _, arrays in batches_of(small_cfg, False, [])]
    assert sizes == [(320, 426), (426, 320), (241, 323)]
    example = runpy.run_path("examples/onnx_predict.py")
    assert example["resized"](Image.new("RGB", (70, 50)), 0, 480).size == (70, 50)
    assert example["resized"](Image.new("RGB", (70, 50)), 100, 480).size == (140, 100)


class OfSize:
    """A Pillow picture of a size alone."""

    def __init__(self, *size):
        self.size = size

    def resize(self, size, _):
        return OfSize(*size)


def test_the_example_resizes_as_detectron2_does():
    """99 x 320 px become 148 x 480, 148.5 being just missed; in one step they would become 149."""
    resized = runpy.run_path("examples/onnx_predict.py")["resized"]
    sizes = [(99, 320), (960, 199), (176, 1376), (428, 1024), (480, 640), (7, 7), (640, 427)]
    for shortest, longest in ((256, 480), (800, 1333), (512, 640)):
        for width, height in sizes:
            rule = ResizeShortestEdge([shortest, shortest], longest)
            expected = rule.get_transform(np.empty((height, width, 3)))
            found = resized(OfSize(width, height), shortest, longest)
            assert tuple(found.size) == (expected.new_w, expected.new_h)
    with pytest.raises(ValueError, match="too thin"):
        resized(OfSize(2000, 1), 256, 480)


def test_the_example_reads_pictures_as_training_does(tmp_path):
    upright = runpy.run_path("examples/onnx_predict.py")["upright"]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(tiny.photo()).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        found = np.asarray(upright(picture))
    assert np.array_equal(found, read_picture(tmp_path / "turned.png", "RGB"))
    with pytest.raises(ValueError, match="8 bits a channel, got I;16"):
        upright(Image.new("I;16", (9, 9)))


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    cfg, model = detector("rpn", tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(FORMATS, "torchscript", FORMATS["torchscript"]._replace(write=full))
    file = tmp_path / "out" / "model.pt"
    with pytest.raises(OSError, match=r"No space left on device.*model\.pt"):
        export(cfg, model, CLASSES, file, "torchscript")
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("format_name", ["torchscript", "pt2"])
def test_pytorch_is_given_no_file_to_write(format_name, tmp_path, monkeypatch):
    """Its writer ends the process on a full disk, before Python can say anything."""

    def exported(module, *_, **__):
        return module

    def saved(module, where, **_):
        assert not isinstance(where, str | os.PathLike)
        where.write(b"all of it")

    monkeypatch.setattr(torch.jit, "trace", exported)
    monkeypatch.setattr(torch.jit, "save", saved)
    monkeypatch.setattr(torch.export, "export", exported)
    monkeypatch.setattr(torch.export, "save", saved)
    _, model = detector("rpn", tmp_path)
    file = tmp_path / "model"
    FORMATS[format_name].write(detector_graph(model, Suppression()), (), file, "{}")
    assert file.read_bytes() == b"all of it"


def test_sigterm_leaves_nothing_half_written(run_folder, monkeypatch, capsys):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(FORMATS, "torchscript", FORMATS["torchscript"]._replace(write=killed))
    with pytest.raises(SystemExit) as end:
        main(["export", "--run", str(run_folder), "--format", "torchscript"])
    assert end.value.code == 128 + signal.SIGTERM
    assert not list(run_folder.glob(".export-*")) and not (run_folder / "model.pt").exists()
    assert "torchscript: a file of the model that finds up to 1000" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="stack_t is Linux's")
def test_signals_are_handled_where_they_were_after_openvino(tmp_path):
    """Each of its models would put back the signal stack of another, which may be gone."""
    openvino = pytest.importorskip("openvino", reason="an extra is not installed")
    operations = openvino.opset8
    x = operations.parameter([1, 3, 9, 9], np.float32)
    model = openvino.Model([operations.relu(x)], [x])
    openvino.save_model(model, str(tmp_path / "model.xml"))

    def signal_stack():
        stack = (ctypes.c_void_p * 3)()
        ctypes.CDLL(None).sigaltstack(None, stack)
        return list(stack)

    before = signal_stack()
    first, second = (FORMATS["openvino"].load(tmp_path / "model.xml") for _ in range(2))
    assert signal_stack() == before
    del first
    del second
    assert signal_stack() == before


# Mistakes, before any work.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "model.pt"], "a file of torchscript ends with .pt"),
        (["--pictures", "none.jpg"], "--pictures none.jpg: no such file"),
    ],
)
def test_what_is_found_before_the_model_is_loaded(words, said, run_folder, tmp_path, capsys):
    words = [word.replace("model.pt", str(tmp_path / "model.onnx")) for word in words]
    assert main(["export", "--run", str(run_folder), "--format", "torchscript", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "weights:" not in printed.out


def test_a_missing_package_is_named(monkeypatch, run_folder, capsys):
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: name != "onnxruntime" and find(name)
    )
    monkeypatch.setitem(
        FORMATS, "onnx", FORMATS["onnx"]._replace(packages=("json", "onnxruntime_that_is_not"))
    )
    assert main(["export", "--run", str(run_folder), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "pip install onnxruntime_that_is_not" in said and ".[onnx]" in said


def test_pt2_with_a_pytorch_that_is_too_old(monkeypatch, run_folder, capsys):
    monkeypatch.setattr(torch.export, "Dim", object())
    assert main(["export", "--run", str(run_folder), "--format", "pt2"]) == 2
    printed = capsys.readouterr()
    assert "--format pt2 needs PyTorch 2.6" in printed.err and "weights:" not in printed.out


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "PyramidROIHeads"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"], "ROIPool"),
        (["TEST.DETECTIONS_PER_IMAGE", -1], "TEST.DETECTIONS_PER_IMAGE"),
        (["TEST.DETECTIONS_PER_IMAGE", 0], "TEST.DETECTIONS_PER_IMAGE"),
        (["MODEL.RPN.PRE_NMS_TOPK_TEST", 0], "MODEL.RPN.PRE_NMS_TOPK_TEST must be at least 1"),
        (["MODEL.RPN.POST_NMS_TOPK_TEST", 0], "MODEL.RPN.POST_NMS_TOPK_TEST must be at least 1"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", -0.1], "MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        (["MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.5], "MODEL.ROI_HEADS.NMS_THRESH_TEST must be from"),
        (["MODEL.RPN.NMS_THRESH", -0.1], "MODEL.RPN.NMS_THRESH must be from 0 to 1"),
    ],
)
def test_what_cannot_be_exported(opts, said, tmp_path):
    _, model = detector("faster", tmp_path, *opts)
    with pytest.raises(ValueError, match=said):
        detector_graph(model, Suppression())


@pytest.mark.parametrize(("key", "value"), [("NMS_THRESH_TEST", 2.0), ("TOPK_CANDIDATES_TEST", 0)])
def test_what_of_retinanet_cannot_be_exported(key, value, tmp_path):
    _, model = detector("retinanet", tmp_path, f"MODEL.RETINANET.{key}", value)
    with pytest.raises(ValueError, match=f"MODEL.RETINANET.{key}"):
        detector_graph(model, Suppression())


def test_a_wrong_name_of_the_file(tmp_path):
    cfg, model = detector("rpn", tmp_path)
    with pytest.raises(ValueError, match=r"ends with \.pt"):
        export(cfg, model, {}, tmp_path / "model.onnx", "torchscript")
    with pytest.raises(ValueError, match="--format must be one of onnx, openvino"):
        export(cfg, model, {}, tmp_path / "model.tflite", "tflite")


@pytest.mark.torchscript
def test_a_file_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path / "none.pt")
    (tmp_path / "model.txt").touch()
    with pytest.raises(ValueError, match=r"ends with \.onnx"):
        load_exported(tmp_path / "model.txt")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="not written by fpn-ext export"):
        load_exported(tmp_path / "other.pt")


def test_the_suffixes_of_the_verb_are_those_of_the_formats():
    from fpn_ext.tools.export import SUFFIXES

    assert {name: form.suffix for name, form in FORMATS.items()} == SUFFIXES
