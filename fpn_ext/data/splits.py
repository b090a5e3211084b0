"""A split of images that nothing divides yet: the same for the same seed, whatever their order."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..reporting.json_files import write_json
from .dataset import Dataset, names_of
from .picture_files import identity_of


def held_out(names: Collection[str], share: float, seed: int) -> set[str]:
    """The names held out for validation: ``share`` of them, at least one and never all.

    Drawn by the SHA-256 of seed and name, so that the order of the names has no part in it.

    >>> names = [f"{i}.jpg" for i in range(10)]
    >>> held_out(names, 0.2, seed=1) == held_out(names[::-1], 0.2, seed=1)
    True
    >>> len(held_out(names, 0.2, seed=1)), len(held_out(names, 0.01, seed=1))
    (2, 1)
    """
    if share <= 0 or len(names) < 2:
        return set()
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return set(drawn[:count])


def divide(
    dataset: Dataset, share: float, seed: int, written: Path, given: Path | None = None
) -> str:
    """Hold out images as ``val`` where a dataset has none to score on, in place.

    Args:
        share: of the images, held out.
        seed: of the draw.
        written: the split that an earlier run of the same share and seed drew is read from this
            file, and a new one is written to it.
        given: a file that says the split in place of a draw.

    Returns:
        What was done; ``""`` for a dataset that is divided already.

    Raises:
        FileNotFoundError: no file ``given``.
        ValueError: ``given`` is no split, or not one of these images; or none of the images that
            were held out before is there.
    """
    splits = dataset.splits
    if "all" in splits:
        splits["train"] = splits.pop("all")
    if given and "val" in splits:
        raise ValueError(f"split_file {given}: the data have a val split already; leave it out")
    if "train" not in splits or "val" in splits or ("test" in splits and not given):
        return ""
    images = splits["train"]
    names = names_of([image.file for image in images])
    if given:
        val, how = set(_read(given)["val"]), f"as {given} says"
    elif earlier := _earlier(written, share, seed):
        val, how = set(earlier["val"]), f"as {written} says, an earlier draw"
        if new := len(set(names.values()) - val - set(earlier["train"])):
            how += f"; {new} images are not in it and are trained on"
    else:
        one_name: dict[object, str] = {}  # of a file that has several
        drawn_as = {
            name: one_name.setdefault(identity_of(file), name)
            for file, name in sorted(names.items(), key=lambda item: item[1])
        }
        drawn = held_out(set(drawn_as.values()), share, seed)
        val = {name for name in drawn_as if drawn_as[name] in drawn}
        if not val:
            return "no images are held out: nothing is scored"
        how = f"{share:g} of the images, drawn by seed {seed}; written to {written}"
        train = sorted(set(names.values()) - val)
        about = {"share": share, "seed": seed, "train": train, "val": sorted(val)}
        write_json(written, about)
    missing = sorted(val - set(names.values()))
    if missing and given:
        raise ValueError(
            f"split_file {given} names {len(missing)} images that are not there, first "
            f"{missing[0]!r}; it is of another dataset"
        )
    if missing and len(missing) == len(val):
        raise ValueError(
            f"{written}, the split of an earlier run, holds out {len(val)} images of which none is "
            f"there now, first {missing[0]!r}: were they moved? Delete the file to draw a new split"
        )
    if missing:
        how += f"; {len(missing)} of its images are gone"
    splits["train"] = [image for image in images if names[image.file] not in val]
    splits["val"] = [image for image in images if names[image.file] in val]
    return f"val is {len(splits['val'])} images, {how}"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"split_file: no file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"split_file: {file} is not JSON: {error}") from error
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("train", "val")]
    if not all(isinstance(names, list) for names in lists):
        raise ValueError(f"split_file: {file} must hold the lists train and val of file names")
    return dict(content)


def _earlier(file: Path, share: float, seed: int) -> dict[str, Any] | None:
    """The split of an earlier run, if it was asked for in the same words."""
    if not file.is_file():
        return None
    content = _read(file)
    same = (content.get("share"), content.get("seed")) == (share, seed)
    return content if same else None
