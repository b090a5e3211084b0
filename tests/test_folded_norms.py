"""Training with frozen norms folded into convolutions: same gradients, parameters, checkpoints."""

import copy

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from fpn_ext.engine.trainer import Trainer
from fpn_ext.speed.folded_norms import FoldedConv2d, fold_frozen_norms
from fpn_ext.speed.winograd_training import TrainableWinogradConv2d, train_with_winograd
from torch import nn
from training_alike import assert_trains_alike


def frozen(channels):
    norm = FrozenBatchNorm2d(channels)
    for buffer in (norm.weight, norm.bias, norm.running_mean):
        buffer.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("activation", [None, F.relu_])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [{"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}])
def test_the_same_function(shape, bias, activation):
    norm = frozen(8)
    two_steps = Conv2d(4, 8, 3, bias=bias, norm=norm, activation=activation, **shape).double()
    one_step = copy.deepcopy(two_steps)
    assert fold_frozen_norms(nn.Sequential(one_step)) == 1
    maps = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    found = []
    for convolution in (two_steps, one_step):
        x = maps.clone().requires_grad_()
        y = convolution(x)
        (y * torch.arange(y.shape[3])).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in convolution.parameters())])
    assert len(found[0]) == 3 + bias
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """Filter 3, variance 4, mean 5, weight 6, bias 7: y = (3 x - 5) / 2 * 6 + 7 = 9 x - 8."""
    convolution = Conv2d(1, 1, 1, bias=False, norm=FrozenBatchNorm2d(1, eps=0.0))
    convolution.weight.data.fill_(3)
    for buffer, value in (("running_var", 4), ("running_mean", 5), ("weight", 6), ("bias", 7)):
        getattr(convolution.norm, buffer).fill_(value)
    fold_frozen_norms(nn.Sequential(convolution))
    assert type(convolution) is FoldedConv2d
    assert convolution(torch.full((1, 1, 1, 1), 2.0)).item() == 10


def test_norms_that_learn_and_other_convolutions_stay():
    model = nn.Sequential(
        Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4)),
        Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3),
        FrozenBatchNorm2d(4),
    )
    kinds = [type(module) for module in model]
    assert fold_frozen_norms(model) == 0
    assert [type(module) for module in model] == kinds


def test_a_norm_taken_away_afterwards():
    convolution = Conv2d(4, 4, 1, norm=frozen(4))
    fold_frozen_norms(nn.Sequential(convolution))
    convolution.norm, x = None, torch.randn(1, 4, 2, 2)
    assert torch.equal(convolution(x), F.conv2d(x, convolution.weight, convolution.bias))


def test_a_detector_trains_alike(small_cfg):
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    two_steps = build_model(small_cfg)
    for module in two_steps.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.1)
    one_step = copy.deepcopy(two_steps)
    # ResNet-18: the stem, 16 in the blocks, and the 3 that fit res3..res5's shortcuts.
    assert fold_frozen_norms(one_step) == 20
    assert train_with_winograd(one_step) == 0, "of fewer channels than it is for"
    assert one_step.state_dict().keys() == two_steps.state_dict().keys()
    assert_trains_alike(two_steps, one_step)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("winograd", [False, True])
def test_the_switches_of_train_net(small_cfg, monkeypatch, fold, winograd):
    monkeypatch.setattr("fpn_ext.kernels.winograd.FEWEST_CHANNELS", 8)
    small_cfg.MODEL.FPN_EXT.FOLD_NORMS = fold
    small_cfg.MODEL.FPN_EXT.WINOGRAD = winograd
    modules = [type(module) for module in Trainer.build_model(small_cfg).modules()]
    assert (FoldedConv2d in modules) == fold
    assert (TrainableWinogradConv2d in modules) == winograd


def test_what_was_folded_for_training_is_folded_for_inference(small_cfg):
    model = build_model(small_cfg).eval()
    folded = copy.deepcopy(model)
    fold_frozen_norms(folded)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = fpn_ext.optimize_for_inference(model).backbone(x)
        found = fpn_ext.optimize_for_inference(folded).backbone(x)
    assert all(torch.equal(found[name], maps) for name, maps in expected.items())
