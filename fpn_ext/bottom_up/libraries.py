"""Networks by name from torchvision, timm and Detectron2, and their feature maps.

``"torchvision/resnet50"``, ``"timm/convnext_tiny"``, ``"detectron2/regnetx_4gf"``. Weights are
random: nothing is downloaded here.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torchvision
from detectron2.modeling import Backbone, backbone
from detectron2.modeling.backbone import regnet
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ..names import did_you_mean
from .dry_run import DryRun, FoundMap, dry_run

KEY = "MODEL.FPN_EXT.BOTTOM_UP"


class Pixels(NamedTuple):
    """Pixel normalisation that a network was trained with.

    Attributes:
        format: channel order, ``"RGB"`` or ``"BGR"``, as in ``INPUT.FORMAT``.
        mean: per channel, in that order, on the scale 0 to 255.
        std: likewise.
    """

    format: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class Network(NamedTuple):
    """A network and its measured feature maps.

    Attributes:
        body: image -> list or dictionary of all its maps, in the order of ``found.maps``.
        found: their measured properties.
        only: keys of some of these maps, in their order -> the network that returns only them, in
            that order, without the parts only other maps need. Detectron2's networks are Backbones
            and may still return others.
    """

    body: nn.Module
    found: DryRun
    only: Callable[[Sequence[str]], nn.Module]


class Library(NamedTuple):
    """A source of networks.

    Attributes:
        check: raises ValueError for an unknown name.
        pixels: name -> pixel normalisation of its published weights.
        build: name, channels of the image -> the network.
    """

    check: Callable[[str], None]
    pixels: Callable[[str], Pixels]
    build: Callable[[str, int], Network]


def library_of(bottom_up: str) -> tuple[Library, str]:
    """The library of ``"library/name"``, and the name, which is checked.

    Raises:
        ValueError: an unknown library or name; gives the nearest valid ones.
    """
    prefix, _, name = bottom_up.partition("/")
    if prefix not in LIBRARIES:
        raise ValueError(
            f"{KEY} {bottom_up!r}: no library {prefix!r}; {did_you_mean(prefix, LIBRARIES)}"
        )
    library = LIBRARIES[prefix]
    library.check(name)
    return library, name


def names_in_libraries(name: str) -> list[str]:
    """``"library/name"`` for every library that has such a network."""
    found = []
    for prefix, library in LIBRARIES.items():
        with contextlib.suppress(ValueError):
            library.check(name)
            found.append(f"{prefix}/{name}")
    return found


def _check(prefix: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise ValueError(f"{KEY}: {prefix} has no {name!r}; {did_you_mean(name, names)}")


# torchvision


def _check_torchvision(name: str) -> None:
    _check("torchvision", name, torchvision.models.list_models(module=torchvision.models))


def _torchvision_pixels(name: str) -> Pixels:
    return torchvision_pixels_of(torchvision.models.get_model_weights(name).DEFAULT)


def torchvision_pixels_of(weights: Any) -> Pixels:
    """What one of torchvision's weights, a member of its enumerations, was trained with."""
    preset = weights.transforms()
    return _scaled(preset.mean, preset.std)


def _build_torchvision(name: str, channels: int) -> Network:
    options = {}
    if name in ("googlenet", "inception_v3"):
        # Their weights expect other statistics, and transform_input converts.
        options = {"transform_input": channels == 3, "aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(name, weights=None, **options)
    if channels != 3:
        _take_channels(model, channels)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    nodes = _stage_outputs(model, channels, preset.crop_size[0])

    def only(keys: Sequence[str]) -> nn.Module:
        return create_feature_extractor(
            model, return_nodes=list(keys), suppress_diff_warning=True
        ).train(model.training)

    body = only(nodes)
    return Network(body, dry_run(body, channels, preset.crop_size[0]), only)


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replace the convolution that reads the image by one for this many channels."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            first = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            parent, _, child = path.rpartition(".")
            model.get_submodule(parent).add_module(child, first)
            return


def _stage_outputs(model: nn.Module, channels: int, native: int) -> list[str]:
    """The nodes that end a network's stages: for each stride, the input of the next stage.

    Simply the last node of a stride would lie inside the next stage's first block, before its
    stride-2 convolution.
    """
    in_training, in_evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    # A convolutional classifier gives maps, too: of class scores.
    names = [n for n in in_evaluation if n in in_training and not n.startswith("classifier")]
    graph = create_feature_extractor(model, names, suppress_diff_warning=True).eval()
    found = dry_run(graph, channels, native)
    maps = {m.key: m for m in found.maps}
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    nodes: dict[str, fx.Node] = output.args[0]

    ends, stride = [], 1
    for name in names:
        if maps[name].stride > stride:
            if stride > 1:  # at stride 1 it is the image
                ends += _what_enters(name, nodes, maps, stride)
            stride = maps[name].stride
    ends += [name for name in names if maps[name].stride == stride][-1:]
    return ends


def _what_enters(
    name: str, nodes: dict[str, fx.Node], maps: dict[str, FoundMap], stride: int
) -> list[str]:
    """The one map of ``stride`` that feeds the outermost module around a node.

    That module must read no other map; an empty list if there is none.
    """
    name_of = {node: n for n, node in nodes.items()}
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ".".join(parts[:depth])
        inside = [n for n in nodes if n == module or n.startswith(f"{module}.")] or [name]
        entering = {
            name_of.get(argument, "") for n in inside for argument in nodes[n].all_input_nodes
        }
        entering = {n for n in entering if n in maps and maps[n].stride} - set(inside)
        if len(entering) == 1 and maps[next(iter(entering))].stride == stride:
            return list(entering)
    return []


# timm


def timm_package() -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"{KEY} timm/... needs the package timm, which is not installed: pip install timm"
        ) from None
    return timm


def _check_timm(name: str) -> None:
    timm = timm_package()
    architecture, _, tag = name.partition(".")
    _check("timm", architecture, timm.list_models())
    if tag:
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
        _check(f"timm/{architecture}", tag, tags)


def _timm_pixels(name: str) -> Pixels:
    published = timm_package().get_pretrained_cfg(name)
    return _scaled(published.mean, published.std) if published else IMAGENET


def _build_timm(name: str, channels: int) -> Network:
    body = _timm_body(name, channels)
    published = timm_package().get_pretrained_cfg(name)
    found = dry_run(body, channels, published.input_size[-1] if published else 0)
    # timm identifies a map by its index among all the network has.
    places = [str(i) for i in body.feature_info.out_indices]

    def only(keys: Sequence[str]) -> nn.Module:
        return _timm_body(name, channels, out_indices=[int(places[int(key)]) for key in keys])

    return Network(body, found, only)


def _timm_body(name: str, channels: int, **options: Any) -> Any:
    # Attention networks accept other image sizes only with one of these options.
    for any_size in ({"strict_img_size": False}, {"dynamic_img_size": True}, {}):
        try:
            return timm_package().create_model(
                name, pretrained=False, features_only=True, in_chans=channels, **options, **any_size
            )
        except TypeError:  # not an option of this network
            if not any_size:
                raise
        except (RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
            raise ValueError(
                f"{KEY} timm/{name} gives no feature maps (features_only): {error}"
            ) from error
    raise AssertionError("the last of the loop returns or raises")


# Detectron2. It has builders for ResNets only; these are classes without one.


def _regnet(depth: int, w_0: int, w_a: float, w_m: float, group_width: int, se: float) -> Any:
    return regnet.RegNet(
        stem_class=regnet.SimpleStem,
        stem_width=32,
        block_class=regnet.ResBottleneckBlock,
        depth=depth,
        w_0=w_0,
        w_a=w_a,
        w_m=w_m,
        group_width=group_width,
        se_ratio=se,
        norm="BN",
        out_features=["stem", "s1", "s2", "s3", "s4"],
    )


def _swin(embed_dim: int, depth: int, heads: int, drop_path: float) -> Any:
    network = backbone.SwinTransformer(
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=tuple(heads * 2**i for i in range(4)),
        drop_path_rate=drop_path,
    )
    network._size_divisibility = 32  # its property reads this, its constructor misspells it
    return network


def _mvit(embed_dim: int, heads: int, last_blocks: tuple[int, ...], drop_path: float) -> Any:
    return backbone.MViT(
        embed_dim=embed_dim,
        depth=last_blocks[-1] + 1,
        num_heads=heads,
        last_block_indexes=last_blocks,
        residual_pooling=True,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def _vit(embed_dim: int, depth: int, heads: int, drop_path: float) -> Any:
    """ViTDet's plain ViT, with one map, and the simple pyramid that makes four of it."""
    per_window_group = depth // 4
    net = backbone.ViT(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        window_size=14,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[i for i in range(depth) if (i + 1) % per_window_group],
        use_rel_pos=True,
    )
    return backbone.SimpleFeaturePyramid(net, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), norm="LN")


# Detectron2's RegNets were trained with ImageNet statistics in BGR order.
BGR = Pixels("BGR", IMAGENET.mean[::-1], IMAGENET.std[::-1])

# RegNet: Radosavovic et al. 2020, as in torchvision, and the 4 GF of Detectron2's own configs.
# The others: configs of Detectron2's main branch, which has these classes.
DETECTRON2: dict[str, tuple[Callable[..., Any], tuple, Pixels]] = {
    "regnetx_400mf": (_regnet, (22, 24, 24.48, 2.54, 16, 0.0), BGR),
    "regnetx_800mf": (_regnet, (16, 56, 35.73, 2.28, 16, 0.0), BGR),
    "regnetx_1_6gf": (_regnet, (18, 80, 34.01, 2.25, 24, 0.0), BGR),
    "regnetx_3_2gf": (_regnet, (25, 88, 26.31, 2.25, 48, 0.0), BGR),
    "regnetx_4gf": (_regnet, (23, 96, 38.65, 2.43, 40, 0.0), BGR),
    "regnetx_8gf": (_regnet, (23, 80, 49.56, 2.88, 120, 0.0), BGR),
    "regnetx_16gf": (_regnet, (22, 216, 55.59, 2.1, 128, 0.0), BGR),
    "regnetx_32gf": (_regnet, (23, 320, 69.86, 2.0, 168, 0.0), BGR),
    "regnety_400mf": (_regnet, (16, 48, 27.89, 2.09, 8, 0.25), BGR),
    "regnety_800mf": (_regnet, (14, 56, 38.84, 2.4, 16, 0.25), BGR),
    "regnety_1_6gf": (_regnet, (27, 48, 20.71, 2.65, 24, 0.25), BGR),
    "regnety_3_2gf": (_regnet, (21, 80, 42.63, 2.66, 24, 0.25), BGR),
    "regnety_4gf": (_regnet, (22, 96, 31.41, 2.24, 64, 0.25), BGR),
    "regnety_8gf": (_regnet, (17, 192, 76.82, 2.19, 56, 0.25), BGR),
    "regnety_16gf": (_regnet, (18, 200, 106.23, 2.48, 112, 0.25), BGR),
    "regnety_32gf": (_regnet, (20, 232, 115.89, 2.53, 232, 0.25), BGR),
}
if hasattr(backbone, "SwinTransformer"):
    DETECTRON2 |= {
        "swin_t": (_swin, (96, 6, 3, 0.2), IMAGENET),
        "swin_s": (_swin, (96, 18, 3, 0.2), IMAGENET),
        "swin_b": (_swin, (128, 18, 4, 0.4), IMAGENET),
        "swin_l": (_swin, (192, 18, 6, 0.4), IMAGENET),
    }
if hasattr(backbone, "MViT"):
    DETECTRON2 |= {
        "mvitv2_t": (_mvit, (96, 1, (0, 2, 7, 9), 0.2), IMAGENET),
        "mvitv2_s": (_mvit, (96, 1, (0, 2, 13, 15), 0.2), IMAGENET),
        "mvitv2_b": (_mvit, (96, 1, (1, 4, 20, 23), 0.4), IMAGENET),
        "mvitv2_l": (_mvit, (144, 2, (1, 7, 43, 47), 0.5), IMAGENET),
    }
if hasattr(backbone, "SimpleFeaturePyramid"):
    DETECTRON2 |= {
        "vit_b": (_vit, (768, 12, 12, 0.1), IMAGENET),
        "vit_l": (_vit, (1024, 24, 16, 0.4), IMAGENET),
        "vit_h": (_vit, (1280, 32, 16, 0.5), IMAGENET),
    }


def _check_detectron2(name: str) -> None:
    _check("this Detectron2", name, DETECTRON2)


def _detectron2_pixels(name: str) -> Pixels:
    return DETECTRON2[name][2]


def _build_detectron2(name: str, channels: int) -> Network:
    if channels != 3:
        raise ValueError(
            f"{KEY} detectron2/{name} takes images of 3 channels, MODEL.PIXEL_MEAN has {channels}"
        )
    build, arguments, _ = DETECTRON2[name]
    network: Backbone = build(*arguments)
    found = dry_run(network, channels)

    def only(keys: Sequence[str]) -> nn.Module:
        if isinstance(network, regnet.RegNet):
            network._out_features = list(keys)
            while network.stages_and_names[-1][1] not in keys:
                delattr(network, network.stages_and_names.pop()[1])
        return network

    return Network(network, found, only)


def _scaled(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    return Pixels("RGB", *(tuple(round(255 * v, 3) for v in values) for values in (mean, std)))


LIBRARIES = {
    "torchvision": Library(_check_torchvision, _torchvision_pixels, _build_torchvision),
    "timm": Library(_check_timm, _timm_pixels, _build_timm),
    "detectron2": Library(_check_detectron2, _detectron2_pixels, _build_detectron2),
}
