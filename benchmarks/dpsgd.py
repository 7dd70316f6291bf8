"""The benchmark of a DP-SGD step: examples per second and peak memory beside jax-privacy and Opacus, to one CSV file.

    make bench-dpsgd                                      # on this machine's CPU
    python -m benchmarks.dpsgd --device gpu               # batch 4096, 1 and 16 copies, on a GPU
    python -m benchmarks.dpsgd --quick --output /tmp/quick.csv

Each contender runs in a process of its own (`benchmarks.dpsgd_measure`), on one thread. First each tries some
microbatches, one process at a time, and keeps the fastest. Then all contenders take turns, so that load on the machine
meets them alike; the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.dpsgd_problem import Problem
from benchmarks.metagradient import resident
from metacanary import store

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "dpsgd.csv"
NOT_PRIVATE = "sgd"
"""The yardstick: a step of the same network on the same images without clipping and noise."""
OURS = ("metacanary_flat", "metacanary_flat_padded", "metacanary_per_layer", "metacanary_adaptive")
PEERS = ("jax_privacy", "opacus_hooks", "opacus_functorch", "opacus_ghost")
SAME_LAYERS = "jax_privacy_same_layers"
"""A peer that is given metacanary's form of convolutions, where the network has it: what clipping alone gains."""
CONTENDERS = (NOT_PRIVATE, *OURS, *PEERS, SAME_LAYERS)
NAIVE = {
    **dict.fromkeys(("metacanary_flat", "metacanary_flat_padded", *PEERS, SAME_LAYERS), "naive_flat"),
    **dict.fromkeys(("metacanary_per_layer", "metacanary_adaptive"), "naive_per_layer"),
}
"""What each sum of clipped gradients is held against. Adaptive thresholds start as the fixed ones."""
CASES = {
    "cpu": [("digits", 256, 1), ("digits", 256, 4), ("wrn16_4", 32, 1), ("wrn16_4", 32, 4)],
    "gpu": [("wrn16_4", 4096, 1), ("wrn16_4", 4096, 16)],
}
"""Setting, batch and copies of each example."""
MICROBATCHES = {
    ("digits", 1): (32, 64, 128, 256),
    ("digits", 4): (8, 16, 32, 64, 256),
    ("wrn16_4", 1): (4, 8, 32, 128, 256, 512, 1024),
    ("wrn16_4", 4): (4, 8, 32),
    ("wrn16_4", 16): (8, 16, 32, 64, 128, 256),
}
"""What each contender tries, by setting and copies; see `microbatches`."""
CASE = ["setting", "device", "batch", "copies"]
COLUMNS = [
    *CASE,
    *("contender", "status", "note", "microbatch", "tried"),
    *("examples_per_second", "step_seconds", "step_min", "step_max", "rounds", "over_sgd"),
    *("memory_mib", "compile_seconds", "relative_error", "threads", "seed", "processor", "versions", "date"),
]
"""Of the CSV. step_seconds: median over rounds. over_sgd: that over the one of `NOT_PRIVATE`. memory_mib: peak of a
step above what was resident before it. relative_error: ||s - s_naive|| / ||s_naive||, where s is the sum of clipped
gradients of a small batch in float64. tried: seconds of a step by microbatch, the faster of two."""


class Stopped(Exception):
    """A process that was stopped or ended: `status` is memory, time or error."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(note)
        self.status, self.note = status, note


class Worker:
    """A process of `benchmarks.dpsgd_measure`, asked by lines and answering in lines of JSON.

    Args:
      command: what to run.
      environment: of the process.
      limit_bytes: of its resident memory.
      limit_seconds: of one answer.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], limit_bytes: float, limit_seconds: float
    ) -> None:
        self.limit_bytes, self.limit_seconds = limit_bytes, limit_seconds
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=self.errors, **pipes)

    def answer(self) -> dict[str, Any]:
        """The next line.

        Raises:
          Stopped: it took too much, or ended without a word.
        """
        began = time.monotonic()
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            if resident(self.process.pid) > self.limit_bytes:
                raise self._stopped("memory", f"more than {self.limit_bytes / 2**30:g} GiB")
            if time.monotonic() - began > self.limit_seconds:
                raise self._stopped("time", f"more than {self.limit_seconds:g} s")
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        raise self._stopped("error", (self.errors.read().strip().splitlines() or ["it ended without a word"])[-1])

    def ask(self, steps: int) -> float:
        """Seconds of one of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()["step_seconds"]

    def _stopped(self, status: str, note: str) -> Stopped:
        self.close()
        return Stopped(status, note)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting, batch and number of copies, and how it is measured; as on the command line."""

    setting: str
    device: str
    batch: int
    copies: int
    rounds: int
    min_seconds: float
    limit_bytes: float
    limit_seconds: float

    def rows(self, contenders: Sequence[str]) -> list[dict[str, Any]]:
        """Measure all contenders and return their rows."""
        shared = {name: getattr(self, name) for name in CASE}
        shared |= {"threads": 1, "date": time.strftime("%Y-%m-%d")}
        errors = self.errors([name for name in contenders if name in NAIVE])
        with contextlib.ExitStack() as stack:
            rows, workers = [], {}
            for name in tqdm(contenders, unit="contender", desc=f"{self.setting}, {self.copies} copies"):
                row, worker = self.best(name)
                rows.append(shared | {"contender": name, "relative_error": errors.get(name), "note": ""} | row)
                if worker is not None:
                    stack.callback(worker.close)
                    workers[name] = worker
            turns = self.turns(workers, {row["contender"]: row.get("step_seconds") for row in rows})
        rows = [row | turns.get(row["contender"], {}) for row in rows]
        yardstick = {row["contender"]: row.get("step_seconds") for row in rows}.get(NOT_PRIVATE)
        for row in rows:
            if row["status"] == "ok" and yardstick is not None:
                row["over_sgd"] = row["step_seconds"] / yardstick
        return rows

    def errors(self, names: Sequence[str]) -> dict[str, float]:
        """The relative error of each contender's sum of clipped gradients, on a small batch."""
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in (*sorted({NAIVE[name] for name in names}), *names):
                path = Path(folder) / f"{name}.npy"
                worker = self.worker(name, self.batch, "--check", str(path))
                with contextlib.closing(worker), contextlib.suppress(Stopped):
                    worker.answer()
                    found[name] = np.load(path, allow_pickle=False)
        held = [(name, found[name], found[NAIVE[name]]) for name in names if {name, NAIVE[name]} <= found.keys()]
        return {name: float(np.linalg.norm(s - naive) / np.linalg.norm(naive)) for name, s, naive in held}

    def best(self, name: str) -> tuple[dict[str, Any], Worker | None]:
        """A contender's row so far, and its process with the fastest microbatch, which waits; None if all failed."""
        best, kept, tried, stopped = {}, None, [], Stopped("error", "no microbatch divides the batch")
        for microbatch in microbatches(self.setting, self.device, self.batch, self.copies):
            worker = self.worker(name, microbatch)
            try:
                row = worker.answer()
            except Stopped as reason:
                stopped = reason
                tried.append(f"{microbatch}: {reason.status}")
                continue
            tried.append(f"{microbatch}: {row['step_seconds']:.4g}")
            if kept is None or row["step_seconds"] < best["step_seconds"]:
                best, worker, kept = row | {"microbatch": microbatch}, kept, worker
            if worker is not None:
                worker.close()
        if kept is None:
            return {"status": stopped.status, "note": stopped.note, "tried": ", ".join(tried)}, None
        return {"status": "ok", "tried": ", ".join(tried)} | best, kept

    def turns(self, workers: dict[str, Worker], quick: dict[str, float]) -> dict[str, dict[str, Any]]:
        """Seconds of a step over rounds in which all contenders take turns."""
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in tqdm(range(self.rounds), unit="round", desc="turns"):
            for name, worker in workers.items():
                seconds[name].append(worker.ask(max(1, math.ceil(self.min_seconds / quick[name]))))
        return {name: summary(self.batch, values) for name, values in seconds.items()}

    def worker(self, name: str, microbatch: int, *options: str) -> Worker:
        """A process for a contender."""
        command = [sys.executable, "-m", "benchmarks.dpsgd_measure", "--contender", name, "--setting", self.setting]
        command += ["--batch", str(self.batch), "--copies", str(self.copies), "--microbatch", str(microbatch)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = os.environ | threads | {"JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[self.device]}
        if name in (*PEERS, SAME_LAYERS):  # only metacanary promises the same bits at each run
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=false"
        return Worker([*command, *options], environment, self.limit_bytes, self.limit_seconds)


def contenders(setting: str, chosen: Sequence[str]) -> list[str]:
    """Those of a setting: without convolutions of its own a network has the same layers anyway."""
    own = Problem(setting=setting, batch=1, copies=1, microbatch=1).has_own_convolutions
    return [name for name in chosen if own or name != SAME_LAYERS]


def microbatches(setting: str, device: str, batch: int, copies: int) -> list[int]:
    """What is tried: on a CPU at most 32 examples of the large network at a time, on a GPU at least 128 images."""
    found = [size for size in MICROBATCHES[setting, copies] if batch % size == 0]
    if setting == "wrn16_4":
        found = [size for size in found if (size * copies >= 128 if device == "gpu" else size <= 32)]
    return found


def summary(batch: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Median and range."""
    median = statistics.median(seconds)
    return {
        "examples_per_second": batch / median,
        "step_seconds": median,
        "step_min": min(seconds),
        "step_max": max(seconds),
        "rounds": len(seconds),
    }


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table of a file with the rows of one case in place of all of the same case, so that one run made them."""
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    same = (table[CASE].astype(str) == pd.Series(rows[0])[CASE].astype(str)).all(axis=1)
    return pd.DataFrame([*table[~same].to_dict("records"), *rows], columns=COLUMNS)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What the command line asks for."""
    for setting, batch, copies in CASES[args.device]:
        if setting in args.settings and (args.copies is None or copies in args.copies):
            yield Case(
                setting=setting,
                device=args.device,
                batch=args.batch or batch,
                copies=copies,
                rounds=args.rounds,
                min_seconds=args.min_seconds,
                limit_bytes=args.limit_gib * 2**30,
                limit_seconds=args.limit_seconds,
            )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--settings", nargs="+", default=["digits", "wrn16_4"], choices=("digits", "wrn16_4"))
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--copies", type=int, nargs="+", help="only cases with so many")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-seconds", type=float, default=0.5, help="of a turn, in as many steps as it takes")
    parser.add_argument("--limit-gib", type=float, default=8.0)
    parser.add_argument("--limit-seconds", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true", help="digits without copies at batch 32, 2 rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.quick:
        args.settings, args.copies, args.batch, args.rounds = ["digits"], [1], 32, 2
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases; each is in the file as soon as it is measured."""
    args = parsed(arguments)
    failed = []
    for case in cases(args):
        rows = case.rows(contenders(case.setting, args.contenders))
        store.write_text(args.output, merged(args.output, rows).to_csv(index=False, float_format="%.6g"))
        failed += [f"{row['contender']}: {row['note']}" for row in rows if row["status"] == "error"]
    print(*failed, sep="\n", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
