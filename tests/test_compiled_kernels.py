"""The kernels in C against torch's operators, where a compiler made them; and without them."""

import os
import stat

import fpn_ext  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from fpn_ext.kernels import compiled, roi_align_cpu
from fpn_ext.kernels.compiled import build, operators
from torchvision.ops import roi_align


@pytest.fixture
def kernels():
    found = compiled.kernels()
    if found is None:
        pytest.skip("no compiled kernels here: fpn-ext doctor --compile says why")
    return found


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# 3x3 convolutions


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (33, 18)])
@pytest.mark.parametrize("channels, outputs", [(16, 48), (64, 32)])
@pytest.mark.parametrize("bias, relu", [(True, True), (False, False)])
def test_convolutions_are_the_direct_sums(kernels, size, channels, outputs, bias, relu):
    x, weight = maps(2, channels, *size), torch.randn(outputs, channels, 3, 3) / channels**0.5
    shift = torch.randn(outputs) if bias else None
    filters = kernels.pack_filters(weight)
    found = kernels.convolve(x, filters, outputs, shift, relu)
    direct = F.conv2d(x.double(), weight.double(), None if shift is None else shift.double(), 1, 1)
    expected = F.relu(direct) if relu else direct
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_filters_turned_give_the_gradient_of_the_input(kernels, memory):
    x, weight = maps(1, 32, 9, 9).requires_grad_(), torch.randn(48, 32, 3, 3)
    weight = weight.contiguous(memory_format=memory)
    direct, grad = F.conv2d(x, weight, None, 1, 1), maps(1, 48, 9, 9)
    expected = torch.autograd.grad(direct, x, grad)[0]
    found = kernels.convolve(grad, kernels.pack_filters(weight, turned=True), 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (33, 18)])
@pytest.mark.parametrize("channels, outputs", [(16, 48), (64, 32)])
@pytest.mark.parametrize("at_once", [1 << 16, 1 << 9])  # all tiles; some
def test_the_gradient_of_filters_is_the_direct_sums(
    kernels, size, channels, outputs, at_once, monkeypatch
):
    monkeypatch.setattr(operators, "GRADIENT_TILES", at_once)
    x, grad = maps(2, channels, *size), maps(2, outputs, *size)
    weight = torch.zeros(outputs, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    direct = F.conv2d(x.double(), weight, None, 1, 1)
    expected = torch.autograd.grad(direct, weight, grad.double())[0]
    found = kernels.filter_gradient(x, grad)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Sums of 2 H W products, each about 1.
    tolerance = 3e-5 * (2 * size[0] * size[1]) ** 0.5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("images", [1, 2, 30])
def test_few_tiles_and_many_give_the_same_bits(kernels, images):
    """Of few, the outputs are divided among the threads; of many, the tiles are."""
    x, filters = maps(images, 32, 13, 18), kernels.pack_filters(torch.randn(64, 32, 3, 3))
    alone = [kernels.convolve(one[None], filters, 64) for one in x]
    assert torch.equal(kernels.convolve(x, filters, 64), torch.cat(alone))


def test_any_number_of_threads_gives_the_same_bits(kernels):
    x, filters = maps(2, 16, 50, 40), kernels.pack_filters(torch.randn(32, 16, 3, 3))
    panels, features = kernels.pack_matrix(torch.randn(40, 700)), torch.randn(50, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (kernels.convolve(x, filters, 32), kernels.product(features, panels, 40))
            )
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_a_relu_keeps_what_is_not_a_number(kernels):
    panels = kernels.pack_matrix(torch.eye(2))
    found = kernels.product(torch.tensor([[float("nan"), -1.0]]), panels, 2, None, relu=True)
    assert torch.isnan(found).any()


def test_whole_vectors_of_channels_alone(kernels):
    assert kernels.can_convolve(4 * kernels.lanes, kernels.lanes)
    assert not kernels.can_convolve(kernels.lanes + 1, kernels.lanes)
    assert not kernels.can_convolve(kernels.lanes, 3)


# Matrix products


@pytest.mark.parametrize("count, depth, outputs", [(1, 1, 1), (7, 12, 70), (50, 700, 33)])
def test_products_are_torchs(kernels, count, depth, outputs):
    rows, weight = torch.randn(count, depth), torch.randn(outputs, depth) / depth**0.5
    bias = torch.randn(outputs)
    found = kernels.product(rows, kernels.pack_matrix(weight), outputs, bias)
    expected = F.linear(rows.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_large_matrix_is_read_once(kernels):
    """Its columns are divided among the jobs, where otherwise the rows are."""
    rows, weight = torch.randn(20, 1100), torch.randn(1000, 1100) / 33
    found = kernels.product(rows, kernels.pack_matrix(weight), 1000)
    torch.testing.assert_close(found, F.linear(rows, weight), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("depth", "outputs"), [(5, 3), (1024, 1024)])  # divided by rows, columns
def test_no_rows(kernels, depth, outputs):
    panels = kernels.pack_matrix(torch.ones(outputs, depth))
    assert kernels.product(torch.ones(0, depth), panels, outputs).shape == (0, outputs)


def test_a_bias_with_gaps(kernels):
    bias = torch.arange(8.0)[::2]
    found = kernels.product(torch.zeros(2, 3), kernels.pack_matrix(torch.ones(4, 3)), 4, bias)
    assert torch.equal(found, bias.expand(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(kernels, dtype):
    panels, filters = kernels.pack_matrix(torch.ones(4, 16)), torch.ones(2, 16, 9 * kernels.panel)
    wrong = torch.ones(1, 16, 5, 5, dtype=dtype)
    for call in (
        lambda: kernels.convolve(wrong, filters, 2 * kernels.panel),
        lambda: kernels.convolve_pointwise(wrong, panels, 4),
        lambda: kernels.product(wrong[0, :, 0].T, panels, 4),
        lambda: kernels.product(torch.ones(2, 16), panels.to(dtype), 4),
    ):
        with pytest.raises(TypeError, match="compute in float32 on the CPU, got torch"):
            call()


def test_weights_of_another_layer_are_refused(kernels):
    panels, filters = kernels.pack_matrix(torch.ones(4, 16)), torch.ones(2, 32, 9 * kernels.panel)
    for call in (
        lambda: kernels.convolve(torch.ones(1, 16, 5, 5), filters, 2 * kernels.panel),
        lambda: kernels.product(torch.ones(2, 15), panels, 4),
        lambda: kernels.convolve_pointwise(torch.ones(1, 17, 2, 2), panels, 4),
        lambda: kernels.product(torch.ones(2, 16), panels, 4, torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="of another layer"):
            call()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depth", [16, 300])  # in one part, in two: the sum is added once
def test_pointwise_convolutions_with_a_sum(kernels, stride, depth):
    x, weight, bias = maps(2, depth, 7, 6), torch.randn(20, depth, 1, 1), torch.randn(20)
    direct = F.conv2d(x, weight, bias, stride)
    panels = kernels.pack_matrix(weight.flatten(1))
    found = kernels.convolve_pointwise(x, panels, 20, bias, stride)
    torch.testing.assert_close(found, direct, rtol=0, atol=1e-4)
    added = maps(*direct.shape)
    expected = F.relu(direct + added)
    found = kernels.convolve_pointwise(x, panels, 20, bias, stride, added, relu=True)
    assert found.data_ptr() == added.data_ptr()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# RoIAlign

BOXES = [
    [0, 3.0, 4.0, 30.0, 20.0],
    [1, -9.0, -9.0, 200.0, 150.0],  # beyond the map on all sides
    [0, 10.0, 10.0, 10.0, 10.0],  # without area
    [1, 61.0, 45.0, 64.0, 48.0],  # the last corner
    [0, -300.0, -300.0, -200.0, -200.0],  # outside
    [0, 0.0, 0.0, 1.0, 48.0],
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("channels", [16, 80])
def test_roi_align_is_torchvisions(kernels, sampling_ratio, aligned, channels):
    levels = [maps(2, channels, 12, 16), maps(2, channels, 6, 8)]
    rois, index = torch.tensor(BOXES), torch.tensor([0, 1, 0, 0, 1, 1])
    settings = ([1 / 4, 1 / 8], (7, 3), sampling_ratio, aligned)
    found = kernels.roi_align(levels, rois, index, *settings)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i, (level, scale) in enumerate(zip(levels, settings[0], strict=True)):
        expected = roi_align(level, rois[index == i], (7, 3), scale, sampling_ratio, aligned)
        torch.testing.assert_close(found[index == i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 80])
def test_roi_align_of_bfloat16_is_rounded_once(kernels, channels):
    """The sums are those of the same values in float32."""
    levels = [maps(2, channels, 12, 16).bfloat16(), maps(2, channels, 6, 8).bfloat16()]
    levels[0][0, 0, 3, 4] = float("nan")
    levels[0][0, 1, 3, 4], levels[0][0, 2, 3, 4] = float("inf"), -torch.finfo(torch.bfloat16).max
    levels[0][0, 3] = 2**-130  # below the smallest normal number
    arguments = torch.tensor(BOXES), torch.tensor([0, 1, 0, 0, 1, 1])
    settings = ([1 / 4, 1 / 8], (7, 3), 0, True)
    found = kernels.roi_align(levels, *arguments, *settings)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    in_float32 = kernels.roi_align([m.float() for m in levels], *arguments, *settings)
    expected = in_float32.bfloat16()
    assert expected.isnan().any() and expected.isinf().any()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_maps_of_two_dtypes_cannot_be_pooled(kernels):
    levels = [maps(1, 16, 4, 4), maps(1, 16, 2, 2).bfloat16()]
    assert not kernels.can_pool(levels, torch.zeros(1, 5))
    with pytest.raises(TypeError, match="compute in float32 on the CPU, got"):
        kernels.roi_align(levels, torch.zeros(1, 5), torch.tensor([0]), [1.0, 0.5], (1, 1), 0, True)


def test_a_box_of_negative_size(kernels):
    """The pooler hands over none; its samples come in descending order."""
    level, box = maps(1, kernels.lanes, 32, 32), torch.tensor([[0, 30.0, 30, 2, 2]])
    found = kernels.roi_align([level], box, torch.tensor([0]), [1.0], (1, 1), 50, True)
    expected = roi_align(level, box, 1, 1.0, 50, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("box", "index"),
    [([0, 1, 1, 2, float("nan")], 0), ([2.0, 1, 1, 2, 2], 0), ([0.0, 1, 1, 2, 2], 1)],
    ids=["not finite", "no such image", "no such map"],
)
def test_boxes_that_cannot_be_pooled(kernels, box, index):
    with pytest.raises(ValueError, match="boxes must be finite, and on maps and images"):
        kernels.roi_align(
            [maps(1, 16, 4, 4)], torch.tensor([box]), torch.tensor([index]), [1.0], (1, 1), 0, True
        )


def test_cells_between_samples_are_not_read(kernels):
    """With few samples in large bins, a cell between them may hold anything."""
    level = maps(1, kernels.lanes, 16, 16)
    level[:, :, 6:11] = float("nan")  # the samples are at 4 and 12
    found = kernels.roi_align(
        [level], torch.tensor([[0, 0, 0.0, 16, 16]]), torch.tensor([0]), [1.0], (2, 2), 1, False
    )
    expected = roi_align(level, torch.tensor([[0, 0, 0.0, 16, 16]]), 2, 1.0, 1, False)
    assert torch.equal(found.isnan(), expected.isnan()) and not found.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pooler_takes_them(kernels, monkeypatch, dtype):
    level = maps(1, 16, 9, 9).to(dtype)
    arguments = ([level], torch.tensor([[0, 1, 1, 8.0, 8]]), torch.tensor([0]), [1.0])
    quick = roi_align_cpu.roi_align(*arguments, (2, 2), 0, True)
    monkeypatch.setattr(roi_align_cpu, "weighted_sums", None)
    assert torch.equal(roi_align_cpu.roi_align(*arguments, (2, 2), 0, True), quick)
    monkeypatch.undo()
    monkeypatch.setenv("FPN_EXT_COMPILED", "0")
    slow = roi_align_cpu.roi_align(*arguments, (2, 2), 0, True)
    # In half precision, torch's operators round the weights too.
    atol = 1e-6 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(quick, slow, rtol=0, atol=atol)


# Max pooling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 6), (12, 9)])
def test_max_pool_is_torchs(kernels, dtype, size):
    x = maps(2, 32, *size).to(dtype)
    x[0, 0, 0, 0], x[0, 1, -1, -1], x[1, 2, -1, 0] = (float(v) for v in ("nan", "inf", "-inf"))
    found, expected = kernels.max_pool(x), F.max_pool2d(x, 3, 2, 1)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_max_pooled(kernels):
    assert not kernels.can_max_pool(maps(1, kernels.lanes, 4, 4).double())
    assert not kernels.can_max_pool(maps(1, kernels.lanes + 1, 4, 4))
    assert not kernels.can_max_pool(maps(1, kernels.lanes, 4, 4)[:, :, :0])


# Compiling


def test_they_can_be_turned_off(kernels, monkeypatch):
    monkeypatch.setenv("FPN_EXT_COMPILED", "0")
    assert compiled.kernels() is None


def test_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if not build.instructions() or build.openmp_of_torch() is None:
        pytest.skip("nothing is compiled on this machine")
    with pytest.raises(build.CannotCompile, match=r"no C compiler.*apt-get install gcc"):
        build.compile_library(build.instructions())
    build.main()
    assert "No compiled kernels: there is no C compiler" in capsys.readouterr().out
    assert compiled.kernels() is None, "nothing is there yet"


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    if not build.instructions() or build.openmp_of_torch() is None:
        pytest.skip("nothing is compiled on this machine")
    with pytest.raises(build.CannotCompile, match="no such flag"):
        build.compile_library(build.instructions())
    assert not list((tmp_path / "cache" / "fpn_ext").iterdir())


def test_a_library_that_others_may_write_is_not_loaded(kernels, monkeypatch, tmp_path, caplog):
    file = tmp_path / "kernels.so"
    file.write_bytes(build.library_file(build.instructions()).read_bytes())
    monkeypatch.setattr(build, "library_file", lambda isa: file)
    file.chmod(0o755 | stat.S_IWGRP)
    assert compiled.kernels() is None
    assert "is not used: others than its owner" in caplog.text


def test_a_damaged_library_is_said_once_and_not_used(monkeypatch, tmp_path, caplog):
    if not build.instructions():
        pytest.skip("no kernels for this processor")
    file = tmp_path / "kernels.so"
    file.write_bytes(b"")
    file.chmod(0o755)
    monkeypatch.setattr(build, "library_file", lambda isa: file)
    assert compiled.kernels() is None and compiled.kernels() is None
    assert caplog.text.count("is not used") == 1


def test_another_source_is_another_file(kernels, monkeypatch, tmp_path):
    before = build.library_file("AVX2")
    source = tmp_path / "kernels.c"
    source.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.library_file("AVX2") != before
    assert os.path.dirname(build.library_file("AVX2")) == os.path.dirname(before)


def test_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", home)
    assert compiled.kernels() is None
    if build.instructions() and build.openmp_of_torch():
        monkeypatch.setenv("CC", "cc")
        with pytest.raises(build.CannotCompile, match="Set XDG_CACHE_HOME"):
            build.compile_library(build.instructions())


def test_kernels_that_were_compiled_meanwhile_are_found(kernels, monkeypatch, tmp_path):
    file = tmp_path / "kernels.so"
    original = build.library_file(build.instructions())
    monkeypatch.setattr(build, "library_file", lambda isa: file)
    assert compiled.kernels() is None
    file.write_bytes(original.read_bytes())
    file.chmod(0o755)
    assert compiled.kernels().lanes == kernels.lanes
