"""Winograd convolution against torch's, and against hand-computed sums."""

import threading

import fpn_ext
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from fpn_ext.kernels import winograd
from fpn_ext.kernels.winograd import WinogradConv2d

assert fpn_ext


@pytest.fixture(autouse=True)
def every_map_however_small(monkeypatch):
    monkeypatch.setattr(winograd, "SMALLEST_MAP", 0)


def test_counting_neighbours_by_hand():
    """Ones under a filter of ones: 9 inside, 6 on an edge, 4 in a corner."""
    counted = WinogradConv2d(torch.ones(1, 1, 3, 3), None)(torch.ones(1, 1, 3, 4))
    expected = torch.tensor([[[[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]]])
    torch.testing.assert_close(counted, expected, rtol=0, atol=1e-5)


def test_each_tap_looks_where_it_should():
    image = torch.arange(30.0).view(1, 1, 5, 6)
    for y in range(3):
        for x in range(3):
            weight = torch.zeros(1, 1, 3, 3)
            weight[0, 0, y, x] = 1
            found = WinogradConv2d(weight, None)(image)
            expected = F.pad(image, (1, 1, 1, 1))[:, :, y : y + 5, x : x + 6]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (8, 64), (25, 42), (33, 130), (60, 4)])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_as_exact_as_the_direct_sums(monkeypatch, size, batch, bias):
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", 40)  # several strips
    weight = torch.randn(24, 16, 3, 3) / 12
    b = torch.randn(24) if bias else None
    x = torch.randn(batch, 16, *size).contiguous(memory_format=torch.channels_last)
    found = WinogradConv2d(weight, b)(x)
    assert found.shape == (batch, 24, *size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), padding=1)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_relu_and_plain_memory():
    weight, b, x = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(2, 8, 9, 10)
    found = WinogradConv2d(weight, b, relu=True)(x)
    assert (found == 0).any()
    torch.testing.assert_close(found, F.relu(F.conv2d(x, weight, b, padding=1)), atol=1e-4, rtol=0)


def test_one_call_leaves_nothing_for_the_next():
    """The strip buffer is reused: border values left by a larger map must not leak."""
    small, large = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 70, 90)
    convolution = WinogradConv2d(torch.randn(8, 8, 3, 3), None)
    before = convolution(small)
    convolution(large * 1000)
    assert torch.equal(convolution(small), before)
    for order in (torch.inference_mode(), torch.no_grad()):
        with order:
            assert torch.equal(convolution(small), before)


def test_what_inference_mode_made_serves_outside_of_it(monkeypatch):
    monkeypatch.setattr(winograd, "_memory", threading.local())
    convolution, x = WinogradConv2d(torch.randn(8, 8, 3, 3), None), torch.randn(1, 8, 9, 9)
    with torch.inference_mode():
        inside = convolution(x)
    assert torch.equal(convolution(x), inside)


def test_any_number_of_threads_gives_the_same_bits(number_of_threads, monkeypatch):
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", 5)
    convolution = WinogradConv2d(torch.randn(16, 8, 3, 3), torch.randn(16))
    x = torch.randn(2, 8, 37, 22)
    found = []
    for count in (1, 2, 5):
        number_of_threads(count)
        found.append(convolution(x))
        with torch.inference_mode():
            found.append(convolution(x))
    assert all(torch.equal(found[0], other) for other in found)


def test_small_maps_are_convolved_directly(monkeypatch):
    monkeypatch.setattr(winograd, "SMALLEST_MAP", 17)
    weight, b = torch.randn(8, 8, 3, 3), torch.randn(8)
    x = torch.randn(1, 8, 4, 8)  # two tiles, 8 channels
    monkeypatch.delattr(winograd, "_workspace")  # none is made
    found = WinogradConv2d(weight, b, relu=True)(x)
    torch.testing.assert_close(found, F.relu(F.conv2d(x, weight, b, padding=1)))


@pytest.mark.parametrize(
    "change, served",
    [
        ({}, True),
        ({"kernel_size": 1, "padding": 0}, False),
        ({"stride": 2}, False),
        ({"padding": 0}, False),
        ({"dilation": 2, "padding": 2}, False),
        ({"groups": 2}, False),
        ({"out_channels": 128}, False),
        ({"padding_mode": "reflect"}, False),
        ({"dtype": torch.bfloat16}, False),
    ],
)
def test_what_it_serves(change, served):
    arguments = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1, **change}
    assert winograd.serves(Conv2d(**arguments)) is served


def test_wrong_weight():
    with pytest.raises(ValueError, match="3, 3"):
        WinogradConv2d(torch.zeros(4, 4, 5, 5), None)
