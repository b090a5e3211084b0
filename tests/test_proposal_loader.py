import itertools
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fpn_ext.proposals.detectron2_pickle import convert
from fpn_ext.proposals.file import ProposalFile, write_proposals
from fpn_ext.proposals.loader import ProposalMapper, build_test_loader, training_data
from pictures import box, registered
from proposals import random_proposals, rewrite, write_random
from safetensors.numpy import load_file

FIRST, SECOND = "test_loader_first", "test_loader_second"
OBJECT = [box(10, 10, 50, 50)]
# Ids are those of the other dataset, too, as in any two COCO files numbered from 1.
IMAGES = {
    FIRST: {1: ((80, 60), OBJECT), 2: ((80, 60), []), 3: ((60, 80), OBJECT)},
    SECOND: {1: ((80, 60), OBJECT), 2: ((80, 60), OBJECT)},
}
COUNTS = {FIRST: {1: 9, 2: 7, 3: 8}, SECOND: {1: 5, 2: 6}}


def build_train_loader(cfg):
    """In Detectron2's order, to compare with its own loader."""
    parts = training_data(cfg)
    dataset = parts.pop("records", None)
    return build_detection_train_loader(cfg, dataset=dataset, **parts)


@pytest.fixture(autouse=True)
def datasets(tmp_path):
    with (
        registered(FIRST, tmp_path / FIRST, IMAGES[FIRST]),
        registered(SECOND, tmp_path / SECOND, IMAGES[SECOND]),
    ):
        yield


@pytest.fixture
def files(tmp_path):
    """A proposal file for each dataset; boxes inside 60 x 60, so inside every image."""
    for seed, (name, counts) in enumerate(COUNTS.items()):
        made = random_proposals(counts.values(), seed=seed)
        write_proposals(tmp_path / f"{name}.safetensors", counts, made, dataset=name, source="")
    return [str(tmp_path / f"{name}.safetensors") for name in COUNTS]


@pytest.fixture
def cfg(small_cfg, files):
    small_cfg.MODEL.LOAD_PROPOSALS = True
    small_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    small_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    small_cfg.DATASETS.TRAIN = small_cfg.DATASETS.TEST = (FIRST, SECOND)
    small_cfg.DATASETS.PROPOSAL_FILES_TRAIN = tuple(files)
    small_cfg.DATASETS.PROPOSAL_FILES_TEST = tuple(files)
    small_cfg.DATALOADER.NUM_WORKERS = 0
    small_cfg.INPUT.MIN_SIZE_TRAIN = (60,)
    small_cfg.INPUT.MIN_SIZE_TEST = 60
    small_cfg.INPUT.RANDOM_FLIP = "none"
    small_cfg.SOLVER.IMS_PER_BATCH = 2
    return small_cfg


def as_pickles(cfg, tmp_path):
    """The same config with Detectron2's files."""
    cfg = cfg.clone()
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        files = []
        for i, file in enumerate(cfg.DATASETS[key]):
            convert(file, tmp_path / f"{i}.pkl")
            files.append(str(tmp_path / f"{i}.pkl"))
        cfg.DATASETS[key] = tuple(files)
    return cfg


def check_same(found, expected):
    assert found.keys() == expected.keys()
    assert found["file_name"] == expected["file_name"]
    own, theirs = found["proposals"], expected["proposals"]
    assert own.image_size == theirs.image_size
    assert torch.equal(own.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
    assert torch.equal(own.objectness_logits, theirs.objectness_logits)


def images_of(loader, batches):
    return [image for batch in itertools.islice(loader, batches) for image in batch]


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_test_loader_gives_what_detectron2s_gives(cfg, tmp_path, name):
    pickles = as_pickles(cfg, tmp_path)
    expected = images_of(build_detection_test_loader(pickles, name), None)
    assert [len(image["proposals"]) for image in expected] == list(COUNTS[name].values())
    for own in (cfg, pickles):
        for found, image in zip(images_of(build_test_loader(own, name), None), expected,
                                strict=True):  # fmt: skip
            check_same(found, image)


@pytest.mark.parametrize("filter_empty", [True, False])
def test_a_training_loader_gives_what_detectron2s_gives(cfg, tmp_path, filter_empty):
    """Boxes flipped and resized as the image; ids that two datasets share; empty images."""
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.MIN_SIZE_TRAIN = (50, 70)
    pickles = as_pickles(cfg, tmp_path)
    seed_all_rng(1)
    expected = images_of(build_detection_train_loader(pickles), 12)
    assert len({image["file_name"] for image in expected}) == (4 if filter_empty else 5)
    for own in (cfg, pickles):
        seed_all_rng(1)
        for found, image in zip(images_of(build_train_loader(own), 12), expected, strict=True):
            check_same(found, image)
            assert found["instances"].gt_boxes.tensor.equal(image["instances"].gt_boxes.tensor)


def test_the_best_proposals_are_taken(cfg):
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 3
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 4
    whole = ProposalFile(cfg.DATASETS.PROPOSAL_FILES_TEST[0])
    image = images_of(build_test_loader(cfg, FIRST), 1)[0]
    assert image["proposals"].objectness_logits.tolist() == whole[1][1][:3].tolist()
    for image in images_of(build_train_loader(cfg), 3):
        assert len(image["proposals"]) == 4


def test_worker_processes(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    for image in images_of(build_test_loader(cfg, SECOND), None):
        assert len(image["proposals"]) == COUNTS[SECOND][image["image_id"]]


def test_what_workers_are_given_does_not_grow_with_the_proposals(cfg, tmp_path):
    sizes = []
    for count in (1, 100_000):
        write_random(tmp_path / "x.safetensors", {1: count})
        mapper = ProposalMapper(cfg, False, [ProposalFile(tmp_path / "x.safetensors")])
        sizes.append(len(pickle.dumps(mapper)))
    assert sizes[0] == sizes[1]


def test_without_proposals_the_loaders_are_detectron2s(cfg):
    cfg.MODEL.LOAD_PROPOSALS = False
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ("none.pkl",)
    assert "proposals" not in images_of(build_test_loader(cfg, FIRST), 1)[0]
    assert "proposals" not in images_of(build_train_loader(cfg), 1)[0]


# What does not fit is said at the start.


def both_loaders(cfg):
    yield lambda: build_train_loader(cfg)
    yield lambda: build_test_loader(cfg, FIRST)


def test_images_without_an_entry(cfg, tmp_path):
    write_random(tmp_path / "x.safetensors", {3: 4, 9: 4}, dataset="another")
    file = str(tmp_path / "x.safetensors")
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (file, file)
    for build in both_loaders(cfg):
        with pytest.raises(ValueError) as error:
            build()
        assert error.match(
            r"x\.safetensors has no entry for 2 of the 3 images of dataset 'test_loader_first': "
            r"image ids 1, 2\. It was made for 'another'"
        )


def test_entries_for_other_images_are_said(cfg, tmp_path, caplog):
    write_random(tmp_path / "x.safetensors", {1: 4, 2: 4, 3: 4, 8: 4, 9: 4}, dataset="another")
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "x.safetensors"),) * 2
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        build_test_loader(cfg, FIRST)
    texts = [record.getMessage() for record in caplog.records]
    assert (
        "entries for 2 images that dataset 'test_loader_first' has not: image ids 8, 9"
        in (texts[0])
    )
    assert "was made for dataset 'another' and is used for 'test_loader_first'" in texts[1]


def test_a_matching_file_is_no_reason_to_warn(cfg, caplog):
    with caplog.at_level(logging.WARNING, logger="fpn_ext"):
        build_test_loader(cfg, FIRST)
        build_train_loader(cfg)
    assert not caplog.records


def test_a_file_for_each_dataset(cfg):
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TRAIN[:1]
    with pytest.raises(ValueError, match=r"PROPOSAL_FILES_TRAIN has 1 files for the 2 datasets"):
        build_train_loader(cfg)


def test_a_missing_file(cfg):
    for kind in ("safetensors", "pkl"):
        cfg.DATASETS.PROPOSAL_FILES_TEST = (f"none.{kind}",) * 2
        with pytest.raises(FileNotFoundError, match=rf"no file of proposals none\.{kind}"):
            build_test_loader(cfg, FIRST)


def test_nothing_to_train_on(cfg, tmp_path):
    images = {1: ((80, 60), [box(1, 1, 5, 5, iscrowd=1)])}
    with registered("test_loader_empty", tmp_path / "empty", images):
        write_random(tmp_path / "x.safetensors", {1: 4})
        cfg.DATASETS.TRAIN = ("test_loader_empty",)
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(tmp_path / "x.safetensors"),)
        with pytest.raises(ValueError, match=r"no object to train on in its 1 images"):
            build_train_loader(cfg)


@pytest.mark.parametrize("damage", ["boxes", "scores", "order"])
def test_values_that_would_spoil_the_training(cfg, damage):
    """Written by others, or damaged; found when the image is read."""
    file = cfg.DATASETS.PROPOSAL_FILES_TEST[0]
    tensors = load_file(file)
    if damage == "order":
        tensors["scores"] = np.sort(tensors["scores"])
    else:
        tensors[damage].flat[0] = np.nan
    rewrite(file, **tensors)
    with pytest.raises(ValueError, match=r"first\.safetensors, image id 1: boxes that are not"):
        images_of(build_test_loader(cfg, FIRST), None)


# Images without a single proposal.


@pytest.mark.parametrize("counts", [{1: 0, 2: 0, 3: 4}, {1: 0, 2: 0, 3: 0}])
def test_images_without_proposals_train_and_test(cfg, tmp_path, counts):
    """One of them has an object, one has none; in a batch with others and alone."""
    write_random(tmp_path / "x.safetensors", counts)
    file = str(tmp_path / "x.safetensors")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (FIRST,)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (file,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    model = build_model(cfg)
    found = images_of(build_test_loader(cfg, FIRST), None)
    assert [len(image["proposals"]) for image in found] == list(counts.values())
    with torch.no_grad():
        for image, (output,) in zip(found, (model.eval()([i]) for i in found), strict=True):
            assert len(image["proposals"]) or not len(output["instances"])
        together = model([found[0], found[2]])
        assert len(together[0]["instances"]) == 0
    with EventStorage():
        for append in (True, False):
            model.roi_heads.proposal_append_gt = append
            for batch in itertools.islice(build_train_loader(cfg), 6):
                losses = model.train()(batch)
                total = sum(losses.values())
                total.backward()
                assert torch.isfinite(total)


WORKER = """
if __name__ == "__main__":  # a spawned worker imports this file: it is to find nothing in it
    import torch, fpn_ext
    from fpn_ext.data.datasets import register_datasets
    from fpn_ext.proposals.loader import build_test_loader
    torch.multiprocessing.set_start_method("spawn")
    register_datasets()
    cfg = fpn_ext.load_config("configs/demo/faster_rcnn_R_18_FPN.yaml")
    cfg.DATALOADER.NUM_WORKERS = 1
    print(next(iter(build_test_loader(cfg, "demo_multiscale_val")))[0]["image"].shape[0])
"""


@pytest.mark.slow
def test_a_worker_that_starts_afresh(demo_images, tmp_path):
    """A spawned or forkserver (Python 3.14) worker gets the images before any import."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # seconds, of some 10: a dead worker is waited for without end
    )
    assert done.stdout == "3\n", done.stderr[-2000:]
