"""Measurements: alternating timing of several sides, peak memory, formatting of the results."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2  # untimed rounds
MIB = 2**20


def measure(
    sides: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", calls: int = 1
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Milliseconds per call of every side in every round, and each side's last result.

    Sides alternate within a round, so that other load on the machine affects all alike; each runs
    ``calls`` times in a row, of which the mean is taken.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    gc.collect()
    for round_number in range(rounds + WARM_UP):
        for name, run in sides.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                results[name] = run()
            synchronize(device)
            if round_number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin) / calls)
    return times, results


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(times: dict[str, list[float]], side: str, baseline: str) -> dict[str, Any]:
    """Speedup over ``baseline``, per round: median and range."""
    ratios = [b / t for b, t in zip(times[baseline], times[side], strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> dict[str, float] | None:
    """MiB before ``run`` and at its peak; None if the system does not report it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
        run()
        synchronize(device)
        return {"before": before, "peak": torch.cuda.max_memory_allocated() / MIB}
    if not Path("/proc/self/clear_refs").exists():
        return None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # do not count memory already freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except OSError:
        return None
    before = _status_mib("VmRSS")
    run()
    return {"before": before, "peak": _status_mib("VmHWM")}


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_text(row: dict, key: str = "ratio") -> str:
    """``1.93 (1.80 to 2.11)``, or "" if ``row`` has no such ratio."""
    if row.get(key) is None:
        return ""
    low, high = row[f"{key}_range"]
    return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"
