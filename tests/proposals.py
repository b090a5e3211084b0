"""Proposal files for tests, valid and invalid."""

import json
import struct

import numpy as np
from fpn_ext.proposals.file import write_proposals
from safetensors.numpy import load_file, save_file


def random_proposals(counts, size=(60, 60), seed=0):
    """Per image, boxes inside (width, height) and scores, highest first."""
    rng = np.random.default_rng(seed)
    for count in counts:
        corners = rng.uniform(0, 1, size=(count, 2, 2)).astype(np.float32)
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        scores = np.sort(rng.normal(size=count).astype(np.float32))[::-1]
        yield boxes * np.float32([*size, *size]), scores


def write_random(file, counts, dataset=""):
    """A file of proposals for {image id: number of boxes}; what was written, by image id."""
    written = dict(zip(counts, random_proposals(counts.values()), strict=True))
    write_proposals(file, written, written.values(), dataset=dataset, source="random numbers")
    return written


def rewrite(file, metadata=None, drop=(), **tensors):
    """Rewrite the file with safetensors' own writer, changing tensors and metadata."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        old = json.loads(opened.read(length))["__metadata__"]
    kept = {k: v for k, v in ({**old, **(metadata or {})}).items() if k not in drop}
    all_tensors = {k: v for k, v in ({**load_file(file), **tensors}).items() if k not in drop}
    save_file(all_tensors, file, metadata=kept)
