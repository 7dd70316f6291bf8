"""The benchmark of metagradients: seconds, peak memory and agreement of all contenders, to one CSV file.

    make bench-metagradient          # the whole sweep
    python -m benchmarks.metagradient --quick --output /tmp/quick.csv

Each contender at each T runs in a process of its own (`benchmarks.measure`), one at a time, on one thread. One that
needs more than `--limit-gib` or `--limit-seconds` is stopped and recorded so; larger T are then recorded, not tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from metacanary import store

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "metagradient.csv"
REFERENCE = "metacanary_all"
"""Whose gradient the others' are held against; it comes first."""
OURS = (
    *("metacanary_plan", "metacanary_sqrt", "metacanary_tree8", "metacanary_tree2"),
    *("metacanary_sqrt_host", "metacanary_sqrt_disk"),
)
JAX = ("jax_scan", "jax_scan_checkpoint", "jax_scan_nested", "jax_scan_nested_mixed")
PEERS = ("equinox_sqrt", "equinox_log", "bergson_sqrt", "torch_unrolled", "torch_checkpoint")
OPTIONAL = ("bergson_log", "bergson_all")
"""Slower than bergson_sqrt in our setting, and run only if asked for."""
NUM_STEPS = (50, 100, 200, 500, 1000, 2000)
TARGETS = {
    4.5: ("metacanary_sqrt", "metacanary_sqrt_host", "metacanary_sqrt_disk"),
    6.0: ("metacanary_tree8", "metacanary_tree2"),
}
"""What `ratio` was to be at most, and the schedules it was said of: about 2 sqrt(T) states, k log_k T states. The first
of each keeps to it at every T, which a test asserts; the others do not, which the tables say."""
ALLOWANCE = 1.5
"""Ours was to be the fastest of all contenders that need at most so many times its peak memory."""
SLACK = 1.05
"""Peaks of resident memory that differ by less than this factor are taken for the same."""
KEY = ["setting", "device", "contender", "num_steps"]
COLUMNS = [
    *KEY,
    *("status", "note", "states_held"),
    *("metagradient_seconds", "metagradient_min", "metagradient_max", "repeats"),
    *("plain_seconds", "plain_min", "plain_max", "ratio", "compile_seconds"),
    *("memory_mib", "relative_error", "threads", "seed", "processor", "versions", "date"),
]
"""Of the CSV. relative_error: ||g - g_ref|| / ||g_ref|| with g_ref of `REFERENCE` at the same T. ratio: seconds of the
metagradient over those of plain training in the same framework. memory_mib: peak above what was resident before.
compile_seconds: of metacanary_plan without what was compiled to measure a step."""


@dataclass(kw_only=True)
class Sweep:
    """What one call of the driver does.

    Attributes:
      setting, device, repeats, repeat_below: as on the command line.
      limit_bytes, limit_seconds: of one process's memory, and of one phase of it (compilation, one metagradient).
      data_dir: where `metacanary.data` keeps data sets.
      folder: for problems and gradients.
      stopped: why a contender was stopped, and at which T.
    """

    setting: str
    device: str
    repeats: int
    repeat_below: float
    limit_bytes: float
    limit_seconds: float
    data_dir: Path
    folder: Path
    stopped: dict[str, tuple[str, str]] = field(default_factory=dict)

    def rows(self, contenders: Sequence[str], num_steps: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Measure each contender at each T and yield its row."""
        with tqdm(total=len(contenders) * len(num_steps), unit="row", desc=self.setting) as bar:
            for steps in num_steps:
                self._write_problem(steps)
                for name in contenders:
                    bar.set_postfix_str(f"T={steps} {name}")
                    yield self._common(name, steps) | self._measured(name, steps)
                    bar.update()

    def _common(self, name: str, steps: int) -> dict[str, Any]:
        """The columns that do not depend on how it went."""
        keys = {"setting": self.setting, "device": self.device, "contender": name, "num_steps": steps}
        return keys | {"threads": 1, "date": time.strftime("%Y-%m-%d"), "note": ""}

    def _measured(self, name: str, steps: int) -> dict[str, Any]:
        """The other columns."""
        if name in self.stopped:
            status, note = self.stopped[name]
            return {"status": status, "note": note}
        gradient = self.folder / f"{name}.npy"
        command = [sys.executable, "-m", "benchmarks.measure", "--contender", name, "--setting", self.setting]
        command += ["--num-steps", str(steps), "--repeats", str(self.repeats)]
        command += ["--repeat-below", str(self.repeat_below)]
        command += ["--problem", str(self._problem), "--gradient", str(gradient)]
        status, result = watched(command, self.environment(), self.limit_bytes, self.limit_seconds)
        if status != "ok":
            if status in ("memory", "time"):
                self.stopped[name] = (status, f"not tried: at T = {steps} {result}")
            return {"status": status, "note": result}
        reference = np.load(self.folder / f"{REFERENCE}.npy", allow_pickle=False)
        error = np.linalg.norm(np.load(gradient, allow_pickle=False) - reference) / np.linalg.norm(reference)
        return {"status": "ok", "relative_error": float(error)} | result

    @property
    def _problem(self) -> Path:
        return self.folder / "problem.npz"

    def _write_problem(self, steps: int) -> None:
        """Draw the problem once for all contenders."""
        code = "import sys; from pathlib import Path; from benchmarks import problem; "
        code += "problem.save(Path(sys.argv[1]), problem.make(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))"
        command = [sys.executable, "-c", code, str(self._problem), self.setting, str(steps), str(self.data_dir)]
        subprocess.run(command, cwd=ROOT, env=self.environment() | {"JAX_PLATFORMS": "cpu"}, check=True)

    def environment(self) -> dict[str, str]:
        """One thread each, and the chosen device."""
        threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        if self.device == "gpu":
            device = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            device |= {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
        return os.environ | threads | device | {"PYTHONUNBUFFERED": "1"}


def watched(
    command: Sequence[str], environment: dict[str, str], limit_bytes: float, limit_seconds: float
) -> tuple[str, Any]:
    """Run `benchmarks.measure` and stop it when it takes too much.

    Args:
      command: what to run.
      environment: of the process.
      limit_bytes: of its resident memory.
      limit_seconds: of its phases "compile" and "metagradient".

    Returns:
      ("ok", the row), or ("memory", ...), ("time", ...), ("error", ...) with what happened.
    """
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors, **options) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines))
        reader.start()
        try:
            stopped = _watch(process.pid, lines, limit_bytes, limit_seconds)
        finally:
            process.kill()
            reader.join()
        if stopped is not None:
            return stopped
        errors.seek(0)
        return "error", (errors.read().strip().splitlines() or ["it ended without a word"])[-1]


def _read(stdout: Iterable[str], lines: queue.Queue[str | None]) -> None:
    """Pass lines on as they come, and None at the end."""
    for line in stdout:
        lines.put(line)
    lines.put(None)


def _watch(
    pid: int, lines: queue.Queue[str | None], limit_bytes: float, limit_seconds: float
) -> tuple[str, Any] | None:
    """What `watched` returns, or None if the process ended without a row."""
    phase, began = "start", time.monotonic()
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=0.05)
            if line is None:
                return None
            message = json.loads(line)
            if "row" in message:
                return "ok", message["row"]
            phase, began = message["phase"], time.monotonic()
        if resident(pid) > limit_bytes:
            return "memory", f"more than {limit_bytes / 2**30:g} GiB in phase {phase}"
        if phase in ("compile", "metagradient") and time.monotonic() - began > limit_seconds:
            return "time", f"more than {limit_seconds:g} s in phase {phase}"


def resident(pid: int) -> int:
    """Bytes of memory that a process has now; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def merged(path: Path, row: dict[str, Any]) -> pd.DataFrame:
    """The table of a file with a row added, in place of one of the same key."""
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    same = (table[KEY].astype(str) == pd.Series(row)[KEY].astype(str)).all(axis=1)
    rows = [*table[~same].to_dict("records"), row]
    return pd.DataFrame(rows, columns=COLUMNS)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="digits", choices=("digits", "digits_lax", "resnet9"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--num-steps", type=int, nargs="+", default=NUM_STEPS)
    parser.add_argument("--contenders", nargs="+", choices=(REFERENCE, *OURS, *JAX, *PEERS, *OPTIONAL))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--repeat-below", type=float, default=8.0, help="seconds; what takes longer is timed once")
    parser.add_argument("--limit-gib", type=float, default=8.0)
    parser.add_argument("--limit-seconds", type=float, default=180.0)
    parser.add_argument("--quick", action="store_true", help="T = 20, each contender once")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "results" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.quick:
        args.num_steps, args.repeats = [20], 1
    everywhere = (*OURS, *JAX, *PEERS) if args.setting == "digits" else (*OURS, *JAX, "equinox_sqrt", "equinox_log")
    chosen = args.contenders or everywhere
    args.contenders = [REFERENCE, *(name for name in chosen if name != REFERENCE)]
    if args.setting != "digits" and any(name.startswith(("torch", "bergson")) for name in args.contenders):
        parser.error("--contenders: got a PyTorch one, expected --setting digits, of whose network there is a twin")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; each row is in the file as soon as it is measured."""
    args = parsed(arguments)
    failed = []
    with tempfile.TemporaryDirectory(prefix="bench-metagradient-") as folder:
        sweep = Sweep(
            setting=args.setting,
            device=args.device,
            repeats=args.repeats,
            repeat_below=args.repeat_below,
            limit_bytes=args.limit_gib * 2**30,
            limit_seconds=args.limit_seconds,
            data_dir=args.data_dir,
            folder=Path(folder),
        )
        for row in sweep.rows(args.contenders, args.num_steps):
            store.write_text(args.output, merged(args.output, row).to_csv(index=False))
            if row["status"] == "error":
                failed.append(f"{row['contender']} at T = {row['num_steps']}: {row['note']}")
    print(*failed, sep="\n", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
