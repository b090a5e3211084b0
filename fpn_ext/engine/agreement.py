"""The first of several processes decides, before any of them begins, and speaks for all."""

import json
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT

from .place import Place

DECISION, HEARD = "decision", "heard"  # keys of the store where the processes meet
# Seconds in which a process that is refused stays: the one with the reason is to end first, since
# launchers report the first to end.
GRACE = 5.0


def decided_by_first(place: Place, decide: Callable[[], Sequence[str]]) -> list[str]:
    """What ``decide`` returns in the process of rank 0, in each of the job's processes.

    The others wait for it. They meet where the process group will, which need not be there yet.

    Args:
        place: of this process, one of several.
        decide: called by rank 0 alone; may raise.

    Raises:
        SystemExit: in the others, if ``decide`` raised in rank 0, which has said why.
    """
    meeting = dist.rendezvous(place.address, place.rank, place.world_size, timeout=DEFAULT_TIMEOUT)
    store, *_ = next(meeting)
    store.set_timeout(DEFAULT_TIMEOUT)
    # Kept: rank 0 may be the server of it, and the process group meets there next.
    _met.append(store)
    ours = dist.PrefixStore("fpn_ext", store)
    if place.rank == 0:
        try:
            decision = list(decide())
        except BaseException:
            ours.set(DECISION, "null")
            _wait_until_heard(ours, place.world_size - 1)
            raise
        ours.set(DECISION, json.dumps(decision))
        return decision
    decided: list[str] | None = json.loads(ours.get(DECISION))
    if decided is None:
        ours.add(HEARD, 1)
        time.sleep(GRACE)
        raise SystemExit(1)
    return decided


_met: list[dist.Store] = []


def _wait_until_heard(store: dist.Store, number: int) -> None:
    deadline = time.monotonic() + GRACE
    while store.add(HEARD, 0) < number and time.monotonic() < deadline:
        time.sleep(0.05)
