"""Training with Winograd convolution: the same gradients, parameters and checkpoints."""

import copy

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from fpn_ext.kernels import winograd
from fpn_ext.speed import winograd_training
from fpn_ext.speed.winograd_training import (
    PlainTrainableWinogradConv2d,
    TrainableWinogradConv2d,
    train_with_winograd,
)
from torch import nn
from torchvision.models import resnet18
from training_alike import assert_trains_alike

assert fpn_ext


@pytest.fixture(autouse=True)
def every_convolution_however_small(monkeypatch):
    monkeypatch.setattr(winograd, "SMALLEST_MAP", 0)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 8)
    monkeypatch.setattr(winograd_training, "FEWEST_TILES", 0)


def calls(monkeypatch):
    """Records the maps passed to the Winograd convolution."""
    seen, convolve = [], winograd_training.convolve
    monkeypatch.setattr(
        winograd_training,
        "convolve",
        lambda x, *rest, **more: seen.append(x.shape) or convolve(x, *rest, **more),
    )
    return seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [8, 16])  # 16: by the compiled kernel, where there is one
def test_gradients_of_the_direct_sums(memory_format, bias, channels, monkeypatch):
    norm = None if bias else nn.BatchNorm2d(16)
    direct = Conv2d(channels, 16, 3, padding=1, bias=bias, norm=norm, activation=F.relu_)
    quick = copy.deepcopy(direct)
    assert train_with_winograd(nn.Sequential(quick)) == 1
    seen = calls(monkeypatch)
    maps = torch.randn(2, channels, 9, 14)
    outputs, gradients = [], []
    for convolution in (direct.double(), quick):
        x = maps.to(convolution.weight.dtype, memory_format=memory_format).requires_grad_()
        y = convolution(x)
        (y * torch.arange(14.0)).sum().backward()
        outputs.append(y.detach().float())
        gradients.append([x.grad.float(), *(p.grad.float() for p in convolution.parameters())])
    assert seen == [(2, channels, 9, 14), (2, 16, 9, 14)], "forwards and backwards"
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert len(gradients[0]) == (3 if bias else 4)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)


def test_what_needs_no_gradient_gets_none(monkeypatch):
    convolution = Conv2d(8, 8, 3, padding=1)
    train_with_winograd(nn.Sequential(convolution))
    seen, x = calls(monkeypatch), torch.randn(1, 8, 5, 5)
    convolution(x).sum().backward()
    assert len(seen) == 1 and x.grad is None and convolution.weight.grad is not None
    convolution.requires_grad_(False)
    convolution(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_second_derivative_is_refused():
    convolution = Conv2d(8, 8, 3, padding=1)
    train_with_winograd(nn.Sequential(convolution))
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(convolution(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative here: set .*\.WINOGRAD False"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "how",
    ["autocast", "half", "small", "compiled"],
)
def test_where_it_computes_as_before(how, monkeypatch):
    convolution = Conv2d(8, 8, 3, padding=1)
    train_with_winograd(nn.Sequential(convolution))
    seen, x = calls(monkeypatch), torch.randn(1, 8, 5, 5)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            convolution(x)
    elif how == "half":
        convolution.bfloat16()(x.bfloat16())
    elif how == "small":
        monkeypatch.setattr(winograd, "SMALLEST_MAP", 33)  # 2 x 2 tiles, 8 channels
        convolution(x)
    else:
        torch.export.export(convolution, (x,))
    assert not seen


def test_a_detector_trains_alike(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    direct = build_model(small_cfg)
    quick = copy.deepcopy(direct)
    count = train_with_winograd(quick)
    # RPN, outputs of P2..P5, in ResNet-18 all 3x3 convolutions of stride 1: 16 less 3.
    assert count == 1 + 4 + 13
    assert sum(isinstance(m, TrainableWinogradConv2d) for m in quick.modules()) == count
    assert quick.state_dict().keys() == direct.state_dict().keys()
    assert_trains_alike(direct, quick)


def test_a_detector_on_a_librarys_network_trains_alike(small_cfg):
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "torchvision/resnet18"
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP_NORM = "FrozenBN"
    small_cfg.MODEL.FPN_EXT.KEEP_PIXELS = True
    direct = build_model(small_cfg)
    quick = build_model(small_cfg)  # older torchvision's networks lose a graph when copied
    quick.load_state_dict(direct.state_dict())
    assert train_with_winograd(quick) == 1 + 4 + 13
    assert sum(isinstance(m, PlainTrainableWinogradConv2d) for m in quick.modules()) == 13
    assert quick.state_dict().keys() == direct.state_dict().keys()
    assert_trains_alike(direct, quick)
    modes = [module.training for module in quick.modules()]
    optimised = fpn_ext.optimize_for_inference(quick, tune=False)
    assert [module.training for module in quick.modules()] == modes
    assert not any(isinstance(m, PlainTrainableWinogradConv2d) for m in optimised.modules())


def test_a_network_of_a_library_has_the_gradients_of_the_direct_sums():
    """With the statistics of the batch. SiLU in place of ReLU, whose corner rounding may pass."""
    direct = resnet18(weights=None)
    for module in list(direct.modules()):
        if hasattr(module, "relu"):
            module.relu = nn.SiLU()
    quick = copy.deepcopy(direct)
    assert train_with_winograd(quick) == 13
    images, found = torch.rand(2, 3, 96, 128) * 2 - 1, []
    for network in (direct.double(), quick):
        y = network(images.to(network.conv1.weight.dtype))
        (y * torch.arange(1000.0)).sum().backward()
        found.append([parameter.grad.float() for parameter in network.parameters()])
    for expected, gradient in zip(*found, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(gradient / scale, expected / scale, rtol=0, atol=3e-4)
