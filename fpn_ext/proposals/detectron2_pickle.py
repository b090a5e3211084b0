"""Detectron2's proposal files (``.pkl``), read without executing code in them.

A pickle is a program, which Detectron2 executes. See :mod:`fpn_ext.files.safe_pickle`.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..files.atomic import replacing
from ..files.safe_pickle import load_pickle
from .file import ImageId, ProposalFile, Proposals, checked_ids, write_proposals

PICKLE_SUFFIXES = (".pkl", ".pickle")
# Detectron1's key names, which Detectron2 also reads.
_DETECTRON1_KEYS = {"indexes": "ids", "scores": "objectness_logits"}
_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def is_pickle(file: str | os.PathLike) -> bool:
    """Whether a proposal file is in Detectron2's format, by its suffix."""
    return Path(file).suffix in PICKLE_SUFFIXES


def open_proposals(file: str | os.PathLike) -> Proposals:
    """Open a proposal file of either format; Detectron2's ``.pkl`` is loaded into memory.

    Args:
        file: a path, or a URL known to Detectron2's PathManager (``detectron2://...``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not in its suffix's format; see :class:`ProposalFile`, :func:`read_pickle`.
    """
    name = os.fspath(file)
    local = PathManager.get_local_path(name) if "://" in name else name
    return read_pickle(local) if is_pickle(local) else ProposalFile(local)


def read_pickle(file: str | os.PathLike) -> Proposals:
    """Detectron2's proposals: a pickled dict of ``ids``, ``boxes``, ``objectness_logits``.

    An optional ``bbox_mode`` is XYXY_ABS (default) or XYWH_ABS, which is converted. Detectron1's
    keys ``indexes`` and ``scores`` are supported. Boxes and scores become float32, sorted per image
    by descending score (stable).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a pickle, or it requests anything but arrays and numbers, named in the
            message; no code from it is executed.
    """
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of proposals {path}")
    content = load_pickle(path, {"detectron2.structures.boxes.BoxMode": int})
    try:
        ids, boxes, scores = _fields(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for i, own_scores in enumerate(scores):
        order = np.argsort(-own_scores, kind="stable")
        boxes[i], scores[i] = boxes[i][order], own_scores[order]
    offsets = np.cumsum([0, *map(len, boxes)])
    return Proposals(
        path,
        ids,
        offsets,
        np.concatenate([np.zeros((0, 4), dtype=np.float32), *boxes]),
        np.concatenate([np.zeros(0, dtype=np.float32), *scores]),
        source=f"{Path(path).name}, a .pkl of Detectron2",
    )


def write_pickle(file: str | os.PathLike, proposals: Proposals) -> None:
    """Write proposals in Detectron2's format, XYXY_ABS; holds all of them in memory."""
    boxes, scores = [], []
    for image_id in proposals.image_ids:
        own_boxes, own_scores = proposals[image_id]
        boxes.append(own_boxes)
        scores.append(own_scores)
    content = {
        "ids": list(proposals.image_ids),
        "boxes": boxes,
        "objectness_logits": scores,
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with replacing(file) as out:
        pickle.dump(content, out, protocol=4)


def convert(source: str | os.PathLike, target: str | os.PathLike, dataset: str = "") -> None:
    """Convert Detectron2's ``.pkl`` to this project's format, or back, by the suffixes.

    Args:
        dataset: name of the dataset, stored in this project's format; a ``.pkl`` has none.

    Raises:
        FileNotFoundError: no file ``source``.
        ValueError: both have one format, or ``source`` is not in its suffix's format.
    """
    if is_pickle(source) == is_pickle(target):
        raise ValueError(
            f"one of {os.fspath(source)!r} and {os.fspath(target)!r} must be a .pkl of Detectron2, "
            "the other a .safetensors"
        )
    proposals = open_proposals(source)
    if is_pickle(target):
        write_pickle(target, proposals)
        return
    write_proposals(
        target, proposals.image_ids, proposals.values(), dataset=dataset, source=proposals.source
    )


def _fields(content: Any) -> tuple[list[ImageId], list[np.ndarray], list[np.ndarray]]:
    """Ids, boxes (R, 4) XYXY float32 and scores (R,) float32 of each image."""
    if not isinstance(content, dict):
        raise ValueError(f"the pickle must hold a dict, it holds a {type(content).__name__}")
    content = {_DETECTRON1_KEYS.get(str(key), key): value for key, value in content.items()}
    missing = [key for key in ("ids", "boxes", "objectness_logits") if key not in content]
    if missing:
        raise ValueError(f"no key {missing} among its keys {sorted(map(str, content))}")
    ids, boxes, scores = (
        _plain_list(key, content[key]) for key in ("ids", "boxes", "objectness_logits")
    )
    if not len(ids) == len(boxes) == len(scores):
        raise ValueError(f"{len(ids)} ids, {len(boxes)} boxes, {len(scores)} objectness_logits")
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in [m.value for m in _BOX_MODES]:
        raise ValueError(f"bbox_mode must be one of {[m.name for m in _BOX_MODES]}, got {mode!r}")
    boxes = [_boxes(image_id, b, BoxMode(mode)) for image_id, b in zip(ids, boxes, strict=True)]
    scores = [_scores(image_id, s) for image_id, s in zip(ids, scores, strict=True)]
    for image_id, b, s in zip(ids, boxes, scores, strict=True):
        if len(b) != len(s):
            raise ValueError(f"image id {image_id!r} has {len(b)} boxes and {len(s)} scores")
    return checked_ids(ids), boxes, scores


def _plain_list(key: str, value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list, it is a {type(value).__name__}")
    return list(value)


def _boxes(image_id: Any, value: Any, mode: BoxMode) -> np.ndarray:
    boxes = _numbers(image_id, value, "boxes", 2)
    if boxes.shape[1] != 4:
        raise ValueError(f"image id {image_id!r}: boxes must be (R, 4), got {boxes.shape}")
    if mode == BoxMode.XYWH_ABS:
        boxes = boxes.astype(np.float64)  # so that x + w is rounded once
        boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def _scores(image_id: Any, value: Any) -> np.ndarray:
    return _numbers(image_id, value, "objectness_logits", 1).astype(np.float32)


def _numbers(image_id: Any, value: Any, key: str, ndim: int) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise ValueError(f"image id {image_id!r}: {key} must be an array of numbers")
    if value.size == 0:  # Detectron1 writes (0,)
        return np.zeros((0, 4)[:ndim], dtype=np.float32)
    if value.ndim != ndim:
        raise ValueError(f"image id {image_id!r}: {key} has the shape {value.shape}")
    return value


def summary(file: str | os.PathLike) -> str:
    """A one-line summary of a proposal file's size."""
    proposals = open_proposals(file)
    return f"{os.fspath(file)}: {proposals.num_boxes} boxes on {len(proposals)} images"
