"""Norms of library networks, folded for inference: what is folded, and what must stay."""

import copy

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from fpn_ext.speed.library_norms import with_folded_norms
from torch import nn

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


class Net(nn.Module):
    """A 1x1 convolution of one channel, 2 x + 1, a norm, (y - 5) / 2 * 6 + 7, and a function."""

    def __init__(self, forward, norm=nn.BatchNorm2d):
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 1)
        self.norm, self.relu = norm(1, eps=0), nn.ReLU(inplace=True)
        self.steps = forward
        with torch.no_grad():
            self.convolution.weight.fill_(2), self.convolution.bias.fill_(1)
            self.norm.running_mean.fill_(5), self.norm.running_var.fill_(4)
            self.norm.weight.fill_(6), self.norm.bias.fill_(7)
        self.eval().requires_grad_(False)

    def forward(self, x):
        return {"out": self.steps(self, x)}


def in_turn(net, x):
    return net.norm(net.convolution(x))


IMAGE = torch.arange(-4.0, 5.0).reshape(1, 1, 3, 3)


@pytest.mark.parametrize("norm", NORMS)
def test_by_hand(norm):
    """(2 x + 1 - 5) / 2 * 6 + 7 = 6 x - 5."""
    net = Net(in_turn, norm)
    folded = with_folded_norms(net, IMAGE)
    assert folded is not net and isinstance(folded.norm, nn.Identity)
    assert type(folded.convolution) is Conv2d
    assert (folded.convolution.weight.item(), folded.convolution.bias.item()) == (6, -5)
    assert torch.equal(folded(IMAGE)["out"], 6 * IMAGE - 5)
    assert isinstance(net.norm, norm) and net.convolution.weight.item() == 2, "left as it was"


ONE_STAYS = {
    "written to in between": lambda net, x: net.norm(net.relu(net.convolution(x))),
    "a function in between": lambda net, x: net.norm(net.convolution(x).abs()),
    "once without the norm": lambda net, x: net.norm(net.convolution(x)) + net.convolution(x),
    "the norm twice": lambda net, x: net.norm(net.norm(net.convolution(x))),
    "by a function": lambda net, x: net.norm(F.conv2d(x, net.convolution.weight)),
}
ALL_STAY = {
    "a sum reads it too": lambda net, x: net.norm(y := net.convolution(x)) + y,
    "weights are read": lambda net, x: in_turn(net, x) + net.convolution.weight.sum(),
    "their dtype is read": lambda net, x: in_turn(net, x.to(net.convolution.weight.dtype)),
}


@pytest.mark.parametrize("steps", ONE_STAYS.values(), ids=ONE_STAYS)
def test_norms_that_do_not_read_a_convolution_alone_stay(steps):
    net = Net(steps)
    net.convolution_2, net.norm_2 = (copy.deepcopy(m) for m in (net.convolution, net.norm))
    net.steps = lambda net, x: steps(net, net.norm_2(net.convolution_2(x)))
    folded = with_folded_norms(net, IMAGE)
    assert isinstance(folded.norm_2, nn.Identity) and isinstance(folded.norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(IMAGE)["out"], net(IMAGE)["out"])


@pytest.mark.parametrize("steps", (ONE_STAYS | ALL_STAY).values(), ids=ONE_STAYS | ALL_STAY)
def test_what_else_reads_a_convolution_keeps_its_norm(steps):
    net = Net(steps)
    assert with_folded_norms(net, IMAGE) is net


def test_statistics_of_the_batch_are_not_folded():
    net = Net(in_turn)
    net.norm.train()
    assert with_folded_norms(net, IMAGE) is net


def test_other_norms_and_convolutions():
    net = Net(in_turn)
    net.norm = nn.GroupNorm(1, 1)
    assert with_folded_norms(net, IMAGE) is net
    net = Net(in_turn)
    net.convolution.__class__ = type("OwnConv2d", (nn.Conv2d,), {})
    assert with_folded_norms(net, IMAGE) is net


NETWORKS = {  # and how many of their norms stay
    "torchvision/resnet18": 0,
    "torchvision/mobilenet_v3_small": 0,
    "torchvision/shufflenet_v2_x0_5": 0,
    "torchvision/densenet121": None,  # its norms come before the convolutions
    "torchvision/swin_t": 0,  # has none
    "torchvision/inception_v3": 0,  # takes no small images
    "timm/tf_efficientnet_lite0": 5,  # behind timm's own convolutions
    "timm/ghostnet_050": 0,
}


MEASURED = ("torchvision/resnet18", "timm/tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("network", "tune"), [*((n, False) for n in NETWORKS), *((n, True) for n in MEASURED)]
)
def test_an_optimised_detector_on_a_librarys_network(small_cfg, network, tune):
    if network.startswith("timm/"):
        pytest.importorskip("timm")
    small_cfg.MODEL.FPN_EXT.BOTTOM_UP = network
    small_cfg.MODEL.FPN_EXT.KEEP_PIXELS = True
    model = build_model(small_cfg).eval()
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        if "running_mean" in name:
            tensor.normal_(0, 0.1)
        if "running_var" in name:
            tensor.uniform_(0.8, 1.2)
    optimised = fpn_ext.optimize_for_inference(model, tune=tune, typical_size=(160, 160))
    stay = sum(hasattr(m, "running_mean") for m in optimised.backbone.bottom_up.modules())
    if NETWORKS[network] is not None:
        assert stay == NETWORKS[network]
    image = torch.randn(2, 3, 96, 128)
    if network == "torchvision/inception_v3":
        image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected, found = model.backbone(image), optimised.backbone(image)
    for name, features in expected.items():
        limit = 1e-4 * features.abs().max().item()
        torch.testing.assert_close(found[name], features, rtol=0, atol=limit)
    with torch.no_grad():
        copy.deepcopy(optimised)(
            [{"image": torch.rand(3, 70, 90) * 255, "height": 70, "width": 90}]
        )
