"""What a model was trained on: in every checkpoint under ``trained_on``, and as JSON beside them.

With it a model can leave its machine: its classes have names without its dataset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

KEY = "trained_on"
FILE = "trained_on.json"


@dataclass(frozen=True)
class TrainedOn:
    """What a model was trained on. All of it plain values, as a checkpoint and JSON hold them.

    Attributes:
        classes: names of the classes, in the order of their numbers; empty if the datasets have
            none.
        category_ids: the id that the datasets give each class; empty if they do not say.
        datasets: names of ``DATASETS.TRAIN``.
        images: how many were trained on.
        boxes: how many of their boxes count as objects; crowd regions do not.
        data_sha256: of the images' names and sizes and of their objects
            (:func:`fpn_ext.data.digest.data_digest`).
        image_bytes: of the image files together; 0 where it was not noted.
        pixel_format: ``INPUT.FORMAT``.
        pixel_mean, pixel_std: ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``.
        value_range: ``INPUT.FPN_EXT.VALUE_RANGE``.
        model_keys: the keys of ``MODEL`` that change what the weights compute without changing
            their shapes, such as sizes of anchors, and their values as text.
        keypoint_names: with ``MODEL.KEYPOINT_ON``, those of the datasets.
        keypoint_flip_map: pairs of names that a horizontal flip exchanges.
    """

    classes: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    images: int = 0
    boxes: int = 0
    data_sha256: str = ""
    image_bytes: int = 0
    pixel_format: str = ""
    pixel_mean: list[float] = field(default_factory=list)
    pixel_std: list[float] = field(default_factory=list)
    value_range: list[float] = field(default_factory=list)
    model_keys: dict[str, str] = field(default_factory=dict)
    keypoint_names: list[str] = field(default_factory=list)
    keypoint_flip_map: list[list[str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def changes(self, now: "TrainedOn") -> list[str]:
        """What ``now`` has otherwise, a sentence each; ``datasets`` are named by the config.

        >>> TrainedOn(["cat"], images=3).changes(TrainedOn(["cat", "dog"], images=3))
        ["classes were ['cat'], now they are ['cat', 'dog']"]
        >>> before, now = TrainedOn(images=3, data_sha256="a"), TrainedOn(images=3, data_sha256="b")
        >>> before.changes(now)
        ['other images, sizes or boxes, though as many: data_sha256 was a, it is now b']
        >>> TrainedOn(images=3, image_bytes=700).changes(TrainedOn(images=3, image_bytes=900))
        ['the image files had 700 bytes together, now 900: pictures were replaced']
        """
        said = []
        for name in ("classes", "keypoint_names"):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now:
                said.append(f"{name} were {was}, now they are {is_now}")
        counts = [
            f"{getattr(self, name)} {name}, now {getattr(now, name)}"
            for name in ("images", "boxes")
            if getattr(self, name) != getattr(now, name)
        ]
        said += [f"there were {count}" for count in counts]
        if self.data_sha256 != now.data_sha256 and not counts:
            said.append(
                "other images, sizes or boxes, though as many: data_sha256 was "
                f"{self.data_sha256[:12]}, it is now {now.data_sha256[:12]}"
            )
        sizes = self.image_bytes, now.image_bytes
        if self.images == now.images and all(sizes) and sizes[0] != sizes[1]:
            said.append(
                f"the image files had {sizes[0]} bytes together, now {sizes[1]}: pictures were "
                "replaced"
            )
        return said


def trained_on_of(checkpoint: Mapping[str, Any]) -> TrainedOn | None:
    """What a checkpoint says its model was trained on; None for one that does not say.

    Raises:
        ValueError: what it says is of another form.

    >>> trained_on_of({"model": {}, "trained_on": {"classes": ["cat"], "images": 3}}).classes
    ['cat']
    """
    if KEY not in checkpoint:
        return None
    record = checkpoint[KEY]
    if not isinstance(record, Mapping):
        raise ValueError(f"{KEY!r} of the checkpoint is a {type(record).__name__}, not a mapping")
    known = {f.name: record[f.name] for f in fields(TrainedOn) if f.name in record}
    result = TrainedOn(**known)
    default = TrainedOn()
    for name, value in known.items():
        wanted = type(getattr(default, name))
        if not isinstance(value, wanted):
            raise ValueError(
                f"{KEY}.{name} of the checkpoint is a {type(value).__name__}, not a "
                f"{wanted.__name__}"
            )
    strings = all(isinstance(n, str) for n in (*result.classes, *result.keypoint_names))
    if not strings or not all(type(i) is int for i in result.category_ids):
        raise ValueError(f"{KEY} of the checkpoint: names must be text, category_ids numbers")
    return result


def check_class_names(
    model: Sequence[str], other: Sequence[str], whose: str, weights: str, option: str
) -> None:
    """Raise unless two lists of class names are the same: names, count and order.

    Args:
        model: those of the model.
        other: those it is to be used with.
        whose: whom ``other`` belongs to, in words.
        weights: the checkpoint.
        option: the config key that renames the model's classes.

    Raises:
        ValueError: they differ; both lists are shown.
    """
    if list(model) == list(other):
        return
    if len(model) != len(other):
        how = f"{len(model)} and {len(other)} classes"
    elif sorted(model) == sorted(other):
        how = "the same names in another order"
    else:
        number = next(i for i in range(len(model)) if model[i] != other[i])
        how = f"the first to differ is class {number}: {model[number]!r} and {other[number]!r}"
    example = list(other) if len(model) == len(other) else "[...]"
    raise ValueError(
        f"the classes of {weights} are not those of {whose} ({how}):\n"
        f"  the model's: {list(model)}\n"
        f"  {whose}: {list(other)}\n"
        "Use a dataset with the model's classes. If they are the same classes in the same order "
        f'under other names, rename the model\'s: {option} "{example}"'
    )
