"""Measures the step of one contender of `benchmarks.dpsgd` in a process of its own, when it is told to.

    python -m benchmarks.dpsgd_measure --contender jax_privacy --setting digits --batch 256 --copies 1 --microbatch 64

Prints a line of JSON with seconds of compilation and of a step and the peak memory. Then it reads numbers from standard
input, takes so many steps for each and prints the seconds of one, so that the driver can let contenders take turns.
With `--check FILE` it takes one small step without noise instead and writes the sum of clipped gradients.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import dpsgd_problem, measure
from benchmarks.dpsgd_contenders import CONTENDERS, Contender
from benchmarks.dpsgd_problem import Problem
from metacanary import backend

NAIVE = {"naive_flat": False, "naive_per_layer": True}
"""What `--check` takes for a loop over examples, and whether layers are clipped apart in it."""
PACKAGES = {"jax": ("jax", "jax-privacy"), "opacus": ("torch", "opacus")}


def build(name: str, problem: Problem) -> Contender:
    """The contender of a name, ready to run."""
    if name.startswith("opacus"):
        from benchmarks import dpsgd_opacus

        # Opacus's hook is on the first layer, whose input is no parameter.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        return dpsgd_opacus.CONTENDERS[name](problem)
    return CONTENDERS[name](problem)


def clipped_sum(name: str, problem: Problem) -> np.ndarray:
    """The sum of clipped gradients of a small batch, as the step of a contender changes the parameters by it."""
    jax.config.update("jax_enable_x64", True)
    if name in NAIVE:
        gradients = dpsgd_problem.naive_gradients(problem.check)
        return dpsgd_problem.naive_sum(gradients, problem.check.clip_norm, per_layer=NAIVE[name])
    contender = build(name, problem.check)
    before = contender.vector()
    seconds_of_steps(contender, 1)
    return before - contender.vector()


def seconds_of_steps(contender: Contender, number: int) -> float:
    """Seconds of one of so many steps."""
    began = time.perf_counter()
    for _ in range(number):
        contender.step()
    contender.wait()
    return (time.perf_counter() - began) / number


def first_steps(contender: Contender, on_cuda: bool) -> dict[str, float]:
    """Seconds of the first step, which compiles, and of the faster of two more; MiB at the peak of the second."""
    with measure.freed_at_once():
        compiling = seconds_of_steps(contender, 1)
        before = _cuda_bytes() if on_cuda else measure.memory_before()
        second = seconds_of_steps(contender, 1)
        peak = _cuda_bytes(peak=True) if on_cuda else measure.memory_peak()
    third = seconds_of_steps(contender, 1)
    return {
        "compile_seconds": max(0.0, compiling - second),
        "step_seconds": min(second, third),
        "memory_mib": (peak - before) / measure.MIB,
    }


def _cuda_bytes(peak: bool = False) -> int:
    """Bytes that PyTorch holds on the GPU now, after which the peak is counted anew; or their peak."""
    import torch

    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def versions(name: str) -> str:
    """The versions of what a contender runs on."""
    packages = PACKAGES.get(name.partition("_")[0], ("jax",))
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def say(message: dict[str, Any]) -> None:
    """A line to the driver."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Measure what the command line says, until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--setting", required=True, choices=dpsgd_problem.SETTINGS)
    for name in ("batch", "copies", "microbatch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--check", type=Path)
    args = parser.parse_args()
    backend.configure(threads=1)
    problem = Problem(setting=args.setting, batch=args.batch, copies=args.copies, microbatch=args.microbatch)
    if args.check:
        np.save(args.check, clipped_sum(args.contender, problem), allow_pickle=False)
        say({})
        return
    contender = build(args.contender, problem)
    on_cuda = args.contender.startswith("opacus") and jax.default_backend() != "cpu"
    row = first_steps(contender, on_cuda)
    say(row | {"versions": versions(args.contender), "processor": measure.processor(), "seed": dpsgd_problem.SEED})
    for line in sys.stdin:
        say({"step_seconds": seconds_of_steps(contender, int(line))})


if __name__ == "__main__":
    main()
