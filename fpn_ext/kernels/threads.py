"""Divides work among Python threads, each of which computes with one torch thread.

torch divides every single operation among its threads. If a chain of operations on part of the data
fits a core's cache, it is faster to divide the data once and run the chain in each thread.
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
    """Call ``work`` in as many threads as torch has, each with an iterator over its jobs.

    A thread takes the next job when it finishes one. With a single thread or job, ``work`` runs in
    the calling thread. Gradients are not recorded.

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
    left = iter(list(jobs))  # next() of a list's iterator is atomic across threads
    inference = torch.is_inference_mode_enabled()  # the mode is per thread

    def in_thread() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(left)

    pool = _pool(torch.get_num_threads())
    for future in [pool.submit(in_thread) for _ in range(count)]:
        future.result()


def _pool(count: int) -> ThreadPoolExecutor:
    """Thread pool kept between calls; keyed by process, as a fork inherits no threads."""
    key = os.getpid(), count
    with _lock:
        if key not in _pools:
            started = threading.Barrier(count + 1)

            def start() -> None:
                torch.get_num_threads()  # the first call adopts the value last set in any thread
                torch.set_num_threads(1)
                started.wait()

            pool = ThreadPoolExecutor(count, thread_name_prefix="fpn_ext")
            for _ in range(count):
                pool.submit(start)
            started.wait()
            torch.set_num_threads(count)  # the default of later threads
            _pools[key] = pool
        return _pools[key]
