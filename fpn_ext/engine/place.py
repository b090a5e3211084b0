"""A process's place among others that torchrun or SLURM's srun started, from the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")


@dataclass(frozen=True)
class Place:
    """The rank of a process in a group started by another program.

    Args:
        rank: among all ``world_size`` processes.
        local_rank: among the processes of its machine; its GPU index.
        address: rendezvous address, as for ``init_process_group``.
        source: the program that started them, in words.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    source: str


def place_in(environment: Mapping[str, str]) -> Place | None:
    """This process's place from torchrun's variables, else SLURM's; None without either.

    SLURM's variables count only in a job step of several tasks: in a batch script or an interactive
    shell they describe what srun could start.

    Raises:
        ValueError: variables are missing, not numbers, or contradict one another.

    >>> place_in({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    """
    tasks = _tasks_of_step(environment)
    found = [name for name in RANK_VARIABLES if name in environment]
    if found == ["WORLD_SIZE"] and tasks > 1:  # many batch scripts export it for their job step
        if _number("WORLD_SIZE", environment) != tasks:
            raise ValueError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']} and srun started {tasks} tasks: unset "
                "WORLD_SIZE, or start as many"
            )
    elif found:
        return _place_of_torchrun(environment)
    return _place_of_slurm(environment, tasks) if tasks > 1 else None


def _place_of_torchrun(environment: Mapping[str, str]) -> Place:
    _require(environment, (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT"), "torchrun")
    rank, world_size, local_rank = (_number(name, environment) for name in RANK_VARIABLES)
    if not local_rank <= rank < world_size:
        raise ValueError(
            f"RANK {rank}, LOCAL_RANK {local_rank} and WORLD_SIZE {world_size} do not fit "
            "together: LOCAL_RANK <= RANK < WORLD_SIZE; unset them all, or take what torchrun sets"
        )
    return Place(rank, world_size, local_rank, "env://", "torchrun (RANK, WORLD_SIZE, LOCAL_RANK)")


def _place_of_slurm(environment: Mapping[str, str], tasks: int) -> Place:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    _require(environment, SLURM_VARIABLES, "srun")
    if not nodes:
        raise ValueError("srun sets SLURM_STEP_NODELIST, and it is not set: was it unset?")
    rank, local_rank, job = (_number(name, environment) for name in SLURM_VARIABLES)
    # The same in every task, different for the next job on the machine; below the ephemeral ports.
    host = environment.get("MASTER_ADDR") or first_node(nodes)
    port = environment.get("MASTER_PORT") or str(12000 + job % 20000)
    return Place(
        rank,
        tasks,
        local_rank,
        f"tcp://{host}:{port}",
        f"srun (SLURM_PROCID, SLURM_LOCALID and {tasks} tasks), meeting at {host}:{port}",
    )


def _tasks_of_step(environment: Mapping[str, str]) -> int:
    """Number of tasks in this process's job step; 0 if it is not one of several."""
    # srun --pty starts a shell as the first task.
    if "SLURM_STEP_ID" not in environment or "SLURM_PTY_PORT" in environment:
        return 0
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in environment:
            return _number(name, environment)
    return 0


def first_node(nodes: str) -> str:
    """The first name in a SLURM node list.

    >>> first_node("gpu[03-05,9],login1"), first_node("a1,a2"), first_node("r[1-2]n[07,9]")
    ('gpu03', 'a1', 'r1n07')
    """
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _require(environment: Mapping[str, str], names: tuple[str, ...], source: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        there = [name for name in names if name in environment]
        raise ValueError(
            f"{source} sets {', '.join(names)}; here {', '.join(there)} "
            f"{'is' if len(there) == 1 else 'are'} set and {', '.join(missing)} not. Set all of "
            f"them (start with {source}), or for a single process unset {', '.join(there)}"
        )


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not re.fullmatch(r"\d+", environment[name]):
        raise ValueError(f"{name} must be a whole number, got {environment[name]!r}")
    return int(environment[name])
