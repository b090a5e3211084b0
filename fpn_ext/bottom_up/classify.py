"""What a pretrained classification network recognises in an image: the proof of its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from detectron2.data.detection_utils import read_image
from PIL import Image
from torch import nn

from ..files.weight_files import metadata_of, read_weights
from .libraries import library_of, timm_package
from .pixels import pixels_in_file

CLASSIFIERS = ("torchvision", "timm")  # Detectron2's networks have no classifier


def whole_network(network: str) -> nn.Module:
    """Features and classifier of ``"timm/..."`` or ``"torchvision/..."``, with random weights.

    Raises:
        ValueError: another library, or no such network.
    """
    library = network.partition("/")[0]
    if library not in CLASSIFIERS:
        raise ValueError(
            f"--network {network!r} must be a classification network: timm/NAME or "
            "torchvision/NAME, as in MODEL.FPN_EXT.BOTTOM_UP"
        )
    _, name = library_of(network)
    if library == "timm":
        return timm_package().create_model(name, pretrained=False)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options)


def classify(file: Path, image: Path, top: int = 5) -> list[tuple[int, str, float]]:
    """The classes that a converted network finds in an image, the most probable first.

    The image's shorter side is scaled to the network's test size over its crop fraction and the
    centre is cut out, as its library evaluates it; pixels are those of the file, else the
    library's.

    Returns:
        (index, name or "", probability of 0 to 1), ``top`` of them; names are ImageNet's where the
        network has its 1000 classes.

    Raises:
        FileNotFoundError: no such image.
        ValueError: ``file`` does not say which network it is for, or the image cannot be read.
    """
    network = metadata_of(str(file)).get("network", "")
    body = whole_network(network)
    body.load_state_dict(read_weights(str(file))["model"], strict=False)
    logits = logits_of(body.eval(), network, file, image)
    probabilities = logits.softmax(0)
    names: Sequence[str] = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    values, indices = probabilities.topk(min(top, len(probabilities)))
    return [
        (i, names[i] if len(probabilities) == len(names) else "", value)
        for value, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def logits_of(body: nn.Module, network: str, file: Path, image: Path) -> torch.Tensor:
    """(classes,) of one image, prepared as :func:`classify` says for ``network``."""
    library, name = library_of(network)
    pixels = pixels_in_file(str(file)) or library.pixels(name)
    size, resized = _test_sizes(network)
    try:
        array = read_image(str(image), "RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        raise ValueError(f"{image} cannot be read as an image: {error}") from error
    picture = Image.fromarray(array)
    scale = resized / min(picture.size)
    sides = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
    picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, upper = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, upper, left + size, upper + size))
    values = np.asarray(picture, dtype=np.float32)
    if pixels.format == "BGR":
        values = values[:, :, ::-1]
    mean, std = (np.array(v, dtype=np.float32) for v in (pixels.mean, pixels.std))
    with torch.no_grad():
        return body(torch.from_numpy(((values - mean) / std).transpose(2, 0, 1).copy())[None])[0]


def _test_sizes(network: str) -> tuple[int, int]:
    """The side of the centre that is cut out, and of the shorter side before."""
    library, _, name = network.partition("/")
    if library == "timm":
        published = timm_package().get_pretrained_cfg(name)
        if published is None:
            return 224, 256
        size = published.input_size[-1]
        return size, round(size / published.crop_pct)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return preset.crop_size[0], preset.resize_size[0]
