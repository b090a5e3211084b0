"""The fused RoIAlign against torchvision's operator, level by level.

Where there is a CUDA device, on it. Elsewhere ``test_in_the_interpreter`` runs the tests that need
the kernel in a process of its own, in Triton's interpreter, which has to be chosen before Triton is
imported; and the kernel is compiled for GPUs that are not there.
"""

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from fpn_ext.kernels import roi_align_cpu, roi_align_cuda, roi_align_cuda_kernel
from fpn_ext.kernels.roi_align_samples import Settings
from fpn_ext.modeling.pooler import LevelMappedROIPooler
from torchvision.ops import roi_align

CUDA = torch.cuda.is_available()
INTERPRETED = roi_align_cuda.INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"

needs_triton = pytest.mark.skipif(roi_align_cuda.triton is None, reason="needs Triton")
runs_the_kernel = pytest.mark.skipif(
    not (CUDA and roi_align_cuda.triton) and not INTERPRETED,
    reason="needs a CUDA device; else run by test_in_the_interpreter",
)
on_cuda = pytest.mark.skipif(
    not (CUDA and roi_align_cuda.triton) or INTERPRETED, reason="needs a CUDA device"
)

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]

# On maps of 64 x 48 pixels, x to the right; the second number is the level.
BOXES = {
    "inside": ([9.3, 4.1, 38.9, 21.7], 0),
    "of one cell": ([20.1, 20.2, 22.3, 23.1], 0),
    "partly left and above": ([-13, -9, 21, 17], 0),
    "partly right and below": ([50, 30, 75, 60], 1),
    "in the strip of one cell around the map": ([-4, 20, 0, 40], 0),
    "far outside": ([-500, -500, -400, -400], 1),
    "wider than the map": ([-70, 10, 140, 30], 3),
    "larger than the map": ([-40, -60, 120, 100], 1),
    "without area": ([9, 9, 9, 9], 0),
    "without width": ([9, 9, 9, 30], 1),
    "next to nothing": ([0, 0, 1e-3, 1e-3], 3),
    "all": ([0, 0, 64, 48], 3),
}


def boxes_and_levels(levels=4, batch=2):
    """(R, 5) boxes, in the images in turn, and the map each is pooled from; none on level 2."""
    boxes = torch.tensor([box for box, _ in BOXES.values()], dtype=torch.float32)
    image = torch.arange(len(boxes)) % batch
    level = torch.tensor([level for _, level in BOXES.values()]) % levels
    return torch.cat([image[:, None], boxes], dim=1).to(DEVICE), level.to(DEVICE)


def pyramid(levels=4, batch=2, channels=5, dtype=torch.float32, memory_format=None):
    maps = [
        torch.randn(batch, channels, -(-48 // s), -(-64 // s)).to(DEVICE, dtype)
        for s in (4, 8, 16, 32)[:levels]
    ]
    if memory_format:
        maps = [m.contiguous(memory_format=memory_format) for m in maps]
    return [m.requires_grad_() for m in maps]


def per_level(maps, rois, map_index, scales, *arguments):
    """torchvision's operator in float32, its result in the maps' dtype."""
    pooled = maps[0].new_zeros((len(rois), maps[0].shape[1], *arguments[0]))
    for i, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = torch.nonzero(map_index == i).squeeze(1)
        size, sampling_ratio, aligned = arguments
        part = roi_align(features.float(), rois[rows], size, scale, sampling_ratio, aligned)
        pooled = pooled.index_put((rows,), part.to(features.dtype))
    return pooled


def with_gradients(function, maps, *arguments):
    pooled = function(maps, *arguments)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(5))
    weights = weights.to(pooled.device, pooled.dtype)
    return pooled.detach(), torch.autograd.grad((pooled * weights).sum(), maps)


def assert_equal_to_rounding(found, expected, tolerance=2e-5):
    """Values of unit variance, and gradients relative to their largest."""
    for ours, reference in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
        atol = tolerance * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(ours, reference, rtol=0, atol=atol)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Values and gradients


@runs_the_kernel
@pytest.mark.parametrize(
    ("box", "sampling_ratio", "aligned", "shares"),
    [
        # Along each axis, on four cells. One sample at 1.5: half of cell 1, half of cell 2.
        ([1, 3], 1, True, [0, 0.5, 0.5, 0]),
        # Samples at 0.5 and 1.5.
        ([0, 2], 2, False, [0.25, 0.5, 0.25, 0]),
        # Adaptive: 3 cells, so samples at 0.5, 1.5, 2.5.
        ([0, 3], 0, False, [1 / 6, 2 / 6, 2 / 6, 1 / 6]),
        # Samples at -0.5, which is on the first cell, and at 0.5.
        ([-1, 1], 2, False, [0.75, 0.25, 0, 0]),
        # Samples at -2, outside, and at 0: the average is of both.
        ([-3, 1], 2, False, [0.5, 0, 0, 0]),
        # Samples at -1, still inside, and at 1.
        ([-2, 2], 2, False, [0.5, 0.5, 0, 0]),
        # Samples at 3.5 and at 4.5: one on the last cell, one outside.
        ([3, 5], 2, False, [0, 0, 0, 0.5]),
        # One sample at 4: still inside.
        ([3, 5], 1, False, [0, 0, 0, 1]),
        # No size: three samples at 4; without `aligned` a size of 1, so one at 4.5.
        ([4.5, 4.5], 3, True, [0, 0, 0, 1]),
        ([4, 4], 1, False, [0, 0, 0, 0]),
        # No size and adaptive: no sample.
        ([2, 2], 0, True, [0, 0, 0, 0]),
    ],
)
def test_hand_worked(box, sampling_ratio, aligned, shares):
    features = torch.arange(1.0, 17.0).view(1, 1, 4, 4).to(DEVICE).requires_grad_()
    roi = torch.tensor([[0.0, box[0], box[0], box[1], box[1]]], device=DEVICE)
    level = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pooled = roi_align_cuda.roi_align(
        [features], roi, level, [1.0], (1, 1), sampling_ratio, aligned
    )
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    shares = torch.tensor(shares, dtype=torch.float32)
    expected = shares[:, None] * shares
    torch.testing.assert_close(gradient.cpu().view(4, 4), expected)
    torch.testing.assert_close(pooled.cpu().view(()), (features.detach().cpu() * expected).sum())


@runs_the_kernel
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_equal_to_torchvision(sampling_ratio, aligned):
    """Four levels, one of them without boxes, two images, bins wider than high."""
    maps, (rois, levels) = pyramid(), boxes_and_levels()
    assert not (levels == 2).any()
    arguments = (maps, rois, levels, SCALES, (2, 1), sampling_ratio, aligned)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments))
    # Zeros, not rounding errors: nothing was sampled.
    empty = [i for i, name in enumerate(BOXES) if name == "far outside"]
    empty += [i for i, name in enumerate(BOXES) if "without" in name and sampling_ratio == 0]
    assert not found[0][empty].any() or (not aligned and sampling_ratio == 0)
    assert not found[1][2].any()


@runs_the_kernel
@pytest.mark.parametrize(
    ("output_size", "memory_format"),
    [((1, 3), torch.contiguous_format), ((2, 1), torch.channels_last)],
)
def test_one_level(output_size, memory_format):
    maps = pyramid(1, channels=8, memory_format=memory_format)
    rois, levels = boxes_and_levels(levels=1)
    arguments = (maps, rois[:9], levels[:9], SCALES[:1], output_size, 0, True)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)


@runs_the_kernel
def test_more_channels_than_one_program_takes():
    channels = roi_align_cuda_kernel.MOST_CHANNELS + 3
    maps, (rois, levels) = pyramid(channels=channels), boxes_and_levels()
    arguments = (maps, rois[:3], levels[:3], SCALES, (1, 2), 2, True)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments))


@runs_the_kernel
def test_as_many_levels_as_there_can_be():
    count = roi_align_cuda.MOST_LEVELS
    maps = [torch.randn(1, 2, 3 + i, 4 + i, device=DEVICE).requires_grad_() for i in range(count)]
    rois = torch.tensor([[0.0, 1, 1, 3, 3]], device=DEVICE).expand(count, 5)
    levels = torch.arange(count, device=DEVICE).flip(0)
    scales = [1 / (1 + i) for i in range(count)]
    arguments = (maps, rois, levels, scales, (1, 1), 1, True)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments))


@runs_the_kernel
@pytest.mark.parametrize(
    ("dtype", "one_step"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=str
)
def test_half_precision(dtype, one_step):
    """Sums in float32, rounded once: at most one step of the dtype from torchvision's."""
    maps, (rois, levels) = pyramid(dtype=dtype), boxes_and_levels()
    arguments = (maps, rois, levels, SCALES, (1, 2), 0, True)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments), tolerance=one_step)


@runs_the_kernel
def test_half_precision_gradients_are_added_up_in_float32():
    """2048 + 1 is 2048 in float16."""
    features = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=DEVICE).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 1, 1]], device=DEVICE).expand(3, 5)
    levels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    pooled = roi_align_cuda.roi_align([features], rois, levels, [1.0], (1, 1), 1, True)
    weights = torch.tensor([2048.0, 1, 1], dtype=torch.float16, device=DEVICE).view(3, 1, 1, 1)
    (gradient,) = torch.autograd.grad(pooled, features, weights)
    assert gradient.item() == 2050


@runs_the_kernel
def test_a_map_of_more_than_2_to_the_31_numbers():
    channels, side = 256, 2900
    assert channels * side**2 > 2**31
    if CUDA and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    # Not filled: on CPU, memory that is not written to does not exist.
    features = torch.empty(
        (1, channels, side, side),
        dtype=torch.float16,
        device=DEVICE,
        memory_format=torch.channels_last,
    )
    features[..., -1, -1] = torch.arange(256.0).half()
    roi = torch.tensor([[0.0, side, side, side, side]], device=DEVICE)
    level = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pooled = roi_align_cuda.roi_align([features], roi, level, [1.0], (1, 1), 1, True)
    assert pooled.flatten().tolist() == list(range(256))


@runs_the_kernel
def test_a_box_of_many_thousand_samples():
    """32768 px on a 3 x 4 map. If the kernel visited all samples, this would take minutes."""
    features = torch.ones(1, 1, 3, 4, device=DEVICE)
    roi = torch.tensor([[0.0, -16384, -16384, 16384, 16384]], device=DEVICE)
    level = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pooled = roi_align_cuda.roi_align([features], roi, level, [1.0], (1, 1), 0, True)
    # Samples are 1 apart; inside are those at -1, 0, ... up to the map's 3 rows and 4 columns.
    assert pooled.item() * 32768**2 == pytest.approx(5 * 6)


# What gets a gradient, and how


@runs_the_kernel
def test_only_maps_that_need_a_gradient_get_one(monkeypatch):
    computed = []
    compute = roi_align_cuda.map_gradients
    monkeypatch.setattr(
        roi_align_cuda, "map_gradients", lambda *a: computed.append(compute(*a)) or computed[0]
    )
    maps, (rois, levels) = pyramid(), boxes_and_levels()
    for i in (0, 2, 3):
        maps[i].requires_grad_(False)
    rois.requires_grad_()
    arguments = (maps, rois, levels, SCALES, (1, 1), 1, True)
    roi_align_cuda.roi_align(*arguments).sum().backward()
    assert [m.grad is not None for m in maps] == [False, True, False, False]
    assert [g is not None for g in computed[0]] == [False, True, False, False]
    assert rois.grad is None
    (expected,) = torch.autograd.grad(per_level(*arguments).sum(), maps[1])
    torch.testing.assert_close(maps[1].grad, expected, rtol=0, atol=2e-5)


@runs_the_kernel
@pytest.mark.parametrize("mode", ["default", "deterministic"])
def test_no_boxes_launch_nothing_and_stay_in_the_graph(mode, request, monkeypatch):
    if mode == "deterministic":
        request.getfixturevalue("deterministic")
    monkeypatch.setattr(roi_align_cuda_kernel, "kernel", None)
    maps, (rois, levels) = pyramid(dtype=torch.float16), boxes_and_levels()
    arguments = (maps, rois[:0], levels[:0], SCALES, (2, 3), 0, True)
    pooled = roi_align_cuda.roi_align(*arguments)
    assert pooled.shape == (0, 5, 2, 3) and pooled.dtype == torch.float16
    pooled.sum().backward()
    for m in maps:
        assert m.grad.shape == m.shape and m.grad.dtype == m.dtype and not m.grad.any()


@runs_the_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_deterministic_gradient(dtype, monkeypatch, request):
    """An alternative without atomics: same gradient up to rounding, deterministic."""
    maps, (rois, levels) = pyramid(dtype=dtype), boxes_and_levels()
    arguments = (maps, rois, levels, SCALES, (2, 1), 0, True)
    default = with_gradients(roi_align_cuda.roi_align, *arguments)
    request.getfixturevalue("deterministic")
    routes = []
    route = roi_align_cpu.map_gradients
    monkeypatch.setattr(
        roi_align_cpu, "map_gradients", lambda *a: routes.append("weighted_rows") or route(*a)
    )
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert_equal_to_rounding(found, default, 2e-5 if dtype == torch.float32 else 2**-7)
    again = with_gradients(roi_align_cuda.roi_align, *arguments)
    assert all(map(torch.equal, found[1], again[1]))
    assert routes == ["weighted_rows"] * 2


def test_the_deterministic_route_makes_its_tensors_where_the_boxes_are():
    """A tensor created without a device would be on "meta" here, and clash."""
    maps, (rois, levels) = pyramid(), boxes_and_levels()
    settings = Settings(tuple(SCALES), (2, 2), 0, True)
    gradient = torch.randn(len(rois), 5, 2, 2, device=DEVICE)
    with torch.device("meta"):
        found = roi_align_cpu.map_gradients(
            gradient, rois, levels, [m.shape for m in maps], (True,) * 4, settings
        )
    pooled = per_level(maps, rois, levels, SCALES, (2, 2), 0, True)
    expected = torch.autograd.grad(pooled, maps, gradient)
    assert_equal_to_rounding((pooled, found), (pooled, expected))


# In the pooler


def pooler(implementation="fused", pooler_type="ROIAlignV2", scales=SCALES, output_size=1):
    return LevelMappedROIPooler(
        output_size, scales, 0, pooler_type, canonical_box_size=56, implementation=implementation
    ).to(DEVICE)


@runs_the_kernel
@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign"])
def test_the_pooler(pooler_type):
    """Each box from its level, degenerate ones zero, in values and gradients."""
    maps, (rois, _) = pyramid(), boxes_and_levels()
    bad = torch.tensor([[float("nan"), 0, 9, 9], [9, 9, 5, 20]], device=DEVICE)
    box_lists = [Boxes(rois[:5, 1:]), Boxes(torch.cat([rois[5:, 1:], bad]))]
    found, expected = (
        with_gradients(pooler(name, pooler_type), maps, box_lists)
        for name in ("fused", "per_level")
    )
    assert_equal_to_rounding(found, expected)
    assert not found[0][-2:].any()


@runs_the_kernel
def test_what_fused_cannot_serve_is_an_error():
    maps, box_lists = pyramid(batch=1), [Boxes(boxes_and_levels()[0][:, 1:])]
    with pytest.raises(ValueError, match="fused cannot serve POOLER_TYPE ROIPool"):
        pooler(pooler_type="ROIPool")(maps, box_lists)
    with pytest.raises(ValueError, match="fused cannot serve maps that are not all float32"):
        pooler()([m.double() for m in maps], box_lists)
    with pytest.raises(ValueError, match="fused cannot serve maps that are not all float32"):
        pooler()([*maps[:3], maps[3].half()], box_lists)
    with pytest.raises(ValueError, match="fused cannot serve more than 8 levels"):
        pooler(scales=[2**-k for k in range(9)])([maps[0]] * 9, box_lists)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves maps on CPU")
def test_fused_does_not_serve_maps_on_cpu():
    maps = [torch.zeros(1, 1, 8, 8)]
    pool = LevelMappedROIPooler(1, [1 / 4], 0, "ROIAlignV2", implementation="fused")
    with pytest.raises(ValueError, match="fused cannot serve maps on another device than CUDA"):
        pool(maps, [Boxes(torch.zeros(1, 4))])


def test_what_auto_takes(monkeypatch):
    """Uses stand-ins for maps, so that no CUDA device is needed."""

    def choice(device, dtype, **kwargs):
        features = SimpleNamespace(
            device=torch.device(device), is_cuda=device == "cuda", dtype=dtype
        )
        return pooler("auto", **kwargs)._choose([features] * 4)

    monkeypatch.setattr(roi_align_cuda, "missing", lambda: None)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert choice("cuda", dtype) == "fused"
    assert choice("cuda", torch.float32, pooler_type="ROIAlign") == "fused"
    assert choice("cuda", torch.float64) == "per_level"
    assert choice("cuda", torch.float32, pooler_type="ROIPool") == "per_level"
    assert choice("cpu", torch.float32) == "weighted_rows"
    assert choice("cpu", torch.float16) == "weighted_rows"
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert choice("cuda", torch.float32) == "per_level"
    monkeypatch.undo()
    monkeypatch.setattr(roi_align_cuda, "missing", lambda: "a Python without Triton")
    assert choice("cuda", torch.float32) == "per_level"


# Where the kernel runs


@pytest.fixture
def asked_anew():
    roi_align_cuda.missing.cache_clear()
    yield
    roi_align_cuda.missing.cache_clear()


def test_available(asked_anew):
    assert roi_align_cuda.available() == (INTERPRETED or bool(CUDA and roi_align_cuda.triton))


def test_without_triton():
    """The package can be imported, and says what is missing."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        from fpn_ext.kernels import roi_align_cuda
        print(roi_align_cuda.available(), roi_align_cuda.INTERPRETED, roi_align_cuda.missing())
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False False a Python without Triton\n", run.stderr


@needs_triton
@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (RuntimeError("no C compiler"), r"does not work here \(RuntimeError: no C compiler\)"),
        (0.5, "0.5 away from torchvision's operator"),
        (float("inf"), "inf away"),
    ],
)
def test_a_kernel_that_does_not_work_is_said_once(asked_anew, monkeypatch, caplog, outcome, said):
    def check(device):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(roi_align_cuda, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(roi_align_cuda, "largest_error", check)
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        assert not roi_align_cuda.available()
        assert not roi_align_cuda.available()
    (record,) = caplog.records
    assert "level by level because of" in record.getMessage()
    assert re.search(said, roi_align_cuda.missing())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@runs_the_kernel
def test_the_kernel_is_checked_against_torchvision(mode, monkeypatch):
    with mode():
        assert roi_align_cuda.largest_error(DEVICE) < 1e-4
    right = roi_align_cuda.launch

    def wrong(by_cell, by_bin, rois, *others, **kwargs):
        moved = rois + torch.tensor([0.0, 1, 1, 1, 1], device=rois.device)
        right(by_cell, by_bin, moved, *others, **kwargs)

    monkeypatch.setattr(roi_align_cuda, "launch", wrong)
    with mode():
        assert roi_align_cuda.largest_error(DEVICE) > 1e-2


@needs_triton
@pytest.mark.skipif(CUDA or INTERPRETED, reason="without a CUDA device, in a process of its own")
@pytest.mark.slow
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (passed,) = re.findall(r"(\d+) passed", run.stdout)
    assert int(passed) >= 40, run.stdout


class AbsentGPU:
    """The part of a Triton driver needed for compiling."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@needs_triton
@pytest.mark.skipif(CUDA or INTERPRETED, reason="compiled for real, or not at all")
@pytest.mark.parametrize("dtype", roi_align_cuda.DTYPES, ids=str)
def test_the_kernel_compiles(dtype, monkeypatch):
    """For sm_90, through the code that launches it, without launching."""
    driver = roi_align_cuda.triton.runtime.driver
    kernel, compiled = roi_align_cuda_kernel.kernel, []

    class Compile:
        def __getitem__(self, grid):
            return lambda *a, **k: compiled.append(kernel.warmup(*a, grid=grid, **k))

    monkeypatch.setattr(roi_align_cuda_kernel, "kernel", Compile())
    driver.set_active(AbsentGPU(90))
    try:
        # A last level of one cell, and sizes that 16 divides and does not: all one kernel.
        for size in (256, 32):
            maps = [
                torch.zeros(1, 64, size // s, size // s, dtype=dtype, requires_grad=True)
                for s in (4, 8, 16, 32)
            ]
            rois, levels = boxes_and_levels(batch=1)
            pooled = roi_align_cuda.roi_align(maps, rois, levels, SCALES, (7, 7), 0, True)
            pooled.sum().backward()
    finally:
        try:
            driver.reset_active()
        except RuntimeError:  # newer ones look for a GPU at once
            driver.set_active(None)
    forward, backward = compiled[:2]
    assert [c.hash for c in compiled] == [forward.hash, backward.hash] * 2
    # Whole runs of memory at once, whatever the level.
    wide_loads = re.findall(r"ld\.global\.v\d\.b32", forward.asm["ptx"])
    assert len(wide_loads) >= 1
    assert "add.f32" in backward.asm["ptx"] or "add.v" in backward.asm["ptx"]


# On a GPU, for real


@on_cuda
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("channels", [64, 256])
def test_many_boxes(channels, sampling_ratio):
    maps = [
        torch.randn(2, channels, 512 // s, 768 // s, device=DEVICE).requires_grad_()
        for s in (4, 8, 16, 32)
    ]
    side = 8 * 90 ** torch.rand(600, 2)
    centre = torch.rand(600, 2) * torch.tensor([768.0, 512.0])
    boxes = Boxes(torch.cat([centre - side / 2, centre + side / 2], dim=1).to(DEVICE))
    results = []
    for implementation in ("fused", "per_level"):
        pool = LevelMappedROIPooler(
            7, SCALES, sampling_ratio, "ROIAlignV2", implementation=implementation
        ).to(DEVICE)
        results.append(with_gradients(pool, maps, [boxes[:400], boxes[400:]]))
    assert_equal_to_rounding(*results)


@on_cuda
def test_the_deterministic_gradient_of_many_boxes(deterministic):
    """Hundreds of bins add into one cell."""
    features = torch.randn(1, 64, 32, 32, device=DEVICE).requires_grad_()
    corner = torch.rand(400, 2, device=DEVICE) * 40
    rois = torch.cat([torch.zeros_like(corner[:, :1]), corner, corner + 60], dim=1)
    levels = torch.zeros(400, dtype=torch.int64, device=DEVICE)
    arguments = ([features], rois, levels, [1 / 4], (7, 7), 0, True)
    found = with_gradients(roi_align_cuda.roi_align, *arguments)
    for _ in range(4):
        again = with_gradients(roi_align_cuda.roi_align, *arguments)
        assert torch.equal(found[1][0], again[1][0])
    assert_equal_to_rounding(found, with_gradients(per_level, *arguments))


@on_cuda
def test_the_cpu_never_waits_for_the_gpu():
    maps, pool = pyramid(channels=64), pooler("auto", output_size=7)
    boxes = boxes_and_levels()[0][:, 1:]
    box_lists = [Boxes(boxes), Boxes(boxes + 3)]
    pool(maps, box_lists).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pool(maps, box_lists).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_auto_takes_it():
    maps, (rois, _) = pyramid(), boxes_and_levels()
    box_lists = [Boxes(rois[:5, 1:]), Boxes(rois[5:, 1:])]
    assert torch.equal(pooler("auto")(maps, box_lists), pooler("fused")(maps, box_lists))


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    maps, (rois, levels) = pyramid(), boxes_and_levels()
    arguments = (rois, levels, SCALES, (1, 2), 0, True)
    expected = with_gradients(roi_align_cuda.roi_align, maps, *arguments)
    there = [m.detach().to("cuda:1").requires_grad_() for m in maps]
    moved = (rois.to("cuda:1"), levels.to("cuda:1"), *arguments[2:])
    pooled, gradients = with_gradients(roi_align_cuda.roi_align, there, *moved)
    found = (pooled.to("cuda:0"), tuple(g.to("cuda:0") for g in gradients))
    assert_equal_to_rounding(found, expected)
