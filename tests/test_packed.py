"""Layers whose weights oneDNN holds give what torch's own give, and can be copied and pickled."""

import copy
import io

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from fpn_ext.speed import choose, packed
from fpn_ext.speed.layers import CONVOLUTIONS, FULLY_CONNECTED, SUMS, FullyConnected
from fpn_ext.speed.optimize import model_for_inference
from fpn_ext.speed.residuals import DirectSum, has_bfloat16_convolutions
from test_optimize import model_of

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    if request.param == torch.bfloat16 and not has_bfloat16_convolutions():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    return request.param


def whole(*shape):
    """Whole numbers of which sums are exact in either dtype."""
    return torch.randint(-2, 3, shape).float()


def convolution(dtype, *args, relu=False, **kwargs):
    made = Conv2d(*args, activation=F.relu_ if relu else None, **kwargs)
    for parameter in made.parameters():
        parameter.data = whole(*parameter.shape)
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
        {"kernel_size": (7, 5), "padding": (3, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "groups": 16},
    ],
    ids=str,
)
def test_a_convolution(dtype, settings, relu):
    layer = convolution(dtype, 16, 32, relu=relu, **settings)
    made = CONVOLUTIONS["packed"].make(layer)
    for size in [(2, 9, 7), (1, 1, 1), (0, 4, 4)]:
        x = whole(size[0], 16, *size[1:]).to(dtype)
        found = made(x)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize("owned", [True, False])
def test_a_sum(dtype, owned):
    layer = convolution(dtype, 16, 8, kernel_size=3, padding=1)
    x, shortcut = whole(2, 16, 5, 6).to(dtype), whole(2, 8, 5, 6).to(dtype)
    expected = F.relu(layer(x) + shortcut)
    last = torch.channels_last
    for given in (shortcut.clone(), shortcut.clone().contiguous(memory_format=last)):
        assert torch.equal(SUMS["packed"].make(layer)(x, given, owned), expected)
        if not owned:
            assert torch.equal(given, shortcut)


@pytest.mark.parametrize("relu", [True, False])
def test_a_fully_connected_layer(dtype, relu):
    linear = torch.nn.Linear(24, 10)
    linear.weight.data, linear.bias.data = whole(10, 24), whole(10)
    layer = FullyConnected(linear.to(dtype))
    layer.relu = relu
    made = FULLY_CONNECTED["packed"].make(layer)
    for rows in (5, 1, 0):
        x = whole(rows, 24).to(dtype)
        assert torch.equal(made(x), layer(x))


def test_copies_and_pickles(dtype):
    layer = convolution(dtype, 16, 32, kernel_size=3, padding=1, relu=True)
    made, x = CONVOLUTIONS["packed"].make(layer), whole(1, 16, 6, 6).to(dtype)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for again in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), made(x))
        assert again.packed.is_mkldnn and again.packed is not made.packed


def test_under_autocast(dtype):
    """What comes in another dtype is computed in the layer's."""
    layer = convolution(dtype, 16, 8, kernel_size=1)
    x = whole(1, 16, 3, 3)
    for given in (x.bfloat16(), x.float()):
        assert torch.equal(CONVOLUTIONS["packed"].make(layer)(given), layer(x.to(dtype)))


@pytest.mark.parametrize(
    "other", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_other_paddings_stay_torchs(other):
    assert not packed.PackedConvolution.serves(torch.nn.Conv2d(16, 16, 3, **other))
    assert packed.PackedConvolution.serves(torch.nn.Conv2d(16, 16, 3, padding=1))


def test_what_onednn_does_not_hold(monkeypatch):
    assert not packed.serves(torch.nn.Linear(4, 4).double())
    assert not packed.serves(torch.nn.Linear(4, 4).half())
    monkeypatch.setattr(packed, "has_bfloat16_convolutions", lambda: False)
    assert not packed.serves(torch.nn.Linear(4, 4).bfloat16())
    assert packed.serves(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("way", ["packed", "direct"])
def test_a_model_in_bfloat16(small_cfg, monkeypatch, tmp_path, way):
    """Each layer takes the way that is the fastest; a copy finds the same."""
    if not has_bfloat16_convolutions():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    monkeypatch.setattr(choose, "_cache_file", lambda: tmp_path / "choices.json")
    monkeypatch.setattr(choose, "fastest", lambda times: way if way in times else "torch")
    model = model_of(small_cfg)
    optimised = fpn_ext.optimize_for_inference(
        model, torch.bfloat16, tune=True, typical_size=(64, 64)
    )
    assert any("Packed" in type(m).__name__ for m in optimised.modules()) == (way == "packed")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = model.backbone(image), optimised.backbone(image)
        again = copy.deepcopy(optimised).backbone(image)
    for name, features in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name] - features).norm() < 0.02 * features.norm(), name
        assert torch.equal(again[name], found[name])


def optimised(cfg, dtype=torch.float32, **kwargs):
    return fpn_ext.optimize_for_inference(model_of(cfg), dtype, tune=False, **kwargs)


def test_state_dicts_are_whole(small_cfg, dtype):
    """Another's weights give what the other gives; as many floats as the model has."""
    first, second = (optimised(small_cfg, dtype) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 1
        image = torch.rand(1, 3, 64, 64)
        assert not torch.equal(first.backbone(image)["p2"], second.backbone(image)["p2"])
        first.load_state_dict(second.state_dict())
        assert torch.equal(first.backbone(image)["p2"], second.backbone(image)["p2"])


def test_state_dicts_of_packed_weights(dtype):
    one, other = (
        CONVOLUTIONS["packed"].make(convolution(dtype, 16, 8, kernel_size=3, padding=1))
        for _ in range(2)
    )
    x = whole(1, 16, 5, 5).to(dtype)
    state = other.state_dict()
    assert state["weight"].shape == (8, 16, 3, 3) and not state["weight"].is_mkldnn
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(state)
    assert torch.equal(one(x), other(x))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        one.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        one.load_state_dict({**state, "weight": state["weight"][:, :4]})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"more\""):
        one.load_state_dict({**state, "more": state["bias"]})


def test_memory_formats_change_nothing(small_cfg, dtype):
    """Nor does what Module.to leaves as it is."""
    model, image = optimised(small_cfg, dtype), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone(image)["p3"]
        for memory_format in (torch.channels_last, torch.contiguous_format):
            again = copy.deepcopy(model).to(memory_format=memory_format).to("cpu")
            assert torch.equal(again.backbone(image)["p3"], expected)


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.half(), lambda m: m.to("meta")]
)
def test_it_stays_what_it_was_optimised_for(small_cfg, dtype, change):
    with pytest.raises(
        RuntimeError, match=r"came from optimize_for_inference in torch\.\w+ on a CPU"
    ):
        change(optimised(small_cfg, dtype))


def test_a_pickle_where_onednn_has_no_bfloat16(monkeypatch):
    if not has_bfloat16_convolutions():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    made = CONVOLUTIONS["packed"].make(convolution(torch.bfloat16, 16, 8, kernel_size=1))
    monkeypatch.setattr(packed, "has_bfloat16_convolutions", lambda: False)
    with pytest.raises(RuntimeError, match=r"optimised in torch\.bfloat16 for a processor .* here"):
        copy.deepcopy(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(small_cfg, value, caplog):
    """oneDNN's ReLU makes NaN 0: what such a model finds would be invented."""
    model = model_of(small_cfg)
    name = "backbone.bottom_up.res3.0.conv1.weight"
    model.get_parameter(name).data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"{name} is not finite: the training .* diverged"):
        fpn_ext.optimize_for_inference(model)
    small_cfg.MODEL.FPN_EXT.INFERENCE_DTYPE = "float32"
    assert model_for_inference(small_cfg, model) is model
    assert f"{name} is not finite" in caplog.text and "the model as it is" in caplog.text


def test_what_norms_read_is_a_weight_and_a_mask_is_not(small_cfg):
    model = model_of(small_cfg)
    model.backbone.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    fpn_ext.optimize_for_inference(model, tune=False)
    model.backbone.mask[0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone\.mask is not finite"):
        fpn_ext.optimize_for_inference(model)
    model.backbone.mask[0] = 0
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    model.get_buffer(name)[3] = float("inf")
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        fpn_ext.optimize_for_inference(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(small_cfg, value):
    model, good = optimised(small_cfg), {"image": torch.zeros(3, 64, 64)}
    bad = {"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}
    bad["image"][1, 2, 3] = value
    with torch.no_grad():
        model([good, {"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
        with pytest.raises(ValueError, match="image 1 of the batch has pixels that are not finite"):
            model([good, bad])
        with pytest.raises(ValueError, match=r"a\.png has pixels that are not finite"):
            model([{**bad, "file_name": "a.png"}])


@pytest.mark.parametrize("size", [(1, 1), (4, 4)])
@pytest.mark.parametrize("inputs", [1, 8])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kernel", [1, 3])
def test_direct_sums_that_onednn_cannot_fuse(dtype, size, inputs, memory_format, kernel):
    layer = convolution(dtype, inputs, 8, kernel_size=kernel, padding=kernel // 2)
    layer = layer.to(memory_format=memory_format)
    x, shortcut = whole(1, inputs, *size).to(dtype), whole(1, 8, *size).to(dtype)
    x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    expected = F.relu(layer(x) + shortcut)
    assert torch.equal(DirectSum(layer)(x, shortcut, True), expected)
