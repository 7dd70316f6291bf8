"""What the main block of every script runs in: its log, thread limits, checked inputs, progress, provenance.

if __name__ == "__main__":
    with running(snakemake) as job:
        table = do_something(job.settings)
        store.write_csv(job.output[0], table, job.provenance())
"""

import contextlib
import dataclasses
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from metacanary import store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A running job.

    Attributes:
      input: Snakemake's input files, by name or number.
      output: Its output files.
      settings: All settings that the result depends on; those of its inputs by digest, in "inputs".
      params: Snakemake's params: settings, their digest, the digest of the code, and what changes no result.
      began: When the job began.
    """

    input: Any
    output: Any
    settings: dict[str, Any]
    params: Any
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def checkpoints(self) -> Path:
        """A folder for checkpoints of these settings and this code, so that no other job's are taken up."""
        return Path(self.params.checkpoints, f"{self.params.config_digest}-{self.params.code}")

    def discard_checkpoints(self) -> None:
        """Deletes the job's checkpoints; another job that writes the same result at this moment does no harm."""
        for checkpoint in self.checkpoints.glob("*.npz"):
            checkpoint.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.checkpoints.rmdir()

    def provenance(self, **extra: Any) -> dict[str, Any]:
        """Says how the result was made, for `store.write_*`."""
        digests = {"config_digest": self.params.config_digest, "code_digest": self.params.code}
        seconds = time.perf_counter() - self.began
        return store.provenance(**digests, wall_seconds=seconds, settings=self.settings, **extra)

    def check_inputs(self) -> None:
        """Raises ValueError for an input that was made with other settings than the config now has."""
        for name, digests in self.settings.get("inputs", {}).items():
            paths = self.input.get(name)
            pairs = [(paths, digests)] if isinstance(digests, str) else zip(paths, digests, strict=True)
            for path, expected in pairs:
                store.require_config(path, store.read_provenance(path), expected)


class Tee(io.TextIOBase):
    """A stream that writes to the terminal (under SLURM: the job's log) and to a log file.

    A progress bar returns the carriage to redraw itself; in the log it starts a line each time.
    """

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log = terminal, log

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding

    def write(self, text: str) -> int:
        self._log.write(text.replace("\r", "\n"))
        self._log.flush()
        return self._terminal.write(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()


@contextlib.contextmanager
def running(snakemake: Any) -> Iterator[Job]:
    """Runs a script's main block as a job of Snakemake.

    Args:
      snakemake: The object that Snakemake puts into a script.

    Yields:
      The job, once its inputs are known to be of its config.

    Guarantees:
      stdout, stderr, logging, warnings and the traceback of an error stand in the job's log, and on the terminal too.
      The error is raised again.
    """
    configure_xla(snakemake.threads)
    with logged(Path(snakemake.log[0])):
        params = snakemake.params
        job = Job(input=snakemake.input, output=snakemake.output, settings=params.settings, params=params)
        job.check_inputs()
        yield job


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Copies all that is printed, logged, warned of or raised into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with path.open("w", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(Tee(sys.stdout, log)))
        stack.enter_context(contextlib.redirect_stderr(Tee(sys.stderr, log)))
        handler = logging.StreamHandler(sys.stderr)
        root.addHandler(handler)
        stack.callback(root.removeHandler, handler)
        logging.captureWarnings(True)
        stack.callback(logging.captureWarnings, False)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=log)  # Python prints the terminal's copy
            raise


def configure_xla(threads: int) -> None:
    """Makes XLA use so many threads, no more GPU memory than it needs, and operations that are deterministic.

    To be called before JAX computes: XLA reads its flags when it is first used. Snakemake itself sets OMP_NUM_THREADS
    and its like, which NumPy reads when it is imported. Flags that the user has set come last and win.
    """
    flags = ["--xla_gpu_deterministic_ops=true"]
    if threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
    os.environ["NPROC"] = str(threads)  # the size of XLA's thread pool, whatever the machine has
    # Jobs that run side by side share a GPU; by default each would take three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def progress(total: int, unit: str, description: str, *, initial: int = 0) -> tqdm:
    """Makes a progress bar with rate and time left: redrawn on a terminal, a line each ten seconds elsewhere."""
    every = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, unit=unit, desc=description, initial=initial, mininterval=every, maxinterval=every, file=sys.stderr
    )
