"""Copies from one memory layout to the other."""

import pytest
import torch
from fpn_ext import layouts

NCHW, NHWC = torch.contiguous_format, torch.channels_last
DIRECTIONS = [(layouts.to_channels_last, NCHW, NHWC), (layouts.to_contiguous, NHWC, NCHW)]


@pytest.mark.parametrize("convert, given, wanted", DIRECTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 4, 6), (3, 4, 1, 1), (0, 4, 3, 3)])
@pytest.mark.parametrize("block", [1, 11, 10**6])
def test_every_number_arrives(monkeypatch, convert, given, wanted, shape, block):
    monkeypatch.setattr(layouts, "BLOCK", block)
    monkeypatch.setattr(layouts, "BLOCK_BACK", block)
    x = torch.randn(shape).contiguous(memory_format=given)
    kept = x.clone()
    y = convert(x)
    assert y.is_contiguous(memory_format=wanted)
    assert torch.equal(y, kept) and torch.equal(x, kept)


@pytest.mark.parametrize("convert, given, wanted", DIRECTIONS)
def test_what_is_laid_out_so_already_is_not_copied(convert, given, wanted):
    x = torch.randn(1, 3, 4, 5).contiguous(memory_format=wanted)
    assert convert(x) is x


@pytest.mark.parametrize("convert, given, wanted", DIRECTIONS)
def test_a_part_of_maps_in_neither_layout(monkeypatch, convert, given, wanted):
    monkeypatch.setattr(layouts, "BLOCK", 1)
    x = torch.randn(2, 8, 6, 6)[:, ::2, 1:4]
    assert torch.equal(convert(x), x)
    assert convert(x).is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("convert, given, wanted", DIRECTIONS)
def test_large_maps_are_copied_in_blocks(monkeypatch, convert, given, wanted):
    monkeypatch.setattr(layouts, "BLOCK", 40)
    monkeypatch.setattr(layouts, "BLOCK_BACK", 40)
    sizes = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: sizes.append(len(b)) or copy(a, b))
    convert(torch.randn(2, 10, 3, 3).contiguous(memory_format=given))
    assert sizes == [4, 4, 1] * 2  # pixels of 10 channels
