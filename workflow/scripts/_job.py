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
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import _checkpoints
import _stop
from tqdm import tqdm

from metacanary import backend, store
from metacanary.interruption import Stopped

# A checkpoint of other versions of these may not end in the same bits.
NUMERICAL = ("jax", "jaxlib", "flax", "optax", "numpy")

# Errors whose text says what is wrong with the inputs or the numbers; where they were raised stands in the log.
EXPLAINED = (ValueError, ArithmeticError, FileNotFoundError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A running job.

    Attributes:
      input: Snakemake's input files, by name or number.
      output: Its output files.
      settings: All settings that the result depends on; those of its inputs by digest, in "inputs".
      rule: The name of its rule and script.
      params: Snakemake's params: settings, their digest, the digest of the code, and what changes no result.
      began: When the job began.
      termination: What a job with checkpoints asks after each step, once it `listen`s.
    """

    input: Any
    output: Any
    settings: dict[str, Any]
    params: Any
    rule: str = ""
    began: float = dataclasses.field(default_factory=time.perf_counter)
    termination: _stop.Termination = dataclasses.field(default_factory=_stop.Termination)

    @property
    def checkpoints(self) -> Path:
        """A folder for checkpoints of these settings, code, versions and device, so that no others are taken up."""
        versions, device = store.versions(), store.device()
        computed_by = [[versions[name] for name in NUMERICAL], device["platform"], device["kind"]]
        key = f"{self.params.config_digest}-{self.params.code}-{store.digest(computed_by)}"
        return Path(self.params.checkpoints, key)

    def finish_checkpoints(self) -> None:
        """Says that the checkpoints hold all of the result; the workflow deletes them when it has succeeded."""
        _checkpoints.mark_finished(self.checkpoints)

    def provenance(self, **extra: Any) -> dict[str, Any]:
        """Says how the result was made, for `store.write_*`."""
        digests = {"config_digest": self.params.config_digest, "code_digest": self.params.code}
        chained = {"code_digests": self.code_digests(), "settings": self.settings}
        return store.provenance(**digests, wall_seconds=time.perf_counter() - self.began, **chained, **extra)

    def code_digests(self) -> dict[str, list[str]]:
        """The digests of the code behind the result, by script: its own and those of all inputs.

        More than one of a script: the code was edited between two jobs, and not all were run again.
        """
        found = {self.rule: {self.params.code}}
        for _, path, _ in self._inputs():
            for script, digests in store.read_provenance(path).get("code_digests", {}).items():
                found.setdefault(script, set()).update(digests)
        return {script: sorted(digests) for script, digests in found.items()}

    def check_inputs(self) -> None:
        """Raises ValueError for an input that was made with other settings than the config now has.

        And for inputs of one name, as the audits of all cells, that other versions of the packages made.
        """
        versions: dict[str, dict[str, str]] = {}
        for name, path, expected in self._inputs():
            made = store.read_provenance(path)
            store.require_config(path, made, expected)
            found = made.get("versions", {})
            require_same_versions(path, found, versions.setdefault(name, found))

    def _inputs(self) -> Iterator[tuple[str, str, str]]:
        """Yields name, path and expected digest of each input that a job with settings made."""
        for name, digests in self.settings.get("inputs", {}).items():
            paths = self.input.get(name)
            pairs = [(paths, digests)] if isinstance(digests, str) else zip(paths, digests, strict=True)
            for path, expected in pairs:
                yield name, path, expected


def require_same_versions(path: str, found: dict[str, str], others: dict[str, str]) -> None:
    """Raises ValueError if an input was made with other versions of packages than the inputs before it."""
    names = sorted(name for name in found.keys() | others.keys() if found.get(name) != others.get(name))
    if names:
        differ = ", ".join(f"{name} ({others.get(name)} and {found.get(name)})" for name in names)
        raise ValueError(
            f"inputs were made with different versions of {', '.join(names)}: {differ} at path={str(path)!r}; "
            "delete what the older ones made, so that it is made again"
        )


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
      stdout, stderr, logging, warnings and the traceback of an error stand in the job's log, and on the terminal too;
      the log of a job with checkpoints begins with those of its earlier attempts.
      Of EXPLAINED errors the terminal shows one line; others are raised again.
      A job that `Stopped` ends with an error, so that it is run again.
    """
    # Snakemake itself sets OMP_NUM_THREADS, which NumPy reads.
    backend.configure(threads=snakemake.threads, compiled=Path(".snakemake", "compiled"))
    files = {"input": snakemake.input, "output": snakemake.output}
    params = snakemake.params
    try:
        folder = getattr(params, "checkpoints", None)
        with logged(Path(snakemake.log[0]), earlier=folder and _checkpoints.earlier_log(folder)):
            job = Job(**files, settings=params.settings, params=params, rule=snakemake.rule)
            job.check_inputs()
            try:
                yield job
            except Stopped as stopped:
                print(f"{stopped}; checkpoint written {job.termination.seconds():.1f} s after SIGTERM", flush=True)
                sys.exit(_stop.run_again(snakemake.rule))
    except EXPLAINED as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


@contextlib.contextmanager
def logged(path: Path, *, earlier: Path | None = None) -> Iterator[None]:
    """Copies all that is printed, logged, warned of or raised into a file.

    Args:
      path: The file.
      earlier: Holds the logs of earlier attempts, which this one begins with; it is left out where its folder is not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with path.open("w", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        if earlier is not None and earlier.exists():
            log.write(earlier.read_text(encoding="utf-8"))
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
        finally:
            log.flush()
            if earlier is not None and earlier.parent.exists():
                store.write_text(earlier, path.read_text(encoding="utf-8"))


def advance(bar: tqdm, reached: int, *, by: int = 1) -> None:
    """Moves the bar by a step, or a step of several runs; what before it a checkpoint held has no part in the rate."""
    bar.initial += max(reached - bar.n - by, 0)
    bar.update(reached - bar.n)


@contextlib.contextmanager
def progress(total: int, unit: str, description: str, *, initial: int = 0) -> Iterator[tqdm]:
    """Shows a progress bar with rate and time left: redrawn on a terminal, a line each ten seconds elsewhere.

    At the end, whatever ends it, it says how much was done in this attempt, without what checkpoints held.
    """
    every = 0.5 if sys.stderr.isatty() else 10.0
    options = {"unit": unit, "desc": description, "initial": initial, "mininterval": every, "maxinterval": every}
    bar = tqdm(total=total, **options, file=sys.stderr)
    try:
        yield bar
    finally:
        bar.close()
        print(f"{description}: {bar.n - bar.initial} of {total} {unit}s done in this attempt", flush=True)
