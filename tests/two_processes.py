"""Two processes on the CPU, with the variables set by srun or torchrun, and their results.

    python tests/two_processes.py FOLDER [everything]

They are forked from one that has imported everything; tests/test_distributed.py starts it, and does
the same in one process. It also starts and kills :func:`train_for_long`.
"""

# ruff: noqa: E402

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch; a multithreaded process cannot be forked
    os.chdir(ROOT)

import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm
from fpn_ext.__main__ import main
from fpn_ext.data import datasets, demo_data
from fpn_ext.engine import agreement, distributed, interrupts, nonfinite
from fpn_ext.engine.trainer import Trainer
from fpn_ext.files.checkpoint import SafeCheckpointer
from fpn_ext.tools.options import add_processes
from voc import write_voc

VOC = "two_processes_voc"

# Each choice takes away what makes N processes differ from one: docs/guides/distributed.md.
SAME_LOSSES = [
    *("MODEL.FPN_EXT.BOTTOM_UP_NORM", "FrozenBN"),
    *("MODEL.FPN.NORM", ""),
    *("DATALOADER.ASPECT_RATIO_GROUPING", False),
    *("INPUT.CROP.ENABLED", True),  # one size: no padding
    *("INPUT.CROP.TYPE", "absolute"),
    *("INPUT.CROP.SIZE", "[48, 48]"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048),  # all anchors
    *("MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 128),  # all 20 boxes of every image
    *("SOLVER.IMS_PER_BATCH", 4),
    *("SOLVER.MAX_ITER", 4),
    *("SOLVER.STEPS", "(2,)"),
    *("SOLVER.WARMUP_ITERS", 0),
]
# Nothing of that: batch norms, sampling, images of two sizes; and an evaluation at the end.
USUAL = [
    *("DATALOADER.ASPECT_RATIO_GROUPING", False),
    *("SOLVER.IMS_PER_BATCH", 4),
    *("SOLVER.MAX_ITER", 6),
    *("SOLVER.STEPS", "(5,)"),
    *("SOLVER.CHECKPOINT_PERIOD", 3),
    *("DATASETS.TEST", f"('{tiny.DATASET}', '{VOC}')"),
    *("INPUT.MIN_SIZE_TEST", 64),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("TEST.FPN_EXT.EVALUATE_PROPOSALS", True),
]
# Every switch that has to do with resuming or with several processes, together.
EVERYTHING = [
    *USUAL,
    *("DATASETS.TEST", f"('{tiny.DATASET}',)"),
    *("TEST.EVAL_PERIOD", 2),
    *("MODEL.MASK_ON", True),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.FPN_EXT.KEEP_LEVELS", True),
    *("SOLVER.CHECKPOINT_PERIOD", 2),
    *("SOLVER.FPN_EXT.ACCUMULATE", 2),
    *("SOLVER.FPN_EXT.DETERMINISTIC", True),
    *("SOLVER.FPN_EXT.EMA_DECAY", 0.9),
    *("TEST.FPN_EXT.BEST_METRIC", "bbox/AP"),
    *("SEED", 3),
]


def options_of(words):
    """The arguments of `fpn-ext train` for several processes."""
    parser = argparse.ArgumentParser()
    add_processes(parser)
    return parser.parse_args(words)


def register(folder):
    """Six images in COCO's format, three in Pascal VOC's."""
    tiny.register(folder / "tiny")
    if not (folder / "voc").exists():
        boxes = {"a": [("disc", 1, 1, 40, 40)], "b": [("star", 11, 11, 30, 50)], "c": []}
        write_voc(folder / "voc", boxes)
    datasets.register_voc_layout(VOC, folder / "voc", "train", demo_data.CLASS_NAMES)


def unregister():
    for name in {tiny.DATASET, VOC} & set(DatasetCatalog.keys()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Stopped(Exception):
    """Simulates a kill."""


class Watch(HookBase):
    """Records the mean losses over all processes, known to the main one; stops early."""

    def __init__(self, stop_after=None):
        self.losses = {}
        self.stop_after = stop_after

    def after_step(self):
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            self.losses[self.trainer.iter] = {k: v for k, (v, _) in latest.items() if "loss" in k}
        if self.trainer.iter + 1 == self.stop_after:
            raise Stopped


def train(cfg, resume=False, stop_after=None, hooks=()):
    """The trainer, and its losses by iteration."""
    torch.manual_seed(comm.get_rank())  # first weights: those of the main process count
    trainer = Trainer(cfg)
    watch = Watch(stop_after)
    trainer.register_hooks([watch, *hooks])
    trainer.resume_or_load(resume)
    with contextlib.suppress(Stopped):
        trainer.train()
    return trainer, watch.losses


def evaluate(cfg, weights):
    model = build_model(cfg)
    SafeCheckpointer(model).load(weights)
    return Trainer.test(cfg, model)


def images_of(loader, batches=5):
    """The contents of the first batches: image, and whether it was flipped or resized."""
    stream = iter(loader)
    return [
        [(image["image_id"], *image["image"].shape, image["image"].sum().item()) for image in batch]
        for batch in (next(stream) for _ in range(batches))
    ]


def trainings(folder):
    """What one process started by srun finds."""
    cfg = tiny.config(folder / "same", *SAME_LOSSES)
    found = {"same": train(cfg)[1], "processes": distributed.started_by()}
    cfg = tiny.config(folder / "usual", *USUAL)
    found["images"] = images_of(Trainer.build_train_loader(cfg))
    found["usual"] = train(cfg)[1]
    cfg = tiny.config(folder / "resumed", *USUAL)
    found["stopped"] = train(cfg, stop_after=4)[1]
    found["resumed"] = train(cfg, resume=True)[1]
    cfg = tiny.config(folder / "evaluated", *USUAL)
    found["evaluated"] = evaluate(cfg, str(folder / "usual" / "model_final.pth"))
    return found


class KilledOnce(HookBase):
    """SIGKILL for one of the two after an iteration without a checkpoint, the first time."""

    def __init__(self, marker):
        self.marker = marker

    def after_step(self):
        if self.trainer.iter == 4 and comm.get_rank() == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def everything(folder):
    """A training with every switch, from its start to its end."""
    return train(tiny.config(folder / "everything", *EVERYTHING))[1]


def everything_killed(folder):
    """The same; one process is killed. Started again, it goes on."""
    cfg = tiny.config(folder / "killed", *EVERYTHING)
    return train(cfg, True, hooks=[KilledOnce(folder / "killed_once")])[1]


def failures(folder):
    """What one process started by torchrun finds: its place, data made by one, errors."""
    rank = comm.get_rank()
    found = {
        "place": [rank, comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()],
        "processes": distributed.started_by(),
    }

    made = []
    handler = logging.Handler()
    handler.emit = lambda record: made.append(record.getMessage())
    logging.getLogger("fpn_ext").addHandler(handler)
    logging.getLogger("fpn_ext").setLevel(logging.INFO)
    datasets.register_generated("made", folder / "made", "val", {"num_train": 1, "num_val": 2})
    comm.synchronize()
    found["records"] = len(DatasetCatalog.get("made"))
    found["made"] = [text for text in made if text.startswith("Generating")]

    nonfinite.OTHERS_FIRST = 0.1
    trainer = Trainer(tiny.config(folder / "nan", *USUAL, "DATASETS.TEST", "()"))
    if rank == 1:
        trainer.model.module.register_forward_hook(
            lambda model, inputs, losses: {k: v * float("nan") for k, v in losses.items()}
        )
    found["nan"] = error_of(trainer.train)

    # A folder that the other machine does not see.
    own = folder / f"own_{rank}"
    own.mkdir()
    if rank == 1:
        (own / "model_0000001.pth").touch()
    checkpointer = SafeCheckpointer(torch.nn.Linear(1, 1), str(own))
    found["not shared"] = error_of(lambda: checkpointer.resume_or_load("", resume=True))
    return found


class SaysItTrains(HookBase):
    def __init__(self, folder):
        self.file = folder / f"pid_{comm.get_rank()}"

    def after_step(self):
        if self.trainer.iter == 2:
            self.file.with_suffix(".new").write_text(str(os.getpid()))
            self.file.with_suffix(".new").rename(self.file)


def wait_for_a_signal(args):
    """Rounds in which all processes ask whether one is to stop; this one's count, as a file."""
    rounds = 0
    try:
        with interrupts.interruptible() as asked:
            while True:
                asked.check()
                rounds += 1
                waiting = args.folder / f"waiting_{comm.get_rank()}"
                if not waiting.exists():
                    waiting.write_text(str(os.getpid()))
                time.sleep(0.01)
    except interrupts.Interrupted as interrupted:
        (args.folder / f"rounds_{comm.get_rank()}").write_text(str(rounds))
        comm.synchronize()
        raise SystemExit(interrupted.status) from None


def train_for_long(args):
    """The target of a kill; ``args.folder`` gets the PIDs once training runs."""
    register(args.folder)
    opts = [*USUAL, "SOLVER.MAX_ITER", 100000, "DATALOADER.NUM_WORKERS", 1]
    trainer = Trainer(tiny.config(args.folder / "long", *opts))
    trainer.register_hooks([SaysItTrains(args.folder)])
    trainer.train()


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def write(task, folder):
    """Run a task as one of the two, and write what it returns."""
    found = task(folder)
    file = folder / f"{task.__name__}_{comm.get_rank()}.json"
    file.write_text(json.dumps(found))


def variables(kind, rank, port):
    own = {"srun": {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": f"{rank}",
        "SLURM_LOCALID": f"{rank}", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[1-2]",
    }, "torchrun": {
        "RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": f"{rank}",
    }}[kind]  # fmt: skip
    return {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}


def start(task, kind, folder):
    """Fork two processes and wait for them; whether both succeeded."""
    port = distributed.free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(variables(kind, rank, port))
            args = options_of([])
            try:
                distributed.launch(lambda _: write(task, folder), args, "cpu")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return not any([os.waitpid(child, 0)[1] for child in children])


def train_both(name, folder, *words):
    """Fork two processes of torchrun's with ``fpn-ext train``; what each writes is in a file."""
    port = distributed.free_port()
    opts = tiny.options(folder / "mine", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(variables("torchrun", rank, port))
            output = os.open(folder / f"{name}_{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                agreement.GRACE = 0.5
                status = main(["train", *words, "--config-file", tiny.FILE, *opts])
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    register(folder)
    if sys.argv[2:] == ["everything"]:
        ended_well = [
            start(everything, "torchrun", folder),
            not start(everything_killed, "torchrun", folder),
            start(everything_killed, "torchrun", folder),
        ]
    else:
        (folder / "mine").mkdir()
        (folder / "mine" / "model_final.pth").touch()  # a training's
        ended_well = [
            train_both("used", folder) == [2, 1],
            train_both("new", folder, "--new-folder") == [0, 0],
            start(trainings, "srun", folder),
            start(failures, "torchrun", folder),
        ]
    sys.exit(0 if all(ended_well) else 1)
