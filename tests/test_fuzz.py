"""Any content of a config, weight or proposal file, or box raises one of our errors at most."""

import io
import pickle
import struct
from pathlib import Path

import fpn_ext
import numpy as np
import pytest
import torch
import yaml
from fpn_ext import LevelMappedROIPooler
from detectron2.structures import Boxes
from fpn_ext.config.defaults import flat
from fpn_ext.files.weight_files import read_weights
from fpn_ext.proposals.detectron2_pickle import read_pickle
from fpn_ext.proposals.file import ProposalFile, write_proposals
from fuzzing import corrupted, fuzz
from hypothesis import strategies as st
from safetensors.torch import save

OURS = (ValueError, TypeError, FileNotFoundError)
DEMO = Path("configs/demo/faster_rcnn_R_18_FPN.yaml").read_bytes()
KEYS = sorted(flat(fpn_ext.get_cfg()))

value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["res2", "p2", "BN", "FeaturePyramid", "RPN", "cuda", "", "()", "[1, 2"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)  # fmt: skip


def load_and_check(file, opts=()):
    """Reads and checks a config; any failure must be one of our errors."""
    try:
        cfg = fpn_ext.load_config(str(file), opts)
        fpn_ext.check_config(cfg, training=True)
        fpn_ext.resolve_bottom_up(cfg)
    except OURS as error:
        str(error).encode("utf-8", "backslashreplace")


@fuzz(text=corrupted(DEMO) | st.binary(max_size=80))
def test_fuzz_text_of_a_config(tmp_path, text):
    (tmp_path / "any.yaml").write_bytes(text)
    load_and_check(tmp_path / "any.yaml")


def nested(entries):
    root = {}
    for key, found in entries.items():
        *nodes, name = key.split(".")
        node = root
        for part in nodes:
            node = node.setdefault(part, {})
        node[name] = found
    return root


@fuzz(entries=st.dictionaries(st.sampled_from(KEYS), value, min_size=1, max_size=5))
def test_fuzz_values_of_a_config(tmp_path, entries):
    text = yaml.safe_dump(nested(entries), allow_unicode=True)
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8", errors="replace")
    load_and_check(tmp_path / "any.yaml")


@fuzz(
    opts=st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=9), st.text(max_size=9)),
                  max_size=3)
)  # fmt: skip
def test_fuzz_command_line(opts):
    load_and_check("configs/Base-FPN.yaml", [word for pair in opts for word in pair])


def weights(kind):
    content = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}
    buffer = io.BytesIO()
    if kind == "safetensors":
        return save(content)
    if kind == "pkl":
        arrays = {name: tensor.numpy() for name, tensor in content.items()}
        return pickle.dumps({"model": arrays, "__author__": "x"})
    torch.save({"model": content, "iteration": 3}, buffer,
               _use_new_zipfile_serialization=kind == "pth")  # fmt: skip
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pth", "old_pth", "pkl", "safetensors"])
@fuzz(data=st.data())
def test_fuzz_weights(tmp_path, kind, data):
    file = tmp_path / f"any.{kind.removeprefix('old_')}"
    file.write_bytes(data.draw(corrupted(weights(kind)) | st.binary(max_size=80)))
    try:
        read_weights(str(file))
    except ValueError as error:
        assert str(file) in str(error)


@pytest.fixture(scope="module")
def proposals(tmp_path_factory):
    file = tmp_path_factory.mktemp("proposals") / "some.safetensors"
    boxes = np.array([[0, 0, 5, 5], [1, 2, 3, 4]], np.float32)
    of_images = [(boxes, np.array([2, 1])), (boxes[:0], np.zeros(0))]
    write_proposals(file, [7, "b"], of_images, dataset="d", source="s")
    as_pickle = {"ids": [7], "boxes": [boxes], "objectness_logits": [np.zeros(2)], "bbox_mode": 0}
    return {"safetensors": file.read_bytes(), "pkl": pickle.dumps(as_pickle)}


@pytest.mark.parametrize("kind", ["safetensors", "pkl"])
@fuzz(data=st.data())
def test_fuzz_proposals(tmp_path, proposals, kind, data):
    file = tmp_path / f"any.{kind}"
    file.write_bytes(data.draw(corrupted(proposals[kind]) | st.binary(max_size=80)))
    try:
        if kind == "pkl":
            read_pickle(file)
        else:
            with ProposalFile(file) as found:
                for image_id in found:
                    boxes, scores = found[image_id]
                    assert boxes.shape == (len(scores), 4)
    except ValueError as error:
        assert str(file) in str(error)


# A corner with any 32 bits, NaN with its payloads, infinities and subnormal numbers among them.
corner = st.integers(0, 2**32 - 1).map(
    lambda bits: struct.unpack("f", struct.pack("I", bits))[0]
) | st.floats(-50, 150, width=32)


@fuzz(boxes=st.lists(st.tuples(corner, corner, corner, corner), max_size=12),
      implementation=st.sampled_from(["per_level", "weighted_rows"]))  # fmt: skip
def test_fuzz_boxes(boxes, implementation):
    maps = [torch.ones(1, 2, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    pooler = LevelMappedROIPooler(
        2, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, "ROIAlignV2", implementation=implementation
    )
    pooled = pooler(maps, [Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))])
    assert pooled.shape == (len(boxes), 2, 2, 2)
    # Means of ones, less where the box hangs over the edge.
    assert ((pooled >= 0) & (pooled <= 1 + 1e-5)).all()
    gradients = torch.autograd.grad(pooled.sum(), maps, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
