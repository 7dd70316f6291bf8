"""Measures one contender at one T, in a process of its own so that its peak memory is its own.

    python -m benchmarks.measure --contender jax_scan --num-steps 50 --problem problem.npz --gradient gradient.npy

Prints a line of JSON when a phase begins, so that the driver can stop what takes too long, and one with the result.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import jax_contenders, problem
from benchmarks.contender import Contender

MIB = 2**20
PACKAGES = {"metacanary": (), "jax": (), "equinox": ("equinox",), "torch": ("torch",), "bergson": ("bergson", "torch")}
STATUS = Path("/proc/self/status")


def build(name: str, prob: problem.Problem) -> Contender:
    """The contender of a name, ready to run."""
    if name.startswith(("torch", "bergson")):
        import torch

        from benchmarks import torch_contenders

        torch.set_num_threads(1)
        return torch_contenders.CONTENDERS[name](prob)
    return jax_contenders.CONTENDERS[name](prob)


def memory_in_use(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Within the block the C library gives arrays back to the system as soon as they are freed.

    As usual it keeps some for later, and what a run reuses of what was freed before it would not be counted. Giving
    back takes time, so that no run is timed in the block.
    """
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold = -1, -3
    for size in (64 * 1024, 32 * MIB):  # the second is the largest that glibc comes to by itself
        libc.mallopt(mmap_threshold, size)
        libc.mallopt(trim_threshold, 2 * size)
        libc.malloc_trim(0)
        if size < MIB:
            yield


def memory_before() -> int:
    """Forget the peak so far and return the bytes in use."""
    gc.collect()
    time.sleep(0.2)  # XLA frees a computation's buffers on a thread of its own
    if jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["bytes_in_use"]
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    return memory_in_use("VmRSS")


def memory_peak() -> int:
    """Peak bytes in use; on a GPU since the process began, plain training included."""
    if jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return memory_in_use("VmHWM")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def repeated(function: Callable[[], Any], times: int) -> list[float]:
    """Seconds of so many calls."""
    return [timed(function)[0] for _ in range(times)]


def summary(prefix: str, seconds: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        f"{prefix}_seconds": statistics.median(seconds),
        f"{prefix}_min": min(seconds),
        f"{prefix}_max": max(seconds),
    }


def measure(
    contender: Contender, repeats: int, repeat_below: float, say: Callable[[str], None]
) -> tuple[dict[str, Any], np.ndarray]:
    """Run one contender.

    Args:
      contender: what to run.
      repeats: timed calls after one that is not.
      repeat_below: seconds; a metagradient that takes longer is timed once.
      say: called with the name of each phase as it begins.

    Returns:
      A row (seconds of plain training and of the metagradient, of compilation; MiB at the peak of the first
      metagradient above what was resident before it), and the gradient.
    """
    say("plain")
    contender.plain()
    plain = repeated(contender.plain, repeats)
    say("compile")
    with freed_at_once():
        compile_seconds, _ = timed(contender.warm_up)
        before = memory_before()
        say("metagradient")
        gradient = contender.metagradient()
        peak = memory_peak()
    say("repeats")
    seconds = repeated(contender.metagradient, 1)
    if seconds[0] < repeat_below:
        seconds += repeated(contender.metagradient, repeats - 1)
    row = summary("metagradient", seconds) | summary("plain", plain)
    row |= {"ratio": row["metagradient_seconds"] / row["plain_seconds"], "repeats": len(seconds)}
    row |= {"memory_mib": (peak - before) / MIB, "compile_seconds": compile_seconds}
    return row | {"states_held": contender.states_held}, gradient


def versions(name: str) -> str:
    """The versions of what a contender runs on."""
    framework = name.partition("_")[0]
    packages = ("jax", *PACKAGES[framework])
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def processor() -> str:
    """The model of the GPU or of the CPU that is used."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def available(name: str) -> bool:
    """Whether what a contender needs is installed."""
    modules = [*PACKAGES[name.partition("_")[0]]]
    return all(importlib.util.find_spec(module) for module in modules)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--setting", default="digits", choices=problem.SETTINGS)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--repeat-below", type=float, default=8.0)
    parser.add_argument("--problem", type=Path, required=True, help="what `problem.save` wrote")
    parser.add_argument("--gradient", type=Path, required=True, help="file to write")
    args = parser.parse_args()

    def say(phase: str) -> None:
        print(json.dumps({"phase": phase}), flush=True)

    if not STATUS.exists():
        parser.error(f"platform: got {platform.system()}, expected Linux: peak memory is read from {STATUS}")
    contender = build(args.contender, problem.load(args.problem, args.setting, args.num_steps))
    row, gradient = measure(contender, args.repeats, args.repeat_below, say)
    np.save(args.gradient, gradient, allow_pickle=False)
    row |= {"versions": versions(args.contender), "processor": processor(), "seed": problem.SEED}
    print(json.dumps({"row": row}), flush=True)


if __name__ == "__main__":
    main()
