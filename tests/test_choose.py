"""Which way a layer is computed: any gives the same results; the fastest is kept."""

import json
import random

import fpn_ext
import pytest
import torch
from detectron2.modeling import build_model
from fpn_ext.kernels import compiled
from fpn_ext.speed import choose
from test_optimize import assert_same_stages, model_of


@pytest.fixture(autouse=True)
def choices(monkeypatch, tmp_path):
    """The file of what was measured: of this test alone."""
    file = tmp_path / "choices.json"
    monkeypatch.setattr(choose, "_cache_file", lambda: file)
    return file


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200
    small_cfg.MODEL.RESNETS.DEPTH, small_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 50, 256
    return small_cfg


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_chosen_gives_the_same_results(cfg, seed, monkeypatch):
    draw, taken = random.Random(seed), set()

    def any_way(times):
        taken.add(draw.choice(list(times)))
        return draw.choice(list(times))

    monkeypatch.setattr(choose, "fastest", any_way)
    model = model_of(cfg)
    optimised = fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    assert_same_stages(model, optimised)
    assert len(taken) > 1


def test_without_compiled_kernels(cfg, monkeypatch):
    monkeypatch.setenv("FPN_EXT_COMPILED", "0")
    model = model_of(cfg)
    for tune in (True, False):
        optimised = fpn_ext.optimize_for_inference(model, tune=tune, typical_size=(64, 64))
        assert_same_stages(model, optimised)
        assert not any("Compiled" in type(m).__name__ for m in optimised.modules())


def test_a_layer_is_measured_once(cfg, choices, monkeypatch, caplog):
    caplog.set_level("INFO")
    model = build_model(cfg)
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    measured = json.loads(choices.read_text())
    assert any(key.startswith("3x3") for key in measured["layers"])
    assert all(time > 0 for times in measured["layers"].values() for time in times.values())
    kernels = "compiled kernels" if compiled.kernels() else "no compiled kernels"
    assert f"measured at 64x64, {kernels}" in caplog.text

    monkeypatch.setattr(choose, "_times", None)  # would fail if it was called
    model.backbone.forward = None
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    assert json.loads(choices.read_text()) == measured


def test_another_size_is_another_choice(cfg, choices):
    if not compiled.kernels():
        pytest.skip("without compiled kernels small layers have one way")
    model = build_model(cfg)
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    before = json.loads(choices.read_text())
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(96, 64))
    after = json.loads(choices.read_text())
    assert len(after["models"]) == 2 and set(before["layers"]) < set(after["layers"])


@pytest.mark.parametrize(
    "change", [lambda names: [*names, "direct"], lambda names: [[]] * len(names)]
)
def test_a_damaged_choice_is_measured_anew(cfg, choices, change):
    model = build_model(cfg)
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    known = json.loads(choices.read_text())
    ((digest, names),) = known["models"].items()
    choices.write_text(json.dumps({**known, "models": {digest: change(names)}}))
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    assert json.loads(choices.read_text()) == known


@pytest.mark.parametrize("text", ["", "[]", '{"layers": 3}', '{"layers": {}, "models": {"a": 1}}'])
def test_a_damaged_file_counts_as_none(cfg, choices, text):
    choices.write_text(text)
    model = build_model(cfg)
    fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    assert set(json.loads(choices.read_text())) == {"layers", "models"}


def test_a_folder_that_cannot_be_written(cfg, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(choose, "_cache_file", lambda: tmp_path / "file" / "choices.json")
    fpn_ext.optimize_for_inference(build_model(cfg), tune=True, typical_size=(64, 64))
    assert "what was measured is not kept for the next time" in caplog.text


def test_the_key_and_the_variable(cfg, monkeypatch, caplog):
    from fpn_ext.speed.optimize import model_for_inference

    caplog.set_level("INFO")
    cfg.MODEL.FPN_EXT.INFERENCE_DTYPE = "float32"
    model = build_model(cfg)
    cfg.MODEL.FPN_EXT.TUNE = False
    model_for_inference(cfg, model)
    assert "layers (by table" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FPN_EXT_TUNE", "0")
    fpn_ext.optimize_for_inference(model)
    assert "layers (by table" in caplog.text


def test_a_way_must_save_more_than_noise():
    assert choose.fastest({"direct": 1.0, "compiled winograd": 0.96}) == "direct"
    assert choose.fastest({"direct": 1.0, "compiled winograd": 0.9}) == "compiled winograd"


def test_weights_are_held_once(cfg):
    """An optimised model is no larger than the model: what a layer packed it holds instead."""
    cfg.MODEL.FPN.OUT_CHANNELS = 64  # whole panels
    model = build_model(cfg)
    optimised = fpn_ext.optimize_for_inference(model, tune=False)
    if not compiled.kernels():
        pytest.skip("no compiled kernels here")
    convolution = optimised.backbone.fpn_output2
    held = [*convolution.parameters(), *convolution.buffers()]
    assert sum(t.numel() for t in held) == 9 * 64 * 64 + 64
    assert floats_of(optimised) <= floats_of(model)


def floats_of(model):
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()])


def test_a_model_optimised_for_another_processor(cfg, monkeypatch):
    if not compiled.kernels():
        pytest.skip("no compiled kernels here")
    optimised = fpn_ext.optimize_for_inference(build_model(cfg), tune=False)
    convolution = optimised.backbone.fpn_output2
    x = torch.rand(1, convolution.outputs, 8, 8)
    convolution(x)
    monkeypatch.setenv("FPN_EXT_COMPILED", "0")
    with pytest.raises(RuntimeError, match="optimised with kernels compiled for another processor"):
        convolution(x)
    monkeypatch.undo()
    convolution.panel *= 2
    with pytest.raises(RuntimeError, match="call optimize_for_inference on the model"):
        convolution(x)


def always(name):
    return lambda times: name if name in times else next(iter(times))


def test_nothing_to_do(cfg, monkeypatch):
    """No box gets to the heads; their matrix is large enough for its columns to be divided."""
    if not compiled.kernels():
        pytest.skip("no compiled kernels here")
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
    monkeypatch.setattr(choose, "fastest", always("compiled product"))
    optimised = fpn_ext.optimize_for_inference(build_model(cfg), tune=True, typical_size=(64, 64))
    head = optimised.roi_heads.box_head
    assert any("Compiled" in type(layer).__name__ for layer in head)
    with torch.no_grad():
        assert head(torch.zeros(0, cfg.MODEL.FPN.OUT_CHANNELS, 7, 7)).shape == (0, 1024)


def test_under_autocast(cfg):
    """Where layers between get bfloat16, the compiled ones still compute in float32."""
    model = model_of(cfg)
    optimised = fpn_ext.optimize_for_inference(model, tune=False)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = optimised.backbone(image)
    with torch.no_grad():
        expected = model.backbone(image)
    for name, maps in expected.items():
        scale = maps.abs().max()
        torch.testing.assert_close(found[name].float() / scale, maps / scale, rtol=0, atol=0.1)


def test_chunks_of_another_size_are_measured_anew(cfg, choices):
    if not compiled.kernels():
        pytest.skip("no compiled kernels here")
    model = build_model(cfg)
    for chunk in (256, 4):
        fpn_ext.optimize_for_inference(model, boxes_per_chunk=chunk, tune=True)
    assert len(json.loads(choices.read_text())["models"]) == 2


def test_the_networks_of_a_library_are_left_as_they_are(cfg):
    """Their forward may read a layer's weights: torchvision's Swin does."""
    cfg.MODEL.FPN_EXT.BOTTOM_UP = "torchvision/swin_t"
    cfg.MODEL.FPN_EXT.KEEP_PIXELS = True
    model = build_model(cfg).eval()
    optimised = fpn_ext.optimize_for_inference(model, tune=True, typical_size=(64, 64))
    before, after = (m.backbone.bottom_up.state_dict() for m in (model, optimised))
    assert before.keys() == after.keys()
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 64)
        found, expected = optimised.backbone(image)["p3"], model.backbone(image)["p3"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_box_head_is_held_once(cfg):
    heads = fpn_ext.optimize_for_inference(build_model(cfg), tune=False).roi_heads
    assert [*heads.box_head.fcs] == [
        layer for layer in heads.box_head if layer in heads.box_head.fcs
    ]
    assert len(heads.box_head.fcs) == 2
