"""The processes of a training: started by Detectron2's launcher, by torchrun or by SLURM's srun.

They communicate through NCCL on GPUs and gloo on CPU. docs/guides/distributed.md lists the
commands, and what does not depend on the number of processes.
"""

import argparse
import contextlib
import functools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import multiprocessing, nn
from torch.distributed.elastic.multiprocessing.errors import record

from .. import _d2_compat
from .interrupts import SIGNALS, handled_by
from .place import RANK_VARIABLES, Place, place_in

Main = Callable[[argparse.Namespace], Any]

# Messages of gloo and NCCL in a process whose peer has ended.
_LOST = re.compile(r"(closed|reset) by peer|Broken pipe|remote process exited|Read error", re.I)
# Seconds that such a process stays alive, so that the failed one ends first: launchers report the
# first to end.
_LOST_GRACE = 5.0


def launch(main: Main, args: argparse.Namespace, device: str) -> None:
    """Call ``main(args)`` in every process of the job, with Detectron2's ``comm`` set up.

    In this process if torchrun or srun started it, or if there is only one; otherwise in processes
    started here.

    Args:
        main: a module-level function, so that other processes can import it.
        args: with the options of :func:`fpn_ext.tools.options.add_processes`.
        device: ``MODEL.DEVICE``: "cpu" uses ``--num-processes``, anything else ``--num-gpus``.

    Raises:
        ValueError: options or variables contradict one another or the machine.
        RuntimeError: a process started here failed or was killed; says which, and how it ended.
            The others are terminated too.
    """
    on_cpu = device == "cpu"
    place = place_unless_launching(args)
    _check_options(args, on_cpu, place)
    if place is not None:
        _check_gpu(place, on_cpu)
        record(run_at)(place, on_cpu, main, args)
    else:
        start_processes(main, args, on_cpu)


def started_by(environment: Mapping[str, str] = os.environ) -> str:
    """The number of processes and what started them, for the log."""
    number = comm.get_world_size()
    place = place_in(environment)
    if place is not None and place.world_size == number:
        return f"{number} processes, started by {place.source}"
    text = f"{number} processes, started by this command" if number > 1 else "1 process"
    tasks = environment.get("SLURM_NTASKS", "1")
    if place is None and tasks not in ("", "1"):
        text += f"; SLURM has room for {tasks} tasks, and srun starts them: this is no step of its"
    return text


def place_unless_launching(args: argparse.Namespace) -> Place | None:
    """None if srun's tasks, one per machine, start that machine's processes themselves."""
    if args.num_machines > 1 and not any(name in os.environ for name in RANK_VARIABLES):
        return None
    return place_in(os.environ)


def _check_options(args: argparse.Namespace, on_cpu: bool, place: Place | None) -> None:
    for option, least in (("num_gpus", 0), ("num_processes", 1), ("num_machines", 1)):
        number = getattr(args, option)
        if number < least:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least}, got {number}")
    if place is not None:
        for option in ("num_gpus", "num_processes", "num_machines"):
            number = getattr(args, option)
            if number > 1:
                raise ValueError(
                    f"--{option.replace('_', '-')} {number} asks for processes, and "
                    f"{place.world_size} are there already, started by {place.source}: leave the "
                    "option out, or start this command once, on its own"
                )
    if on_cpu and args.num_gpus > 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus}: there are no GPUs for MODEL.DEVICE cpu; "
            f"--num-processes {args.num_gpus} starts as many processes on the CPU"
        )
    if not on_cpu and args.num_processes > 1:
        raise ValueError(
            f"--num-processes {args.num_processes} are processes on the CPU, and MODEL.DEVICE is a "
            "GPU: take --num-gpus, or MODEL.DEVICE cpu"
        )
    if not on_cpu and args.num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {args.num_gpus}: this process sees {torch.cuda.device_count()} GPU(s) "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} must be from 0 to --num-machines "
            f"{args.num_machines} less 1"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, the same on "
            "all: the first machine, and a port that is free there"
        )


def _check_gpu(place: Place, on_cpu: bool) -> None:
    if not on_cpu and place.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {place.rank}, started by {place.source}, is process {place.local_rank} of its "
            f"machine, counted from 0, and sees {torch.cuda.device_count()} GPU(s): start one "
            "process for each GPU, and let all see all of them (SLURM: --gpus-per-node, not "
            "--gpus-per-task), or set MODEL.DEVICE cpu"
        )


# ---------------------------------------------------------------------------------- starting


def start_processes(main: Main, args: argparse.Namespace, on_cpu: bool) -> None:
    """Start this machine's processes, and terminate all when one fails.

    Signals that are to stop a training (:mod:`fpn_ext.engine.interrupts`) are passed on to them.

    Raises:
        RuntimeError: one failed.
        SystemExit: they ended because of a signal.
    """
    per_machine = args.num_processes if on_cpu else args.num_gpus
    several = args.num_machines * per_machine > 1
    first_rank = args.machine_rank * per_machine
    signals = (*SIGNALS, *getattr(args, "stop_signals", ())) if several else ()
    received: list[int] = []
    try:
        with handled_by(functools.partial(_pass_on, received), signals):
            if on_cpu and several:
                # Detectron2 v0.6's launcher supports GPUs only.
                url = f"tcp://127.0.0.1:{free_port()}" if args.dist_url == "auto" else args.dist_url
                multiprocessing.spawn(
                    _started, args=(first_rank, per_machine, url, main, args), nprocs=per_machine
                )
            else:
                detectron2_launch(
                    end_with_the_launcher,
                    per_machine,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(main, args),
                )
    except multiprocessing.ProcessRaisedException as error:
        rank = first_rank + error.error_index
        message = f"{error.msg}\nthe process of rank {rank} failed, see above; {_AFTER}"
        raise RuntimeError(message) from None
    except multiprocessing.ProcessExitedException as error:
        interrupted = [number for number in signals if error.exit_code == 128 + number]
        if not received + interrupted:
            rank = first_rank + error.error_index
            # In older PyTorch it is `pid`.
            pid = getattr(error, "error_pid", None) or getattr(error, "pid", "?")
            message = f"the process of rank {rank} (pid {pid}) {_ending(error)}"
            raise RuntimeError(f"{message}; {_AFTER}") from None
        received += interrupted
    if received:
        raise SystemExit(128 + received[0])


def _pass_on(received: list[int], number: int, frame: FrameType | None) -> None:
    """A signal handler: send it to the processes started here."""
    received.append(number)
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


_AFTER = (
    "the other processes were ended, too. What it had trained is in its checkpoints: --resume goes "
    "on from the last"
)


def _ending(error: multiprocessing.ProcessExitedException) -> str:
    if error.exit_code >= 0:
        return f"ended with exit status {error.exit_code}"
    often = " (often the system, out of memory: see dmesg)" if error.exit_code == -9 else ""
    return f"was killed by {error.signal_name}{often}"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _started(
    local_rank: int,
    first_rank: int,
    per_machine: int,
    url: str,
    main: Main,
    args: argparse.Namespace,
) -> None:
    """Entry point of a CPU process started by :func:`start_processes`."""
    if "OMP_NUM_THREADS" not in os.environ:  # the processes share the machine's cores
        torch.set_num_threads(max(1, torch.get_num_threads() // per_machine))
    world_size = args.num_machines * per_machine
    place = Place(first_rank + local_rank, world_size, local_rank, url, "--num-processes")
    run_at(place, True, functools.partial(end_with_the_launcher, main), args)


def end_with_the_launcher(main: Main, args: argparse.Namespace) -> None:
    """Call ``main(args)``; exit when the parent process, if it is a launcher, dies.

    A killed launcher cannot terminate its processes. PyTorch arranges for SIGINT, which background
    commands of a script ignore and processes blocked in C++ do not notice.
    """
    launcher: Any = multiprocessing.parent_process()

    def wait() -> None:
        launcher.join()
        print("the process that started this one has ended: ending", file=sys.stderr, flush=True)
        os._exit(1)

    if launcher is not None:
        threading.Thread(target=wait, daemon=True).start()
    main(args)


def run_at(place: Place, on_cpu: bool, main: Main, args: argparse.Namespace) -> None:
    """Join the process group, then call ``main(args)``."""
    if place.world_size == 1:
        main(args)
        return
    try:
        _join(place, on_cpu)
        main(args)
        dist.destroy_process_group()
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        time.sleep(_LOST_GRACE)
        raise RuntimeError(
            f"rank {place.rank} lost its connection to another process, which has ended: the "
            "reason is in that one's output"
        ) from error


def _join(place: Place, on_cpu: bool) -> None:
    if not on_cpu:
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        init_method=place.address,
        rank=place.rank,
        world_size=place.world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    local_ranks = comm.all_gather(place.local_rank)
    per_machine = max(local_ranks) + 1
    if local_ranks != [rank % per_machine for rank in range(place.world_size)]:
        raise ValueError(
            f"the processes, from rank 0 on, have the numbers {local_ranks} on their machines: "
            "Detectron2 needs as many on each, counted machine by machine (SLURM: "
            "--ntasks-per-node, --distribution=block)"
        )
    _d2_compat.create_local_process_group(per_machine)
    comm.synchronize()


# ---------------------------------------------------------------------------------- training


def share_buffers(model: nn.Module) -> None:
    """Broadcast the model's buffers from the main process to all others.

    Batch norm's running statistics differ between processes, and a checkpoint holds the main
    process's: evaluation must use the same.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
