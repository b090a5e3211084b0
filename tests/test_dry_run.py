import pytest
import torch
import torch.nn.functional as F
from fpn_ext.bottom_up.dry_run import dry_run, parameters_behind
from torch import nn


class Toy(nn.Module):
    """Returns feature maps computed by ``maps``; one parameter each."""

    def __init__(self, **maps):
        super().__init__()
        self.maps = maps
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in maps})
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image):
        image = self.norm(image)
        return {name: self.scales[name] * make(image) for name, make in self.maps.items()}


def halved(times, padding=1):
    """3x3 max pooling with stride 2, applied a number of times."""

    def run(x):
        for _ in range(times):
            x = F.max_pool2d(x, 3, 2, padding)
        return x

    return run


def found_in(**maps):
    return {found.key: found for found in dry_run(Toy(**maps), 3).maps}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_strides_are_exact_at_odd_sizes_whatever_the_padding(times, padding):
    """Unpadded, 97 px become 47, 23, 11, 5, 2 cells: 97 / 2 is nowhere near a stride of 32."""
    assert found_in(a=halved(times, padding))["a"].stride == 2**times


@pytest.mark.parametrize("stride", [3, 6, 7, 12, 14, 28])
def test_strides_that_are_no_powers_of_two(stride):
    assert found_in(a=lambda x: F.avg_pool2d(x, stride))["a"].stride == stride


def test_channels_and_layout():
    found = found_in(
        first=lambda x: F.avg_pool2d(x, 4).repeat(1, 5, 1, 1),
        last=lambda x: F.avg_pool2d(x, 4).repeat(1, 5, 1, 1).permute(0, 2, 3, 1),
    )
    assert (found["first"].channels, found["first"].channels_last) == (15, False)
    assert (found["last"].channels, found["last"].channels_last) == (15, True)
    assert found["first"].shapes == ((1, 15, 24, 32), (1, 15, 136, 48))
    assert found["last"].shapes == ((1, 24, 32, 15), (1, 136, 48, 15))


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, 7), "of one size"),
        (lambda x: x.flatten(2), "3 dimensions instead of 4"),
        (lambda x: F.avg_pool2d(x, (8, 4)), "not of one stride"),
        (lambda x: F.adaptive_avg_pool2d(x, (50, None)), "sides and channels cannot be told apart"),
    ],
)
def test_what_is_no_feature_map(make, note):
    found = found_in(a=make)["a"]
    assert note in found.note and (found.stride, found.channels) == (0, 0)


def test_what_is_no_tensor():
    class Pair(nn.Module):
        def forward(self, image):
            return [(image, image), F.avg_pool2d(image, 2)]

    run = dry_run(Pair(), 3)
    assert run.maps[0].note == "a tuple, no tensor"
    assert list(run.by_name()) == ["c1"]


def test_names_go_from_fine_to_coarse_and_the_last_of_a_stride_counts():
    network = Toy(
        deep=halved(3),
        early=halved(2),
        six=lambda x: F.avg_pool2d(x, 6),
        late=lambda x: halved(2)(x).repeat(1, 2, 1, 1),
        pooled=lambda x: x.mean((2, 3), keepdim=True),
    )
    named = dry_run(network, 3).by_name()
    assert list(named) == ["c2", "s6", "c3"]
    assert [found.key for found in named.values()] == ["late", "six", "deep"]


def test_the_table_shows_all_that_was_found():
    lines = dry_run(Toy(a=halved(2), b=halved(2), c=lambda x: x.mean((2, 3))), 3).table()
    header, a, b, c = (line.split() for line in lines.splitlines())
    assert header == ["name", "output", "at", "97x131", "at", "545x195", "stride", "channels"]
    assert a == ["-", "a", "1x3x25x33", "1x3x137x49", "4", "3"]
    assert b == ["c2", "b", "1x3x25x33", "1x3x137x49", "4", "3"]
    assert c[:6] == ["-", "c", "1x3", "1x3", "-", "-"] and "dimensions" in c


def test_a_border_left_out_is_noted():
    """97 - 4 * 23: two unpadded poolings see neither the last column nor the first."""
    assert found_in(a=halved(2, padding=0))["a"].note == "lacks 5 px of the image's border"
    assert found_in(a=lambda x: F.avg_pool2d(x, 4))["a"].note == "", "a part of a cell is lacking"


@pytest.mark.parametrize(("multiple", "native"), [(32, 0), (64, 0), (224, 224), (112, 224)])
def test_sides_that_must_be_multiples(multiple, native):
    def picky(x):
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise AssertionError(f"no multiple of {multiple}")
        return F.avg_pool2d(x, 4)

    run = dry_run(Toy(a=picky), 3, native)
    assert run.divisor == (native or multiple)
    assert run.by_name()["c2"].channels == 3


def test_one_size_only():
    def picky(x):
        if tuple(x.shape[2:]) != (224, 224):
            raise RuntimeError("I want 224")
        return F.avg_pool2d(x, 4)

    with pytest.raises(ValueError, match=r"one size only \(at .* RuntimeError: I want 224\)"):
        dry_run(Toy(a=picky), 3, native=224)


def test_it_leaves_no_trace():
    network = Toy(a=halved(1)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_numbers = torch.get_rng_state()
    dry_run(network, 3)
    parameters_behind(network, 3, (32, 32))
    assert network.training and network.norm.training
    assert torch.equal(torch.get_rng_state(), random_numbers)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_is_behind_a_map():
    network = Toy(a=halved(1), b=halved(2))
    network.scales["b"].requires_grad_(False)
    behind = parameters_behind(network, 3, (32, 32))
    assert behind == {
        "a": {"scales.a", "norm.weight", "norm.bias"},
        "b": {"norm.weight", "norm.bias"},
    }
