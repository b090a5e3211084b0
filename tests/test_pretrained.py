import pickle

import pytest
import torch
from fpn_ext.bottom_up.weights import load_pretrained
from safetensors.torch import save_file
from torch import nn
from unsafe import touches


def network(channels=3):
    """10 counted tensors: two convolutions, two norms of 4 each; no bias."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    )


def filled(channels=3):
    state = network(channels).state_dict()
    return {name: torch.randn(t.shape) if t.is_floating_point() else t for name, t in state.items()}


def load(tmp_path, content, into=None):
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    into = into or network()
    load_pretrained(into, str(file))
    return into


def assert_has(module, tensors, prefix=""):
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, tensors[prefix + name]), name


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.bottom_up."])
@pytest.mark.parametrize("inside", [None, "model", "state_dict"])
def test_names_prefixes_and_wrappings(tmp_path, prefix, inside):
    tensors = {prefix + name: tensor for name, tensor in filled().items()}
    tensors["head.weight"] = torch.zeros(3)
    content = {inside: tensors, "epoch": 7} if inside else tensors
    assert_has(load(tmp_path, content), tensors, prefix)


def test_safetensors(tmp_path):
    tensors = filled()
    save_file(tensors, tmp_path / "weights.safetensors")
    loaded = network()
    load_pretrained(loaded, str(tmp_path / "weights.safetensors"))
    assert_has(loaded, tensors)


def test_arrays_of_the_model_zoo(tmp_path):
    tensors = filled()
    content = {"model": {k: t.numpy() for k, t in tensors.items()}, "__author__": "Detectron2"}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content))
    loaded = network()
    load_pretrained(loaded, str(tmp_path / "weights.pkl"))
    assert_has(loaded, tensors)


def test_the_names_timm_gives_before_it_takes_a_network_apart(tmp_path):
    loaded = nn.ModuleDict({"stages_0": network(), "norm": nn.BatchNorm2d(4)})
    tensors = {name.replace("stages_0", "stages.0"): t for name, t in loaded.state_dict().items()}
    tensors = {n: torch.randn(t.shape) if t.is_floating_point() else t for n, t in tensors.items()}
    load(tmp_path, tensors, loaded)
    assert torch.equal(loaded["stages_0"][0].weight, tensors["stages.0.0.weight"])
    assert torch.equal(loaded["norm"].running_var, tensors["norm.running_var"])


def test_the_share_is_reported(tmp_path, caplog):
    caplog.set_level("INFO", logger="fpn_ext")
    tensors = filled()
    del tensors["3.running_var"]
    tensors |= {f"head.{i}": torch.zeros(3) for i in range(7)}
    load(tmp_path, tensors)
    assert "9 of the network's 10 tensors (90.0%) are in" in caplog.text
    assert "1 not there: 3.running_var" in caplog.text
    # The counters of batches that the norms keep are among what is not used.
    assert "9 not used: 1.num_batches_tracked, 3.num_batches_tracked, head.0" in caplog.text


def test_too_few_are_an_error_and_nothing_is_loaded(tmp_path):
    tensors = filled()
    del tensors["3.running_var"]
    tensors["2.weight"] = torch.zeros(8, 4, 1, 1)
    untouched = network()
    before = {name: t.clone() for name, t in untouched.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load(tmp_path, tensors, untouched)
    message = str(error.value)
    assert "BOTTOM_UP_WEIGHTS: only 8 of the network's 10 tensors (80.0%)" in message
    assert "1 not there: 3.running_var" in message
    assert "1 of another shape: 2.weight (8, 4, 1, 1) instead of (8, 4, 3, 3)" in message
    assert "At least 90% are needed" in message
    assert_has(untouched, before)


def test_weights_of_another_network(tmp_path):
    with pytest.raises(ValueError, match=r"only 0 of the network's 10 tensors"):
        load(tmp_path, {"layer1.conv.weight": torch.zeros(1)})


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_for_another_number_of_channels(tmp_path, channels):
    """A grey image in all channels gives the same result as in three."""
    tensors = filled()
    loaded = load(tmp_path, tensors, network(channels))
    grey = torch.rand(1, 1, 9, 9)
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), tensors["0.weight"])
    torch.testing.assert_close(loaded[0](grey.expand(-1, channels, -1, -1)), expected)


def test_a_file_that_would_run_code(tmp_path):
    harmful = {"model": touches(tmp_path / "touched")}
    file = tmp_path / "weights.pth"
    for zipped in (True, False):
        torch.save(harmful, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"BOTTOM_UP_WEIGHTS: .*weights\.pth asks for .*eval"):
            load_pretrained(network(), str(file))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_kind(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_text("no weights at all")
    with pytest.raises(ValueError, match=r"BOTTOM_UP_WEIGHTS: .*weights\.\w+ is damaged"):
        load_pretrained(network(), str(file))


def test_no_file():
    with pytest.raises(FileNotFoundError, match=r"BOTTOM_UP_WEIGHTS: no file none\.pth"):
        load_pretrained(network(), "none.pth")
