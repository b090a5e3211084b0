"""Work divided among threads: all of it is done exactly once, and nothing else changes."""

import os
import threading
import time

import fpn_ext
import pytest
import torch
from fpn_ext.kernels.threads import share

assert fpn_ext


def test_every_job_is_done_once_by_several_threads(number_of_threads):
    number_of_threads(3)
    done, seen = [], set()
    together = threading.Barrier(3, timeout=20)

    def work(own):
        together.wait()
        for job in own:
            done.append(job)
            seen.add((threading.current_thread().name, torch.get_num_threads()))
            time.sleep(0.01)

    share(work, range(20))
    assert sorted(done) == list(range(20))
    assert len(seen) == 3 and {count for _, count in seen} == {1}
    assert torch.get_num_threads() == 3


def test_one_thread_or_one_job_stays_here(number_of_threads):
    for count, jobs in ((1, "abc"), (2, "a"), (2, "")):
        number_of_threads(count)
        here = []
        share(lambda own, here=here: here.append((threading.current_thread(), *own)), jobs)
        assert here == [(threading.main_thread(), *jobs)]


@pytest.mark.parametrize("inference", [False, True])
def test_modes_are_those_of_the_caller_without_gradients(number_of_threads, inference):
    number_of_threads(2)
    weight, into = torch.ones(3, requires_grad=True), []
    with torch.inference_mode(inference):
        share(lambda own: into.extend(job * weight for job in own), range(4))
    assert len(into) == 4
    assert all(x.is_inference() is inference and not x.requires_grad for x in into)


def test_an_error_reaches_the_caller(number_of_threads):
    number_of_threads(2)
    with pytest.raises(ZeroDivisionError):
        share(lambda own: [1 // job for job in own], [1, 1, 0, 1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(number_of_threads):
    number_of_threads(2)
    share(list, range(4))
    child = os.fork()
    if child == 0:
        done = []
        share(done.extend, range(4))
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    deadline = time.monotonic() + 30
    while (state := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            pytest.fail("the child waits for threads that it does not have")
        time.sleep(0.05)
    assert state[1] == 0


def test_threads_to_come_begin_with_as_many_as_before(number_of_threads):
    """torch's number of threads is each thread's own; a new one takes what was set last."""
    number_of_threads(4)
    share(list, range(8))
    found = []
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert found == [4]
