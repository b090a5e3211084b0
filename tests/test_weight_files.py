"""Weights of every format are read, no code is executed, damage is detected."""

import hashlib
import pickle
import random
import re
import tarfile
import urllib.error
from http.client import IncompleteRead
from unittest.mock import Mock

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager
from fpn_ext.config.prepare import check_weights
from fpn_ext.files.weight_files import DamagedFileError, local_file, read_weights
from safetensors.torch import save_file
from unsafe import touches

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}


def same(found, expected=WEIGHTS):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(torch.as_tensor(found[name]), expected[name])
    return True


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_detectron2(tmp_path, zipped):
    """With all that Detectron2 puts into one."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(2)).backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "trainer": {
            "iteration": 3,
            "hooks": {"LRScheduler": {"base_lrs": [0.1], "last_epoch": 4}},
            "_trainer": {"iteration": 3, "optimizer": optimizer.state_dict()},
        },
        "iteration": 3,
    }
    file = str(tmp_path / "model.pth")
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    found = read_weights(file)
    assert same(found.pop("model"), content.pop("model"))
    saved, expected = (c["trainer"]["_trainer"].pop("optimizer") for c in (found, content))
    assert found == content
    assert saved["param_groups"] == expected["param_groups"]
    assert same(saved["state"][0], expected["state"][0])


def test_weights_alone(tmp_path):
    for content in (WEIGHTS, {"state_dict": WEIGHTS, "epoch": 3}):
        torch.save(content, tmp_path / "a.pth")
        assert same(read_weights(str(tmp_path / "a.pth"))["model"])


def test_a_pkl_of_the_model_zoo(tmp_path):
    content = {"model": {k: v.numpy() for k, v in WEIGHTS.items()}, "__author__": "Detectron2"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    found = read_weights(str(tmp_path / "a.pkl"))
    assert same(found["model"])
    assert found["__author__"] == "Detectron2" and "matching_heuristics" not in found


@pytest.mark.parametrize("blobs", [True, False])
def test_a_pkl_of_caffe2(tmp_path, blobs):
    weights = {k: v.numpy() for k, v in WEIGHTS.items()}
    weights["conv_w_momentum"] = np.ones(1)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": weights} if blobs else weights))
    found = read_weights(str(tmp_path / "a.pkl"))
    assert same(found["model"])
    assert found["__author__"] == "Caffe2" and found["matching_heuristics"]


def test_a_pyth_of_pycls(tmp_path):
    counters = {"bn.num_batches_tracked": torch.tensor(3)}
    torch.save({"model_state": WEIGHTS | counters, "epoch": 9}, tmp_path / "a.pyth")
    found = read_weights(str(tmp_path / "a.pyth"))
    assert same(found["model"]) and found["matching_heuristics"]


def test_safetensors(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(WEIGHTS, file)
    assert same(read_weights(str(file))["model"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"a\.safetensors is damaged"):
        read_weights(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({"model": torch.zeros(2)}, "holds a Tensor, not tensors by name"),
        ({"weights": WEIGHTS, "epoch": 3}, "'weights' is a dict, not a tensor"),
    ],
)
def test_what_is_not_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(str(tmp_path / "a.pth"))


def unsafe_files(folder, canary):
    """{file: the name it asks for}; in a tensor's place, beside one, and as the whole file."""
    nested = {"model": WEIGHTS, "trainer": {"hooks": [touches(canary)]}}
    torch.save(nested, folder / "zip.pth")
    torch.save(touches(canary), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model_state": {"w": touches(canary)}}, folder / "zip.pyth")
    (folder / "plain.pkl").write_bytes(pickle.dumps({"model": {"w": touches(canary)}}))
    torch.save({"model": {"w": np.array([touches(canary)])}}, folder / "array.pth")
    eval_ = r"([\w.]+\.)?eval"
    return {
        "zip.pth": eval_,
        "legacy.pth": eval_,
        "zip.pyth": eval_,
        "plain.pkl": eval_,
        "array.pth": r"numpy\.\w+\.multiarray\._reconstruct",
    }


def test_no_code_in_a_file_is_run(tmp_path):
    canary = tmp_path / "canary"
    for name, asked in unsafe_files(tmp_path, canary).items():
        with pytest.raises(ValueError, match=rf"{name} asks for {asked}; it was not read"):
            read_weights(str(tmp_path / name))
        assert not canary.exists()


def test_the_unsafe_files_are(tmp_path):
    for name in unsafe_files(tmp_path, tmp_path / "canary"):
        if name.endswith(".pkl"):
            pickle.loads((tmp_path / name).read_bytes())
        else:
            torch.load(tmp_path / name, weights_only=False)
        (tmp_path / "canary").unlink()


def test_a_tar_archive_is_known_by_its_first_block(tmp_path):
    """What follows may take tarfile any time."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 10
    (tmp_path / "a.pth").write_bytes(header.tobuf() + bytes(512))
    with pytest.raises(ValueError, match=r"a\.pth is in torch's oldest format"):
        read_weights(str(tmp_path / "a.pth"))
    (tmp_path / "b.pth").write_bytes(header.tobuf()[:511])
    with pytest.raises(DamagedFileError, match=r"b\.pth is damaged"):
        read_weights(str(tmp_path / "b.pth"))


def test_torchs_tar_archives_are_not_read(tmp_path):
    """torch before 2.6 unpickles them blindly even with weights_only."""
    (tmp_path / "pickle").write_bytes(pickle.dumps(touches(tmp_path / "canary")))
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        archive.add(tmp_path / "pickle", "storages")
    with pytest.raises(ValueError, match=r"a\.pth is in torch's oldest format"):
        read_weights(str(tmp_path / "a.pth"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("begin", [b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00"], ids=["gz", "bz2", "xz"])
@pytest.mark.parametrize("rest", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x03", 600 * b"\x08"])
def test_what_begins_as_if_compressed_is_damaged(tmp_path, begin, rest):
    (tmp_path / "a.pth").write_bytes(begin + rest)
    with pytest.raises(DamagedFileError, match=r"a\.pth is damaged"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_file_is_damaged(tmp_path, zipped):
    file = tmp_path / "a.pth"
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=zipped)
    text = file.read_bytes()
    for length in (0, 1, 3, *range(4, len(text), 53), len(text) - 1):
        file.write_bytes(text[:length])
        # One of the old format may be cut within a name, and seem to ask for another.
        expected = (DamagedFileError, r"a\.pth is damaged") if zipped else (ValueError, r"a\.pth")
        with pytest.raises(expected[0], match=expected[1]):
            read_weights(str(file))


def test_an_altered_byte_is_seen_or_changes_nothing(tmp_path):
    """torch's own reader silently accepts altered weights."""
    file = tmp_path / "a.pth"
    weights = {"w": torch.arange(500.0)}
    torch.save(weights, file)
    text = file.read_bytes()
    number = text.index(weights["w"].numpy().tobytes())
    places = [number, number + 1999, *random.Random(0).sample(range(len(text)), 150)]
    seen = 0
    for place in places:
        altered = bytearray(text)
        altered[place] ^= 0x10
        file.write_bytes(altered)
        try:
            assert same(read_weights(str(file))["model"], weights)
        except ValueError:
            seen += 1
    assert seen > 50
    altered = bytearray(text)
    altered[number] ^= 0x10
    file.write_bytes(altered)
    assert not torch.equal(torch.load(file, weights_only=True)["w"], weights["w"])
    with pytest.raises(DamagedFileError, match=r"the checksum of .*/data/0 does not match"):
        read_weights(str(file))


# Addresses


def test_an_unprotected_address_is_refused():
    for address in ("http://example.org/a.pth", "ftp://example.org/a.pth"):
        with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS: .*a\.pth is fetched without"):
            local_file(address)
        cfg = fpn_ext.get_cfg()
        cfg.MODEL.WEIGHTS = address
        with pytest.raises(ValueError, match="use its https:// address"):
            check_weights(cfg, "optional")


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Records the requests; every download returns the same file."""
    asked = []
    (tmp_path / "file").write_bytes(b"weights")

    def get_local_path(url):
        asked.append(url)
        return str(tmp_path / "file")

    monkeypatch.setattr(PathManager, "get_local_path", get_local_path)
    return asked


def test_catalogues_are_fetched_over_https(downloads, tmp_path):
    for address, url in {
        "https://example.org/a.pth": "https://example.org/a.pth",
        "detectron2://COCO/a_f10217.pkl": "https://dl.fbaipublicfiles.com/detectron2/COCO/a_f10217.pkl",
        "catalog://ImageNetPretrained/MSRA/R-50": "https://dl.fbaipublicfiles.com/detectron/"
        "ImageNetPretrained/MSRA/R-50.pkl",
    }.items():
        assert local_file(address) == str(tmp_path / "file")
        assert downloads[-1] == url
    for name in ("ImageNetPretrained/none", "none"):
        with pytest.raises(FileNotFoundError, match=f"no catalog://{name} in Detectron2's catal"):
            local_file(f"catalog://{name}")


def test_a_hash_in_the_name_is_checked(downloads):
    right = hashlib.sha256(b"weights").hexdigest()[:8]
    assert local_file(f"https://example.org/net-{right}.pth")
    with pytest.raises(ValueError, match=rf"not the file its name .* begins with {right}\. Delete"):
        local_file("https://example.org/net-01234567.pth")


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("detectron2://a/b.pkl", "detectron2/a/b.pkl"),
        ("catalog://ImageNetPretrained/MSRA/R-50", "detectron/ImageNetPretrained/MSRA/R-50.pkl"),
        ("https://dl.fbaipublicfiles.com/some/model.pth", "some/model.pth"),
    ],
)
def test_unreachable_weights_say_what_to_do(tmp_path, monkeypatch, address, path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    place = tmp_path / path
    for fault, words in (
        (urllib.error.URLError("no network"), "URLError: <urlopen error no network>"),
        (IncompleteRead(b"half"), "IncompleteRead: IncompleteRead(4 bytes read)"),
    ):
        monkeypatch.setattr("urllib.request.urlretrieve", Mock(side_effect=fault))
        expected = (
            f"could not download https://dl.fbaipublicfiles.com/{path} ({words}). Download it "
            f"where there is access to it, copy it here and name the copy instead of {address}, "
            f"or put it at {place}"
        )
        with pytest.raises(ConnectionError, match=f"^{re.escape(expected)}$"):
            local_file(address)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("weights")
    assert local_file(address) == str(place), "as it says"


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*none"):
        local_file(str(tmp_path / "none.pth"))
