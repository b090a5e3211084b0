"""The training loader: Detectron2's order and batches, from any batch, with any workers."""

import itertools
import random

import fpn_ext
import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from fpn_ext.engine import repeatable
from fpn_ext.engine.repeatable import (
    RepeatableTrainLoader,
    SeededIterations,
    batches_of,
    use_deterministic_algorithms,
)
from hypothesis import given
from hypothesis import strategies as st

NUM_IMAGES = 7


def records():
    """Wide and tall images; without files, which :func:`mapper` does not read."""
    return [
        {
            "file_name": f"{i}.png",
            "image_id": i,
            "width": 60 + 20 * (i % 2),
            "height": 70,
            "annotations": [{"category_id": i % 2}],
        }
        for i in range(NUM_IMAGES)
    ]


def mapper(record):
    """An image's index and the random numbers of its augmentation."""
    return record["image_id"], np.random.rand(), random.random(), torch.rand(1).item()


def loader(*opts):
    cfg = fpn_ext.load_config(
        "configs/Base-FPN.yaml",
        ["SEED", "3", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", *opts],
    )
    return RepeatableTrainLoader(cfg, mapper, records())


def first(of, count=12):
    return list(itertools.islice(iter(of), count))


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 4), st.booleans())
def test_batches_are_detectron2s(order, size, grouped):
    sizes = [(2, 1), (1, 1), (1, 2), (3, 2), (2, 3)]
    images = [{"index": i, "width": sizes[i][0], "height": sizes[i][1]} for i in order]
    if not grouped:
        images = [image | {"width": 1, "height": 1} for image in images]
    groups = [int(w > h) for w, h in sizes] if grouped else None
    expected = [[i["index"] for i in b] for b in AspectRatioGroupedDataset(images, size)]
    found = list(batches_of(order, groups, size))
    assert [[index for _, index in batch] for batch in found] == expected
    assert all(order[position] == index for batch in found for position, index in batch)


def test_every_image_once_per_epoch():
    plain = loader("DATALOADER.ASPECT_RATIO_GROUPING", "False", "SOLVER.IMS_PER_BATCH", "7")
    epochs = [[image for image, *_ in batch] for batch in first(plain, 3)]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_wide_and_tall_images_are_not_mixed():
    for batch in first(loader()):
        assert len(batch) == 2 and len({image % 2 for image, *_ in batch}) == 1


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_begun_anywhere_it_gives_the_same(workers, sampler):
    """The same images, and the same random numbers for each."""
    opts = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", "0.5"]
    expected = first(loader(*opts))
    assert len({draw for batch in expected for _, draw, *_ in batch}) == 24
    later = loader(*opts, "DATALOADER.NUM_WORKERS", workers)
    later.first_batch = 5
    torch.manual_seed(99)
    np.random.seed(99)
    assert first(later, 7) == expected[5:]
    assert first(loader(*opts, "SEED", "4")) != expected


def test_the_seed_may_be_set_later():
    other = loader("SEED", "4")
    other.seed = 3
    assert first(other) == first(loader())


@pytest.fixture
def as_main(monkeypatch):
    """Detectron2 main gives its samplers the SEED of the config, -1 too."""
    parts_of = repeatable._train_loader_from_config

    def parts_on_main(cfg, mapper, dataset):
        parts = parts_of(cfg, mapper, dataset=dataset)
        return {**parts, "sampler": TrainingSampler(len(dataset), seed=cfg.SEED)}

    def apply():
        monkeypatch.setattr(repeatable, "_train_loader_from_config", parts_on_main)

    return apply


def test_the_order_is_the_same_on_main(as_main):
    expected = first(loader())
    as_main()
    assert first(loader()) == expected
    test_the_seed_may_be_set_later()


def test_without_a_seed_main_has_another_order_each_time(as_main):
    as_main()
    images = [[[i for i, *_ in b] for b in first(loader("SEED", "-1"))] for _ in range(4)]
    assert any(order != images[0] for order in images)


def test_loading_leaves_the_models_random_numbers_alone():
    def draws():
        return torch.rand(1).item(), np.random.rand(), random.random()

    def seed():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    expected = draws()
    seed()
    first(loader())
    assert draws() == expected


def test_images_of_unknown_size_cannot_be_grouped():
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml")
    unknown = [{"file_name": "a.png", "annotations": []}]
    with pytest.raises(ValueError, match=r"a\.png: .* or set DATALOADER\.ASPECT_RATIO_GROUPING Fa"):
        RepeatableTrainLoader(cfg, mapper, unknown)


def test_the_batch_is_divided_among_processes(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 2 .* 3 processes"):
        loader()


def test_processes_divide_the_images(monkeypatch):
    """Each takes its share of one order, with separate random numbers."""
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", "False", "SOLVER.IMS_PER_BATCH", "2"]
    alone = first(loader(*opts), 14)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda value: [value] * 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        ranks.append([image for (image,) in first(loader(*opts), 14)])
    assert [[i for i, *_ in pair] for pair in zip(*ranks, strict=True)] == [
        [i for i, *_ in batch] for batch in alone
    ]
    assert not {draw for _, draw, *_ in ranks[0]} & {draw for _, draw, *_ in ranks[1]}


class TrainerOf:
    start_iter = 0
    iter = 0


def draws_of_iterations(hook, iterations, disturb=lambda: None):
    hook.trainer = TrainerOf()
    found = []
    for hook.trainer.iter in iterations:
        hook.before_step()
        found.append((torch.rand(1).item(), np.random.rand(), random.random()))
        disturb()
    return found


def test_an_iterations_random_numbers_are_its_own():
    hook = SeededIterations(loader())
    expected = draws_of_iterations(hook, range(6))
    assert len(set(expected)) == 6
    assert draws_of_iterations(hook, range(3, 6)) == expected[3:]
    assert draws_of_iterations(hook, range(6), lambda: torch.rand(7)) == expected


def test_a_random_seed_goes_on_after_a_resume(caplog):
    begun = SeededIterations(loader("SEED", "-1"))
    resumed = SeededIterations(loader("SEED", "-1"))
    assert begun.loader.seed != resumed.loader.seed
    resumed.load_state_dict(begun.state_dict())
    assert first(resumed.loader) == first(begun.loader)
    assert "SEED" not in caplog.text
    other = SeededIterations(loader("SEED", "8"))
    other.load_state_dict(SeededIterations(loader()).state_dict())
    assert other.loader.seed == 3
    assert "SEED is 8; going on with 3, which this training began with" in caplog.text


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_deterministic_switch_needs_a_seed():
    cfg = fpn_ext.load_config("configs/Base-FPN.yaml", ["SOLVER.FPN_EXT.DETERMINISTIC", "True"])
    with pytest.raises(ValueError, match=r"DETERMINISTIC needs a fixed seed, got SEED -1"):
        fpn_ext.check_config(cfg)
    cfg.SEED, cfg.CUDNN_BENCHMARK = 1, True
    with pytest.raises(ValueError, match=r"CUDNN_BENCHMARK chooses by time; set it to False"):
        fpn_ext.check_config(cfg)
