"""Fuzzing: number of inputs, how they are generated, and their resource limits."""

import functools
import os
import resource
import time
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Few in the test suite; `make fuzz` tries thousands.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SECONDS, MEGABYTES = 20, 512  # per input: more is a hang or runaway memory

tried: Counter[str] = Counter()  # inputs per test, printed at the end of the session


def fuzz(**strategies):
    """Hypothesis' ``given``, for :data:`EXAMPLES` inputs, each counted and bounded in its cost."""

    def decorate(test):
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        @given(**strategies)
        @functools.wraps(test)
        def bounded(*args, **kwargs):
            tried[test.__name__] += 1
            begin, before = time.monotonic(), _peak_megabytes()
            test(*args, **kwargs)
            assert time.monotonic() - begin < SECONDS
            assert _peak_megabytes() - before < MEGABYTES

        return bounded

    return decorate


def _peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def corrupted(content):
    """Bytes with pieces cut out, duplicated or overwritten."""
    edit = st.tuples(
        st.integers(0, len(content)),
        st.integers(0, 40),
        st.binary(max_size=6) | st.just(content[:90]),
    )

    def apply(edits):
        result = content
        for start, length, insert in edits:
            result = result[:start] + insert + result[start + length :]
        return result

    return st.lists(edit, min_size=1, max_size=4).map(apply)
