"""1x1 convolutions with a stride in channels_last memory: computed on the pixels they read."""

import copy

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from fpn_ext.bottom_up.strided_pointwise import PLAIN, subsample_first
from torch import nn


def strided(kind=nn.Conv2d, channels=3, **more):
    return kind(channels, 4, 1, stride=2, **more)


@pytest.mark.parametrize(
    "convolution",
    [
        strided(),
        strided(bias=False),
        nn.Conv2d(4, 8, 1, stride=(3, 1), groups=2),
        strided(Conv2d, norm=FrozenBatchNorm2d(4), activation=F.relu_),
        strided(Conv2d),
    ],
    ids=str,
)
def test_the_same_function_and_gradients_with_stride_1(convolution, monkeypatch):
    changed = copy.deepcopy(convolution)
    assert subsample_first(nn.Sequential(changed)) == 1
    assert changed.state_dict().keys() == convolution.state_dict().keys()
    maps, results, strides = torch.randn(2, convolution.in_channels, 5, 6), [], []
    conv2d = F.conv2d

    def recorded(x, weight, bias=None, stride=1, *rest, **more):
        strides.append(stride)
        return conv2d(x, weight, bias, stride, *rest, **more)

    monkeypatch.setattr(F, "conv2d", recorded)
    for module in (convolution.double(), changed):
        x = maps.to(module.weight.dtype).requires_grad_()
        y = module(x)
        (y * torch.arange(float(y.shape[3]))).sum().backward()
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        results.append([t.float() for t in (y.detach(), x.grad, *gradients)])
    assert strides == [convolution.stride, 1]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_others_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(3, 4, 1, stride=2, padding=1),
        strided(channels=16),
        strided(type("OwnConv2d", (nn.Conv2d,), {})),
    )
    assert subsample_first(model) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_pyramid_in_channels_last_memory_has_them(small_cfg, channels_last):
    pytest.importorskip("timm")
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = "timm/repvgg_a0"
    small_cfg.MODEL.FPN_EXT.KEEP_PIXELS = True
    small_cfg.MODEL.FPN_EXT.CHANNELS_LAST = channels_last
    model = build_model(small_cfg)
    count = sum(type(module) in PLAIN for module in model.modules())
    assert count == (1 if channels_last else 0)
    optimised = fpn_ext.optimize_for_inference(model, tune=False)
    assert not any(type(module) in PLAIN for module in optimised.modules())
