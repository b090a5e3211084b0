"""Detectron2's checkpointer, with files written atomically and read as data only."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..unwrap import unwrapped
from .atomic import replacing
from .tensor_names import names_in_file
from .weight_files import DamagedFileError, local_file, read_weights


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's DetectionCheckpointer with stricter error handling.

    Files are read by :func:`fpn_ext.files.weight_files.read_weights`: no code in them runs, damage
    is detected. They are written atomically, so a kill or a full disk leaves the previous file
    intact. Resuming skips damaged and missing files. One log line says how much of the model a file
    matched; no match at all is an error.

    Attributes:
        file (str): the file loaded last.
        matched (str): how many tensors of the model it matched, by part of the model.
        other_shapes (tuple of str): tensors not loaded because their shapes differ.
        in_every_file (dict): what is written beside the model into every file: plain values.
    """

    file = ""
    matched = ""
    other_shapes: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.in_every_file: dict[str, Any] = {}

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Detectron2's, for a path or URL (:func:`fpn_ext.files.weight_files.local_file`).

        Raises:
            ValueError: the file is damaged, requests code, or matches no tensor of the model.
        """
        # Past Detectron2's own load. What it does is for a model in DistributedDataParallel, and no
        # checkpointer holds that wrapper; main's cuts a name at its "?", and after a file that
        # could not be read fails on every other.
        return Checkpointer.load(self, local_file(path) if path else path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        self.file = filename
        return read_weights(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        given = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        self.other_shapes = tuple(
            f"{key} is {there}, the model's {here}"
            for key, there, here in incompatible.incorrect_shapes
        )
        needed = [name for name in self.model.state_dict() if _counts(name)]
        missing = {name for name in incompatible.missing_keys if _counts(name)}
        if needed and missing.issuperset(needed):
            raise ValueError(
                f"{self.file} fits no tensor of the model: it has {given[:3]} (of {len(given)}), "
                f"the model {needed[:3]} (of {len(needed)}). "
                + (
                    _bottom_ups(given, needed)
                    or "Check MODEL.WEIGHTS, and that the config builds the model the file was "
                    "made with; weights of a classification network go under "
                    "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS"
                )
            )
        say = self.logger.warning if missing else self.logger.info
        self.matched = matched_share(needed, missing)
        say("Weights of %s: %s", self.file, self.matched)
        in_vain = [name for name in missing if name.startswith(BOTTOM_UP)]
        hint = _bottom_ups(given, in_vain) if in_vain else ""
        if hint:
            self.logger.warning(hint)
        return incompatible

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's: ``{name}.pth``, then its name into ``last_checkpoint``; each atomically.

        Raises:
            OSError: the disk is full or not writable. Earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **self.in_every_file, **kwargs}
        self._save(name, data)
        self.tag_last_checkpoint(f"{name}.pth")

    def export(self, name: str, model: nn.Module, **kwargs: Any) -> None:
        """Write the weights of a model to ``{name}.pth``: for MODEL.WEIGHTS, not for resuming.

        Args:
            name: not of the form ``*_0000123`` or ``*_final``, which are checkpoints.
            model: may be wrapped in DistributedDataParallel.
            kwargs: further entries beside ``model``.

        Raises:
            OSError: as :meth:`save`.
        """
        if self.save_dir and self.save_to_disk:
            weights = {"model": unwrapped(model).state_dict()}
            self._save(name, {**weights, **self.in_every_file, **kwargs})

    def _save(self, name: str, data: dict[str, Any]) -> None:
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        self._write(file, lambda stream: torch.save(data, stream))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        text = last_filename_basename.encode()
        self._write(Path(self.save_dir, "last_checkpoint"), lambda stream: stream.write(text))

    def _write(self, file: Path, write: Callable[[IO[bytes]], Any]) -> None:
        try:
            with replacing(file) as stream:
                write(stream)
        except OSError as error:
            last = _tagged(self.save_dir)
            raise OSError(
                error.errno,
                f"{file} could not be written: {error.strerror}. Make room in {self.save_dir}; "
                + (f"then --resume goes on from {last}" if last else "it holds no checkpoint yet"),
            ) from error

    def has_checkpoint(self) -> bool:
        return bool(checkpoints_in(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """With ``resume``, load the last readable checkpoint; else the weights of ``path``.

        With ``resume`` and a folder without any checkpoint, as after a job killed early, loads the
        weights of ``path`` and logs it. Called in all processes, which all load the same file.

        Raises:
            ValueError: there are checkpoints but none is readable; processes see different ones;
                or what :meth:`load` raises.
        """
        candidates = checkpoints_in(self.save_dir) if resume else []
        if resume:
            self._check_all_see([file.name for file in candidates])
        if not candidates:
            if resume:
                self.logger.warning("No checkpoint to resume from in %s", self.save_dir)
            return self.load(path, checkpointables=[])
        faults = []
        for file in candidates:
            fault, rest = "", {}
            try:
                rest = self.load(str(file))
            except (DamagedFileError, OSError) as error:
                fault = str(error)
            if fault := next(filter(None, comm.all_gather(fault)), ""):
                faults.append(fault)
                continue
            if faults:
                self.logger.warning("%s. Going on from the one before: %s", "; ".join(faults), file)
            return rest
        raise ValueError(
            f"no checkpoint in {self.save_dir} can be resumed from: {'; '.join(faults)}. Copy one "
            "there, or start anew without --resume"
        )

    def _check_all_see(self, names: list[str]) -> None:
        for rank, others in enumerate(comm.all_gather(names)):
            if others != names:
                raise ValueError(
                    f"--resume: in OUTPUT_DIR {self.save_dir} the process of rank "
                    f"{comm.get_rank()} finds {names or 'no checkpoint'}, that of rank {rank} "
                    f"{others or 'none'}: OUTPUT_DIR must be one folder that all machines share"
                )


class CompleteCheckpointer(SafeCheckpointer):
    """For inference: a model tensor missing from the file is an error.

    In Detectron2 it keeps its random initialization, with an AP of 0 as the only symptom.
    """

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        faults = list(self.other_shapes)
        others = {key for key, *_ in incompatible.incorrect_shapes}
        missing = [k for k in incompatible.missing_keys if _counts(k) and k not in others]
        if missing:
            faults.append(f"it has no {', '.join(missing[:3])} (of {len(missing)})")
        if faults:
            raise ValueError(
                f"{self.file} does not fill the model, and random weights detect nothing: "
                f"{'; '.join(faults)}. Evaluate with the config it was trained with (another class "
                "count is MODEL.ROI_HEADS.NUM_CLASSES), or train with it as MODEL.WEIGHTS first"
            )
        return incompatible


def described(file: str, checkpoint: Mapping[str, Any]) -> str:
    """A checkpoint and how far its training was, in words.

    Args:
        checkpoint: what the file holds.

    >>> described("model_0000199.pth", {"iteration": 199})
    'model_0000199.pth, after 200 iterations'
    >>> best = {"metric": "bbox/AP", "score": 52.128, "iteration": 400}
    >>> described("model_best.pth", {"best": best})
    'model_best.pth, the best bbox/AP, 52.13, after 400 iterations'
    """
    iteration, best = checkpoint.get("iteration"), checkpoint.get("best")
    if isinstance(best, Mapping) and {"metric", "score", "iteration"} <= best.keys():
        return (
            f"{file}, the best {best['metric']}, {best['score']:.4g}, "
            f"after {best['iteration']} iterations"
        )
    return f"{file}, after {iteration + 1} iterations" if isinstance(iteration, int) else file


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder to resume from, most recent first.

    Raises:
        ValueError: ``last_checkpoint`` names a file of another folder.
    """
    numbers = {f: _number(f.name) for f in Path(folder).glob("*.pth")}
    numbered = {file: number for file, number in numbers.items() if number is not None}
    older = sorted(numbered, key=numbered.__getitem__, reverse=True)
    last = _tagged(folder)
    if last is None:
        return older
    limit = _number(last.name)
    # Higher numbers are left over from another run in the same folder.
    return [last, *(f for f in older if limit is None or numbered[f] < limit)]


def _tagged(folder: str | os.PathLike) -> Path | None:
    """The checkpoint named in the file ``last_checkpoint``, or None."""
    tag = Path(folder, "last_checkpoint")
    name = tag.read_text(errors="replace").strip() if tag.is_file() else ""
    if not name:
        return None
    if os.path.basename(name) != name or name == os.pardir:
        raise ValueError(
            f"{tag} names {name!r}, a file of another folder, which is not resumed: "
            "write the name of a checkpoint of this folder into it, or remove it"
        )
    return Path(folder, name)


def _number(name: str) -> float | None:
    """The iteration in a checkpoint's name, infinity for the final one; None for other names."""
    match = re.fullmatch(r"\w+_(\d{7}|final)\.pth", name)
    return None if not match else float("inf") if match[1] == "final" else int(match[1])


def _counts(name: str) -> bool:
    """Whether a model needs this tensor; BatchNorm's step counter is unused."""
    return not name.endswith("num_batches_tracked")


def matched_share(needed: list[str], missing: set[str]) -> str:
    """How many of a model's tensors a checkpoint matched, by part of the model.

    >>> names = ["backbone.bottom_up.stem.weight", "backbone.fpn_output2.bias", "roi_heads.w"]
    >>> matched_share(names, {"roi_heads.w"})
    'backbone 1 of 1, pyramid 1 of 1, heads 0 of 1 tensors matched; the rest keeps its first values'
    """
    total = Counter(map(_part, needed))
    lost = Counter(map(_part, missing))
    parts = [
        f"{part} {total[part] - lost[part]} of {total[part]}" for part in _PARTS if total[part]
    ]
    rest = "; the rest keeps its first values" if missing else ""
    return f"{', '.join(parts)} tensors matched{rest}"


def _bottom_ups(given: list[str], needed: list[str]) -> str:
    """What to do if a file has most of the bottom-up's tensors, under the bottom-up's own names."""
    names = [name.removeprefix(BOTTOM_UP) for name in needed if name.startswith(BOTTOM_UP)]
    if not names or len(names_in_file(names, given)) < 0.5 * len(names):
        return ""
    return (
        "Its tensors are those of the network under the pyramid: name the file in "
        "MODEL.FPN_EXT.BOTTOM_UP_WEIGHTS, and leave MODEL.WEIGHTS empty"
    )


BOTTOM_UP = "backbone.bottom_up."
_PARTS = ("backbone", "pyramid", "heads")


def _part(name: str) -> str:
    if not name.startswith("backbone."):
        return "heads"
    return "pyramid" if name.startswith(("backbone.fpn_", "backbone.top_block.")) else "backbone"
