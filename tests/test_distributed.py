"""Several processes: starting them, equivalence with one process, and termination.

tests/two_processes.py is what runs in two.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import two_processes
from fpn_ext.__main__ import main
from fpn_ext.engine import distributed
from fpn_ext.engine.distributed import started_by
from fpn_ext.engine.place import Place, place_in
from tiny import DATASET, FILE, config, leaves, options
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from two_processes import options_of

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500",
}  # fmt: skip
# A job of two nodes, in a batch script: what srun would start, but no step of srun's.
SBATCH = {
    "SLURM_JOB_ID": "40123", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[03-04]",
}  # fmt: skip
SRUN = {
    **SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


# Who started this process


def test_torchruns_variables():
    place = place_in(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.address) == (5, 8, 1, "env://")
    assert place_in({**SRUN, **TORCHRUN}) == place, "srun started torchrun"


def test_slurms_variables():
    place = place_in(SRUN)
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert place.address == "tcp://gpu03:12123", "40123 % 20000 more than 12000"
    chosen = place_in({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert chosen.address == "tcp://10.0.0.1:29500"
    assert place_in({**SRUN, "WORLD_SIZE": "8"}) == place, "exported by the batch script"
    without = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NUM_TASKS"}
    assert place_in(without) == place
    of_the_step = {**SRUN, "SLURM_STEP_NODELIST": "gpu04", "SLURM_STEP_NUM_TASKS": "6"}
    assert place_in(of_the_step).address == "tcp://gpu04:12123"
    assert place_in(of_the_step).world_size == 6


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "a", "MASTER_PORT": "29500"},
        SBATCH,
        {k: v for k, v in SBATCH.items() if k != "SLURM_PROCID"},  # salloc
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "SLURM_PTY_PORT": "40000", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_a_process_on_its_own(environment):
    assert place_in(environment) is None
    said = started_by(environment)
    assert said.startswith("1 process")
    tasks = "SLURM has room for 8 tasks, and srun starts them: this is no step of its"
    assert (tasks in said) == ("SLURM_NTASKS" in environment)


def less(environment, *names):
    return {k: v for k, v in environment.items() if k not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "8"}, "here WORLD_SIZE is set and RANK, LOCAL_RANK, .* unset WORLD_SIZE"),
        (less(TORCHRUN, "MASTER_ADDR"), "and MASTER_ADDR not"),
        (less(TORCHRUN, "LOCAL_RANK"), "and LOCAL_RANK not"),
        ({**TORCHRUN, "RANK": "8"}, "RANK 8, LOCAL_RANK 1 and WORLD_SIZE 8 do not fit"),
        ({**TORCHRUN, "LOCAL_RANK": "6"}, "RANK 5, LOCAL_RANK 6"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK must be a whole number, got '-1'"),
        ({**SRUN, "WORLD_SIZE": "4"}, "WORLD_SIZE is 4 and srun started 8 tasks"),
        (less(SRUN, "SLURM_LOCALID"), "srun sets .* and SLURM_LOCALID not"),
        (less(SRUN, "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST"),
    ],
)
def test_variables_that_contradict_one_another(environment, message):
    with pytest.raises(ValueError, match=message):
        place_in(environment)


def launch_with(monkeypatch, options=(), environment=None, device="cpu", gpus=0):
    """What ``launch`` starts: ``(None, number)`` itself, or as one of those that are there."""
    for name in (*TORCHRUN, *SRUN, "SLURM_PTY_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    started = []
    monkeypatch.setattr(distributed, "run_at", lambda place, *_: started.append((place, 1)))
    monkeypatch.setattr(
        distributed, "detectron2_launch", lambda main, number, **_: started.append((None, number))
    )
    monkeypatch.setattr(
        distributed.multiprocessing,
        "spawn",
        lambda start, args, nprocs: [start(rank, *args) for rank in range(nprocs)],
    )
    threads = torch.get_num_threads()
    try:
        args = options_of(list(options))
        distributed.launch(lambda args: None, args, device)
    finally:
        torch.set_num_threads(threads)
    return started


def test_who_starts_what(monkeypatch):
    assert launch_with(monkeypatch) == [(None, 1)]
    assert launch_with(monkeypatch, ["--num-gpus", "4"], device="cuda", gpus=4) == [(None, 4)]
    assert launch_with(monkeypatch, [], TORCHRUN) == [(place_in(TORCHRUN), 1)]
    assert launch_with(monkeypatch, [], SRUN, "cuda", gpus=4) == [(place_in(SRUN), 1)]
    # A task of srun's on each machine, which starts Detectron2's processes.
    machines = ["--num-machines", "8", "--machine-rank", "5", "--dist-url", "tcp://gpu03:29500"]
    options = ["--num-gpus", "4", *machines]
    assert launch_with(monkeypatch, options, SRUN, "cuda", gpus=4) == [(None, 4)]
    started = launch_with(monkeypatch, ["--num-processes", "2", *machines])
    url, source = "tcp://gpu03:29500", "--num-processes"
    assert [place for place, _ in started] == [
        Place(rank=10 + i, world_size=16, local_rank=i, address=url, source=source) for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("options", "environment", "device", "message"),
    [
        ("--num-gpus 4", TORCHRUN, "cuda", "--num-gpus 4 asks .* 8 are there .* by torchrun"),
        ("--num-processes 2", TORCHRUN, "cpu", "--num-processes 2 asks for processes, and 8"),
        ("--num-gpus 4", SRUN, "cuda", "--num-gpus 4 asks .* 8 are there .* by srun"),
        ("--num-machines 2", TORCHRUN, "cuda", "--num-machines 2 asks for processes"),
        ("--num-gpus 2", {}, "cpu", "MODEL.DEVICE cpu; --num-processes 2 starts as many"),
        ("--num-processes 2", {}, "cuda", "take --num-gpus, or MODEL.DEVICE cpu"),
        ("--num-gpus 3", {}, "cuda", r"--num-gpus 3: this process sees 1 GPU"),
        ("--num-machines 2 --machine-rank 2", {}, "cpu", "--machine-rank 2 must be from 0 to"),
        ("--num-machines 2", {}, "cpu", "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        ("", SRUN, "cuda", r"rank 5, started by srun .* is process 1 .* sees 1 GPU"),
        ("", TORCHRUN, "cuda", r"rank 5, started by torchrun .* sees 1 GPU"),
    ],
)
def test_options_that_contradict_the_rest(monkeypatch, options, environment, device, message):
    with pytest.raises(ValueError, match=message):
        launch_with(monkeypatch, options.split(), environment, device, gpus=1)


def test_how_a_process_ended(monkeypatch):
    args = options_of(["--num-processes", "2"])

    def ends_with(error):
        def spawn(*_, **__):
            raise error

        monkeypatch.setattr(distributed.multiprocessing, "spawn", spawn)
        with pytest.raises(RuntimeError) as caught:
            distributed.start_processes(None, args, on_cpu=True)
        return str(caught.value)

    said = ends_with(ProcessRaisedException("\nValueError: 7 is no key\n", 1, 99))
    assert "ValueError: 7 is no key" in said and "the process of rank 1 failed, see above" in said
    said = ends_with(ProcessExitedException("", 0, 99, exit_code=3))
    assert said.startswith("the process of rank 0 (pid 99) ended with exit status 3; ")


def test_a_process_that_lost_another_lets_it_end_first(monkeypatch):
    """Else a launcher would report this one."""
    slept = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setattr(distributed, "_join", lambda *_: None)

    def waits(args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1234")

    place = Place(rank=0, world_size=2, local_rank=0, address="", source="")
    with pytest.raises(RuntimeError, match="rank 0 lost its connection to another process"):
        distributed.run_at(place, True, waits, None)
    assert slept == [distributed._LOST_GRACE]


# Two processes against one


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    yield from run_two_processes(tmp_path_factory.mktemp("two_processes"))


@pytest.fixture(scope="module")
def with_every_switch(tmp_path_factory, one_thread):
    yield from run_two_processes(tmp_path_factory.mktemp("everything"), "everything")


def run_two_processes(folder, *words):
    done = subprocess.run(
        [sys.executable, "tests/two_processes.py", folder, *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k not in {*TORCHRUN, *SRUN}},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    two_processes.register(folder)
    yield folder
    two_processes.unregister()


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes found: {task: [of rank 0, of rank 1]}"""
    return {task: what_both_found(folder, task) for task in ("trainings", "failures")}


def what_both_found(folder, task):
    return [json.loads((folder / f"{task}_{rank}.json").read_text()) for rank in (0, 1)]


def content(file):
    return leaves(torch.load(file, weights_only=True))


def test_the_same_losses_and_weights_as_one_process(folder, found, tmp_path):
    trainer, losses = two_processes.train(config(tmp_path, *two_processes.SAME_LOSSES))
    of_two = found["trainings"][0]["same"]
    assert len(losses) == 4
    for iteration, values in losses.items():
        assert of_two[str(iteration)] == pytest.approx(values, rel=1e-5, abs=1e-7)
    weights = torch.load(folder / "same" / "model_final.pth", weights_only=True)["model"]
    moved = 0
    torch.manual_seed(0)
    first = two_processes.build_model(trainer.cfg).state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
        moved += not torch.equal(value, first[name])
    assert moved > 25


def test_the_same_images_with_the_same_augmentation(found, tmp_path):
    """Rank 0 takes the first, third, ... of one process's batch."""
    cfg = config(tmp_path, *two_processes.USUAL)
    loader = two_processes.Trainer.build_train_loader(cfg)
    expected = two_processes.images_of(loader)
    ranks = [[[tuple(i) for i in batch] for batch in of["images"]] for of in found["trainings"]]
    assert ranks == [[batch[rank::2] for batch in expected] for rank in (0, 1)]


def test_stopped_and_resumed_by_two_ends_with_the_same_bits(folder, found):
    ranks = found["trainings"]
    usual, stopped, resumed = (ranks[0][key] for key in ("usual", "stopped", "resumed"))
    assert list(stopped) == ["0", "1", "2", "3"] and list(resumed) == ["3", "4", "5"]
    assert {**stopped, **resumed} == usual
    one, other = (content(folder / name / "model_final.pth") for name in ("usual", "resumed"))
    assert one.keys() == other.keys() and len(one) > 100
    for path, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, other[path]), path
    assert results(folder / "usual") == results(folder / "resumed")


def results(folder):
    return {
        name: json.loads((folder / "inference" / name / "results.json").read_text())
        for name in (DATASET, two_processes.VOC)
    }


def test_an_evaluation_is_that_of_one_process(folder, found, tmp_path):
    """COCO, Pascal VOC and proposal recall, also with an odd number of images."""
    weights = str(folder / "usual" / "model_final.pth")
    two_processes.evaluate(config(tmp_path, *two_processes.USUAL), weights)
    expected = results(tmp_path)
    assert expected == results(folder / "evaluated")
    # With batch norms, whose statistics are each process's own while it trains.
    assert expected == results(folder / "usual")
    assert all(scores["box_proposals"]["AR@100"] > 1 for scores in expected.values())
    assert {"bbox", "box_proposals"} == set(expected[DATASET])
    file = Path("inference", DATASET, "coco_instances_results.json")
    detections = json.loads((tmp_path / file).read_text())
    assert detections == json.loads((folder / "evaluated" / file).read_text())
    assert len({detection["image_id"] for detection in detections}) == 6


@pytest.mark.slow
def test_killed_and_resumed_with_every_switch_ends_with_the_same_bits(with_every_switch):
    """Average of weights, best checkpoint, accumulation, levels, masks; one of two is killed."""
    folder = with_every_switch
    whole = what_both_found(folder, "everything")[0]
    resumed = what_both_found(folder, "everything_killed")[0]
    assert list(whole) == ["0", "1", "2", "3", "4", "5"]
    assert resumed == {i: whole[i] for i in ("4", "5")}, "iteration 4 was lost, and done again"
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        one, other = (content(folder / run / name) for run in ("everything", "killed"))
        assert one.keys() == other.keys() and len(one) > 50
        for path, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, other[path]), (name, path)
    scores = [
        json.loads((folder / run / "inference" / DATASET / "results.json").read_text())
        for run in ("everything", "killed")
    ]
    assert scores[0] == scores[1] and {"bbox", "segm"} <= scores[0].keys()


@pytest.mark.slow
def test_an_evaluation_of_masks_and_levels_is_that_of_one_process(with_every_switch, tmp_path):
    folder = with_every_switch
    weights = str(folder / "everything" / "model_final_ema.pth")
    two_processes.evaluate(config(tmp_path, *two_processes.EVERYTHING), weights)
    inference = Path("inference", DATASET)
    for name in ("results.json", "coco_instances_results.json"):
        one, two = (
            json.loads((at / inference / name).read_text())
            for at in (tmp_path, folder / "everything")
        )
        assert one == two
    assert all("pooled_level" in detection for detection in one)


# One process speaks for both


def said(folder, name):
    return [(folder / f"{name}_{rank}.txt").read_text() for rank in (0, 1)]


def test_a_used_folder_is_refused_once(folder, found):
    """By rank 0, before the other has begun to prepare."""
    first, second = said(folder, "used")
    assert "holds a training already (model_final.pth)" in first
    assert f"--new-folder trains into a new folder beside it ({folder / 'mine'}-2)" in first
    assert second == ""


def test_a_new_folder_is_that_of_all_processes(folder, found):
    first, second = said(folder, "new")
    assert f"--new-folder: OUTPUT_DIR {folder / 'mine'}-2\n" in first
    assert "--new-folder" not in second
    assert {path.name for path in folder.glob("mine*")} == {"mine", "mine-2"}
    written = {path.name for path in (folder / "mine-2").iterdir()}
    assert {"model_final.pth", "log.txt", "log.txt.rank1"} <= written
    assert [path.name for path in (folder / "mine").iterdir()] == ["model_final.pth"]


def test_machines_are_told_which_folder_is_free(tmp_path, capsys):
    (tmp_path / "model_final.pth").touch()
    words = ["--num-machines", "2", "--machine-rank", "1", "--dist-url", "tcp://a:1"]
    opts = [str(word) for word in options(tmp_path)]
    assert main(["train", "--new-folder", *words, "--config-file", FILE, *opts]) == 2
    assert f"append to the command on each: OUTPUT_DIR {tmp_path}-2" in capsys.readouterr().err


def test_processes_know_their_places(found):
    ranks = found["failures"]
    assert [of["place"] for of in ranks] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert all("2 processes, started by torchrun (RANK" in of["processes"] for of in ranks)
    assert "2 processes, started by srun (" in found["trainings"][1]["processes"]


def test_one_process_makes_a_dataset(found):
    ranks = found["failures"]
    assert [of["records"] for of in ranks] == [2, 2]
    assert sum(len(of["made"]) for of in ranks) == 1


def test_who_had_the_batch_with_nan(folder, found):
    one, other = (of["nan"] for of in found["failures"])
    assert "another of the 2 processes had the batch" in one
    assert "first: output['loss_cls'] of the model" in other
    saved = {file.name for file in (folder / "nan" / "nonfinite").iterdir()}
    assert saved == {"iteration_0_rank_0", "iteration_0_rank_1"}


def test_a_folder_that_is_not_shared_is_not_resumed_from(found):
    message = r"OUTPUT_DIR .*'model_0000001\.pth'.* must be one folder that all machines share"
    assert all(re.search(message, of["not shared"]) for of in found["failures"])


# A process is killed


def running(parents):
    """PIDs of ``parents`` and their running descendants."""
    found, grew = set(parents), True
    status = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if words[0] != "Z":
            status[int(file.parent.name)] = int(words[1])
    while grew:
        children = {pid for pid, parent in status.items() if parent in found}
        grew = not children <= found
        found |= children
    return found & status.keys()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
@pytest.mark.slow
def test_a_killed_process_ends_the_job(tmp_path, monkeypatch):
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    args = options_of(["--num-processes", "2"])
    args.folder = tmp_path
    files = [tmp_path / f"pid_{rank}" for rank in (0, 1)]
    started, killed_at = set(), []

    def kill():
        deadline = time.monotonic() + 300
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        started.update(running([int(file.read_text()) for file in files]))
        killed_at.append(time.monotonic())
        os.kill(int(files[1].read_text()), signal.SIGKILL)
        time.sleep(45)  # no longer: rather a failed test than one that hangs
        for pid in running(started):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    message = r"^the process of rank 1 \(pid \d+\) was killed by SIGKILL .*; the other processes"
    with pytest.raises(RuntimeError, match=message):
        distributed.launch(two_processes.train_for_long, args, "cpu")
    assert time.monotonic() - killed_at[0] < 30
    assert len(started) >= 4, "two processes, and one that loads data for each"
    while running(started) and time.monotonic() - killed_at[0] < 30:
        time.sleep(0.1)  # PyTorch's data workers look every 5 seconds whether their parent lives
    assert not running(started)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
def test_a_killed_launcher_takes_its_processes_with_it(tmp_path):
    def train(args):
        (tmp_path / "new").write_text(str(os.getpid()))
        (tmp_path / "new").rename(tmp_path / "pid")
        time.sleep(60)

    launcher = os.fork()
    if not launcher:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
        start = multiprocessing.get_context("fork").Process
        start(target=distributed.end_with_the_launcher, args=(train, None)).start()
        time.sleep(60)
        os._exit(0)
    file = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process = int(file.read_text())
    assert process in running([launcher])
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    while running([process]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running([process])
