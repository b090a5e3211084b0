"""Memory of large results: as torch's in all but its pages, and given back."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fpn_ext.kernels import large
from fpn_ext.kernels.compiled import kernels

ELEMENTS = large.FROM_BYTES // 4  # float32
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def huge_mb():
    found = re.findall(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps").read_text())
    return sum(map(int, found)) / 1024


@pytest.mark.parametrize("height", [8, ELEMENTS // (64 * 128)], ids=["small", "large"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_shape_and_strides_are_torchs(height, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    expected = torch.empty((1, 64, height, 128), memory_format=memory_format)
    found = large.empty((1, 64, height, 128), channels_last)
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=memory_format)
    assert large.empty((2, ELEMENTS), dtype=torch.float64).dtype == torch.float64


@pytest.mark.skipif(
    not PAGES.is_file() or "[never]" in PAGES.read_text(), reason="the system has no large pages"
)
def test_the_pages_are_large():
    before = huge_mb()
    tensor = large.empty((2 * ELEMENTS,)).fill_(1)
    assert huge_mb() - before > 32  # of 64 MB; pages at both ends may be small
    del tensor
    assert huge_mb() - before < 32


def test_memory_lives_as_long_as_its_tensors_and_no_longer():
    before = resident_mb()
    part = large.empty((2 * ELEMENTS,)).fill_(3)[-5:]
    assert part.tolist() == [3.0] * 5  # a view keeps it
    del part
    for _ in range(20):  # 64 MB each
        large.empty((2 * ELEMENTS,)).fill_(1)
    assert resident_mb() - before < 100


@pytest.mark.parametrize("count", [8, ELEMENTS])
def test_on_the_cpu_whatever_torchs_device_is(count):
    with torch.device("meta"):
        assert large.empty((count,)).device.type == "cpu"


def test_torchs_memory_where_there_are_no_such_pages(monkeypatch):
    class WithoutAdvice:
        def __init__(self, *args, **kwargs):
            pass

        def madvise(self, advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("mmap.mmap", WithoutAdvice)
    assert large.empty((2 * ELEMENTS,)).fill_(2).sum() == 4 * ELEMENTS


@pytest.mark.skipif(kernels() is None, reason="not compiled here")
def test_a_large_convolution_is_torchs():
    """P2 of a photograph, whose results and gradients are in such memory."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 800, 700).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3)
    found = kernels().convolve(x, kernels().pack_filters(weight), 16)
    assert found.numel() * 4 > large.FROM_BYTES
    expected = F.conv2d(x, weight, padding=1)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    found.add_(1).relu_()  # may be written to as any other
