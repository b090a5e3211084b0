"""Work divided among threads of Python's, each of which computes with one thread of torch's.

torch divides every operation among its threads. Where a chain of operations on a part of the data
fits the cache of a core, it is quicker to divide the data once and let each thread do the chain.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def share(work: Callable[[Iterable[T]], None], jobs: Sequence[T]) -> None:
    """Call ``work`` in as many threads as torch has, each with an iterator over jobs of its own.

    A thread takes the next job when it is done with one. With a single thread, or job, ``work`` is
    called right here. Gradients are not recorded.

    >>> done = []
    >>> share(lambda own: done.extend(own), range(5))
    >>> sorted(done)
    [0, 1, 2, 3, 4]
    """
    count = min(torch.get_num_threads(), len(jobs))
    if count < 2:
        with torch.no_grad():
            work(iter(jobs))
        return
    left = iter(list(jobs))  # next() of a list's iterator is one step for all threads
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def in_thread() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(left)

    pool = _pool(torch.get_num_threads())
    for future in [pool.submit(in_thread) for _ in range(count)]:
        future.result()


def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that wait for work from call to call; a forked process has none of its parent's."""
    key = os.getpid(), count
    with _lock:
        if key not in _pools:
            started = threading.Barrier(count + 1)

            def start() -> None:
                torch.get_num_threads()  # when first asked for, it takes what was set last anywhere
                torch.set_num_threads(1)
                started.wait()

            pool = ThreadPoolExecutor(count, thread_name_prefix="fpn_ext")
            for _ in range(count):
                pool.submit(start)
            started.wait()
            torch.set_num_threads(count)  # what threads to come begin with
            _pools[key] = pool
        return _pools[key]
