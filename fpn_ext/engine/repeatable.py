"""Training unaffected by a kill and --resume: its random numbers and its data order.

Both depend only on a seed and the iteration, not on history. Detectron2's data order restarts with
every process, and its augmentation depends on worker timing.
"""

import contextlib
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..data.mapper import PictureMapper
from ..data.summary import DataSummary, summary_of
from ..keys import declare
from .interrupts import leave_signals_to_the_trainer
from .testing import changed

declare(
    "SOLVER.FPN_EXT.DETERMINISTIC",
    False,
    "True: PyTorch computes the same bits on every run, or says which operator cannot; "
    "needs a SEED >= 0.",
    "training",
)

logger = logging.getLogger(__name__)

_IMAGES, _ITERATIONS, _ORDER = range(3)  # separate random streams


def use_deterministic_algorithms() -> None:
    """Make PyTorch bitwise deterministic between runs on one machine, or raise an error.

    cuBLAS reads its setting on first use: call this before.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class RepeatableTrainLoader:
    """Endless training batches of a config, able to start at any batch without loading the rest.

    Order and batches are those of Detectron2's sampler (``DATALOADER.SAMPLER_TRAIN``) and its
    aspect-ratio grouping. Augmentation depends only on the seed and the image's position in that
    order, not on prefetching or the number of workers (except where a mapper drops images:
    Detectron2 chooses the replacements).

    Args:
        cfg: a Detectron2 config; ``SEED`` (negative: random) is the seed.
        mapper: from a record to the model's input; PictureMapper by default.
        records: Detectron2 records, if not those of ``DATASETS.TRAIN``.

    Attributes:
        seed (int): of data order and augmentation; may be set before iterating.
        first_batch (int): where iteration starts; may be set before iterating.
        summary (DataSummary): of the records.

    Raises:
        ValueError: grouping is enabled and a record has no ``width`` or ``height``; or the batch
            size is not divisible by the number of processes.
    """

    def __init__(
        self,
        cfg: CfgNode,
        mapper: Callable[[dict[str, Any]], Any] | None = None,
        records: list[dict[str, Any]] | None = None,
    ):
        world_size = comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is the batch of all {world_size} "
                "processes and must divide among them evenly"
            )
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.first_batch = 0
        self.mapper = PictureMapper(cfg, True) if mapper is None else mapper
        parts = self._parts(records)
        self.batch_size = parts["total_batch_size"] // world_size
        self.groups = aspect_groups(parts["dataset"]) if parts["aspect_ratio_grouping"] else None
        self.summary: DataSummary = summary_of(parts["dataset"])
        # Serialized; the list, gigabytes for COCO, is freed.
        self.records = DatasetFromList(parts["dataset"], copy=False)

    def __iter__(self) -> Iterator[list[Any]]:
        # A generator: Detectron2 v0.6 creates the iterator before the start position is known.
        if self.seed != self._sampler_seed:
            self._parts(self.records)
        batches = itertools.islice(
            batches_of(self.sampler, self.groups, self.batch_size), self.first_batch, None
        )
        images = iter(
            DataLoader(
                _SeededImages(MapDataset(self.records, self.mapper), self.seed),
                sampler=itertools.chain.from_iterable(batches),
                batch_size=None,
                collate_fn=trivial_batch_collator,
                num_workers=self.cfg.DATALOADER.NUM_WORKERS,
                worker_init_fn=leave_signals_to_the_trainer,
                generator=torch.Generator(),  # else it draws from the model's
            )
        )
        while True:
            yield list(itertools.islice(images, self.batch_size))

    def _parts(self, records: Any) -> dict[str, Any]:
        """What Detectron2 makes a loader of; the sampler in it becomes this loader's."""
        with _random_numbers_of(self.seed, _ORDER):
            of_order = comm.shared_random_seed()
        # v0.6's samplers draw that number; main's are given SEED, and take -1 for a number.
        cfg = changed(self.cfg, "SEED", of_order)
        with _random_numbers_of(self.seed, _ORDER):
            parts: dict[str, Any] = _train_loader_from_config(cfg, self.mapper, dataset=records)
        self.sampler, self._sampler_seed = parts["sampler"], self.seed
        return parts


def batches_of(
    order: Iterable[int], groups: list[int] | None, size: int
) -> Iterator[list[tuple[int, int]]]:
    """Full batches of (position in ``order``, index), each from a single group.

    Like Detectron2's AspectRatioGroupedDataset, on indices instead of loaded images.

    >>> list(batches_of([2, 0, 1, 2], groups=[0, 1, 0], size=2))
    [[(0, 2), (1, 0)]]
    """
    waiting: dict[int, list[tuple[int, int]]] = {}
    for position, index in enumerate(order):
        group = groups[index] if groups else 0
        batch = waiting.setdefault(group, [])
        batch.append((position, index))
        if len(batch) == size:
            yield waiting.pop(group)


def aspect_groups(records: list[dict[str, Any]]) -> list[int]:
    """The group of each record, 0 or 1 (wider than high), of which a batch has one.

    Raises:
        ValueError: a record has no width or height.
    """
    for record in records:
        if "width" not in record or "height" not in record:
            raise ValueError(
                f"{record.get('file_name')}: this record of DATASETS.TRAIN has no width and "
                "height; give them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )
    return [int(record["width"] > record["height"]) for record in records]


class _SeededImages(Dataset):
    def __init__(self, data: Dataset, seed: int):
        self.data = data
        self.seed = seed
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __getitem__(self, place: tuple[int, int]) -> Any:
        # Processes take turns in one order; positions do not depend on the number of processes.
        position, index = place
        position = position * self.world_size + self.rank
        with _random_numbers_of(self.seed, _IMAGES, 0, position):
            return self.data[index]


class SeededIterations(HookBase):
    """Seeds each iteration's random numbers, and sets the loader's seed and position.

    So evaluating between iterations, or resuming, changes nothing. The seed is saved in
    checkpoints: with ``SEED: -1`` a resumed training keeps it.

    Args:
        loader: the training loader.
        batches: number of its batches per iteration.
    """

    def __init__(self, loader: RepeatableTrainLoader, batches: int = 1):
        self.loader = loader
        self.batches = batches

    def before_train(self) -> None:
        self.loader.first_batch = self.trainer.start_iter * self.batches

    def before_step(self) -> None:
        _seed(self.loader.seed, _ITERATIONS, comm.get_rank(), self.trainer.iter)

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.loader.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        configured = self.loader.cfg.SEED
        if configured >= 0 and configured != state["seed"]:
            logger.warning(
                "SEED is %d; going on with %d, which this training began with",
                configured,
                state["seed"],
            )
        self.loader.seed = state["seed"]


def seeded_iterations(loader: Any, batches: int = 1) -> SeededIterations | None:
    """The hook for a training loader; None, with a log message, if its position cannot be set.

    Args:
        loader: a RepeatableTrainLoader, or any other endless loader.
        batches: as in :class:`SeededIterations`.
    """
    if isinstance(loader, RepeatableTrainLoader):
        return SeededIterations(loader, batches)
    logger.warning(
        "build_train_loader returned a %s: which images it gives after --resume is up to it. "
        "Return a fpn_ext.engine.repeatable.RepeatableTrainLoader (it takes a mapper and records), "
        "and a resumed training ends with the same bits",
        type(loader).__name__,
    )
    return None


def _seed(*words: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (also CUDA's) RNGs from non-negative integers."""
    python, numpy, torch_ = map(int, np.random.SeedSequence(words).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_)


@contextlib.contextmanager
def _random_numbers_of(*words: int) -> Iterator[None]:
    """CPU random numbers depend only on ``words`` within the block; state is restored after."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    python, numpy, torch_ = map(int, np.random.SeedSequence(words).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_)  # torch.manual_seed would also reseed CUDA
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
