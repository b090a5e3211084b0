"""Parts of a detector in other runtimes: pyramids, suppression, pooling beside eager mode."""

import itertools
import os
import warnings

import fpn_ext
import numpy as np
import pytest
import tiny
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from fpn_ext.export.formats import record_onnx
from fpn_ext.export.graph import detector_graph
from fpn_ext.export.pooling import LevelMappedRoIAlign
from fpn_ext.export.signal_stack import signal_stack_kept
from fpn_ext.export.suppression import OperatorSuppression, Suppression
from fpn_ext.modeling import fpn
from torch import nn
from torchvision.ops import nms

PYRAMIDS = {
    "FeaturePyramid": {},
    "PathAggregationPyramid": {},
    "BiFPN": {"norm": "BN", "repeats": 1},
    "BilinearPyramid": {},
    "NormalizedLateralPyramid": {"norm": "GN"},
}
RECORDED = (2, 3, 160, 224)
SIZES = ((1, 3, 128, 192), (1, 3, 133, 201), (3, 3, 256, 160))


class Levels(nn.Module):
    """A pyramid's maps in a tuple, fine to coarse."""

    def __init__(self, pyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, images):
        return tuple(self.pyramid(images).values())


@pytest.fixture(scope="module")
def pyramid():
    def build(name):
        torch.manual_seed(1)
        keys = {"out_channels": 32, **PYRAMIDS[name]}
        bottom_up = tiny.TinyBottomUp()
        made = getattr(fpn_ext, name)(
            bottom_up=bottom_up,
            in_features=bottom_up.names,
            top_block=fpn_ext.Subsample("p5"),
            **keys,
        )
        return Levels(made).eval().requires_grad_(False)

    return build


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory, pyramid):
    """The ONNX file of each pyramid, written once."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    folder, written = tmp_path_factory.mktemp("onnx"), {}

    def file(name):
        if name not in written:
            written[name] = folder / f"{name}.onnx"
            axes = {"images": {0: "batch", 2: "height", 3: "width"}}
            record_onnx(pyramid(name), (torch.rand(RECORDED),), written[name], axes, {})
        return written[name]

    return file


def in_onnxruntime(file):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def in_openvino(file):
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("OpenVINO 2026.4.1 may end the process where oneDNN's instructions are limited")
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    model = openvino.convert_model(str(file))
    with signal_stack_kept():
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *arrays: [np.array(value) for value in compiled(list(arrays)).values()]


def in_torchscript(module, example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a branch on whether a tensor is empty, and of its age
        return torch.jit.trace(module, example, check_trace=False)


def in_pt2(module, example):
    dim = getattr(torch.export.Dim, "DYNAMIC", None)
    if dim is None:
        pytest.skip("before PyTorch 2.6 torch.export cannot tell how sizes depend on one another")
    shapes = (dict.fromkeys((0, 2, 3), dim),)
    return torch.export.export(module, (example,), dynamic_shapes=shapes).module()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torchscript", "pt2"])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_at_sizes_that_were_not_recorded(pyramid, onnx_files, name, runtime):
    module = pyramid(name)
    if runtime in ("onnxruntime", "openvino"):
        run = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](onnx_files(name))
    else:
        record = {"torchscript": in_torchscript, "pt2": in_pt2}[runtime]
        with torch.no_grad():
            recorded = record(module, torch.rand(RECORDED))

        def run(images):
            return [level.numpy() for level in recorded(torch.from_numpy(images))]

    for size in SIZES:
        images = torch.rand(size)
        with torch.no_grad():
            expected = module(images)
        found = run(images.numpy())
        for level, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other, level.numpy(), rtol=1e-3, atol=1e-4)


class Maps(nn.Module):
    """The maps of a detector's graph, of images that it normalises and pads."""

    def __init__(self, graph):
        super().__init__()
        self.detector = graph

    def forward(self, images):
        return tuple(self.detector.maps(images).values())


def test_same_padding_in_torch_export():
    """A side of P_k is a short expression in the image's, and a file takes every size.

    By timm's own padding it has a quotient rounded up for each stride, and its export does not end.
    """
    pytest.importorskip("timm", reason="timm is not installed")
    dim = getattr(torch.export.Dim, "DYNAMIC", None)
    if dim is None:
        pytest.skip("before PyTorch 2.6 torch.export cannot tell how sizes depend on one another")
    words = ["MODEL.FPN_EXT.BOTTOM_UP", "timm/tf_efficientnet_lite0"]
    words += ["MODEL.FPN_EXT.KEEP_PIXELS", "True", "MODEL.DEVICE", "cpu"]
    model = build_model(fpn_ext.load_config("configs/gain/pyramid.yaml", words)).eval()
    graph = Maps(detector_graph(model, Suppression())).eval()
    shapes = (dict.fromkeys((0, 2, 3), dim),)
    with torch.no_grad():
        program = torch.export.export(graph, (torch.rand(RECORDED),), dynamic_shapes=shapes)
        run = program.module()
        for size in SIZES:
            images = 255 * torch.rand(size)
            padded = model.preprocess_image([{"image": image} for image in images]).tensor
            for level, expected in zip(run(images), model.backbone(padded).values(), strict=True):
                torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    for level in output.args[0]:
        height = str(level.meta["val"].shape[2])
        assert len(height) < 40, height  # of P5, ((h + 31)//32)


@pytest.mark.skipif("EXPORT_ALL" not in os.environ, reason="takes minutes: make test-export")
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_by_the_other_exporter_of_onnx(pyramid, tmp_path, name):
    pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    module, file = pyramid(name), tmp_path / "pyramid.onnx"
    dim = torch.export.Dim.DYNAMIC
    shapes = (dict.fromkeys((0, 2, 3), dim),)
    with torch.no_grad():
        torch.onnx.export(
            module, (torch.rand(RECORDED),), str(file), dynamo=True, dynamic_shapes=shapes
        )
    run = in_onnxruntime(file)
    for size in SIZES:
        images = torch.rand(size)
        with torch.no_grad():
            expected = module(images)
        for level, other in zip(expected, run(images.numpy()), strict=True):
            np.testing.assert_allclose(other, level.numpy(), rtol=1e-3, atol=1e-4)


def test_without_asking_a_sum_through_a_view_is_lost(pyramid, tmp_path, monkeypatch):
    """Why the pyramid asks whether it is recorded: ONNX's exporter drops the top-down sums."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    monkeypatch.setattr(fpn, "records_a_graph", lambda: False)
    module, images = pyramid("FeaturePyramid"), torch.rand(1, 3, 128, 128)
    record_onnx(module, (images,), tmp_path / "lost.onnx", {"images": {}}, {})
    found = in_onnxruntime(tmp_path / "lost.onnx")(images.numpy())
    with torch.no_grad():
        expected = module(images)
    assert np.abs(found[0] - expected[0].numpy()).max() > 0.1 * expected[0].abs().max()


# Suppression. A box of 10 x 10 and one of 10 x h overlap by h/10, if h is not above 10.
HEIGHTS = (10.0, 7.0, 6.0, 5.0, 10 / 3, 3.0, 2.5)
THRESHOLDS = (0.7, 0.6, 0.5, 1 / 3, 0.3, 0.25, 0.45, 1.0, 0.0)


class Suppressions(nn.Module):
    """What is kept of the same boxes at each threshold."""

    def __init__(self, suppression):
        super().__init__()
        self.suppression = suppression

    def forward(self, boxes, scores):
        return torch.stack([self.suppression(boxes, scores, t).float() for t in THRESHOLDS])


def overlapping_boxes():
    """(1, R, 4): each overlaps the first by a height / 10; two more; and some at random."""
    corners = [[0, 0, 10, height] for height in HEIGHTS]
    corners += [[100, 0, 110, 10], [100, 0, 110, 10], [300, 300, 310, 310]]
    some = torch.rand(40, 2, 2) * 60 + 400
    some = torch.cat((some.amin(dim=1), some.amax(dim=1)), dim=1)
    return torch.cat((torch.tensor(corners), some))[None]


def scores_of_two_classes(count):
    """(1, 2, R): the same order in both; the second class lacks the first box."""
    scores = torch.linspace(1, 0.1, count).expand(1, 2, count).clone()
    scores[0, 1, 0] = -1
    return scores


def by_torchvision(boxes, scores):
    found = torch.zeros(len(THRESHOLDS), *scores.shape)
    for number, label in itertools.product(range(len(THRESHOLDS)), range(2)):
        rows = (scores[0, label] > 0).nonzero().flatten()
        kept = nms(boxes[0, rows], scores[0, label, rows], THRESHOLDS[number])
        found[number, 0, label, rows[kept]] = 1
    return found


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_suppression_at_an_overlap_equal_to_the_threshold(runtime, tmp_path):
    boxes = overlapping_boxes()
    scores = scores_of_two_classes(boxes.shape[1])
    if runtime == "torch":
        found = Suppressions(Suppression())(boxes, scores)
    else:
        pytest.importorskip("onnx", reason="the extra onnx is not installed")
        module = Suppressions(OperatorSuppression(drops_equal=runtime == "openvino"))
        file = tmp_path / "suppression.onnx"
        record_onnx(module, (boxes, scores), file, {"boxes": {1: "r"}, "scores": {2: "r"}}, {})
        run = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](file)
        (found,) = run(boxes.numpy(), scores.numpy())
    expected = by_torchvision(boxes, scores)
    assert expected[THRESHOLDS.index(0.3), 0, 0, HEIGHTS.index(3.0)] == 0
    assert expected[THRESHOLDS.index(0.5), 0, 0, HEIGHTS.index(5.0)] == 1
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())


@pytest.mark.parametrize("scores", [torch.full((2, 3, 5), -1.0), torch.ones(2, 3, 1)])
def test_suppression_of_nothing_and_of_one(scores):
    boxes = torch.tensor([0.0, 0, 5, 5]).expand(2, scores.shape[2], 4)
    assert torch.equal(Suppression()(boxes, scores, 0.5), scores > 0)


# Pooling.


class Pooling(nn.Module):
    def __init__(self, pooler):
        super().__init__()
        self.pool = LevelMappedRoIAlign(pooler)

    def forward(self, fine, coarse, rois):
        return self.pool([fine, coarse], rois)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_from_the_level_of_a_box(runtime, sampling_ratio, tmp_path):
    """Boxes of both levels, beyond the image, without width, without height, and none at all."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pooler = fpn_ext.LevelMappedROIPooler(7, (1 / 4, 1 / 8), sampling_ratio, "ROIAlignV2", 32, 3)
    fine, coarse = torch.rand(2, 4, 32, 40), torch.rand(2, 4, 16, 20)
    boxes = torch.tensor(
        [[3.0, 4, 20, 30], [0, 0, 150, 120], [-30, -20, 15, 18], [9, 9, 9, 30], [9, 9, 30, 9],
         [140, 100, 190, 150], [5, 5, 5, 5], [20, 30, 51, 62]]
    )  # fmt: skip
    image = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
    rois = torch.cat((image[:, None], boxes), dim=1)
    file = tmp_path / "pooling.onnx"
    inputs = {"fine": {}, "coarse": {}, "rois": {0: "r"}}
    record_onnx(Pooling(pooler), (fine, coarse, rois), file, inputs, {})
    run = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime](file)
    for count in (8, 3, 0):
        of_images = [Boxes(boxes[:count][image[:count] == n]) for n in (0, 1)]
        expected = pooler([fine, coarse], of_images)
        (found,) = run(fine.numpy(), coarse.numpy(), rois[:count].numpy())
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_pooling_that_cannot_be_exported():
    pooler = fpn_ext.LevelMappedROIPooler(7, (1 / 4,), 0, "ROIPool")
    with pytest.raises(ValueError, match="POOLER_TYPE ROIPool"):
        LevelMappedRoIAlign(pooler)
    with pytest.raises(ValueError, match="cannot export a Identity"):
        LevelMappedRoIAlign(nn.Identity())
