"""The pipeline on the test cluster: Snakemake under the profile that is shipped, with nothing but shorter waits."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from cluster import ENDED, Cluster, Job, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = Path(__file__).with_name("faults.yaml")
SUMMARY = "results/faults/summary/epsilon.csv"
SHORTENED = {
    "slurm-init-seconds-before-status-checks": 1,  # 40 in the profile
    "seconds-between-status-checks": 1,
    "latency-wait": 10,
}


def environment(cluster: Cluster | None = None) -> dict[str, str]:
    """The environment of Snakemake, without what makes it slow to start and what is meant for the tests' process."""
    unwanted = ("PYTHONDONTWRITEBYTECODE", "XLA_FLAGS", "OMP_NUM_THREADS")
    given = os.environ if cluster is None else cluster.environment
    return {name: value for name, value in given.items() if name not in unwanted}


def write_profile(
    folder: Path, *, rules: dict[str, dict[str, Any]] | None = None, shortened: bool = True, **changes: Any
) -> Path:
    """Writes the shipped profile with shorter waits, and with changes of entries and of the resources of rules."""
    profile = yaml.safe_load((ROOT / "slurm" / "profile.yaml").read_text(encoding="utf-8"))
    profile |= (SHORTENED if shortened else {}) | changes
    for rule, resources in (rules or {}).items():
        profile["set-resources"].setdefault(rule, {}).update(resources)
    folder.mkdir(parents=True)
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    return folder


class Workflow:
    """A run of the pipeline in a folder of its own.

    Args:
      cluster: Where its jobs run; None: on this machine, without SLURM.
      folder: An empty one.
      config: A config file.
      target: What to make.
      **changes: As of `write_profile`.
    """

    def __init__(
        self, cluster: Cluster | None, folder: Path, *, config: Path = CONFIG, target: str = SUMMARY, **changes: Any
    ) -> None:
        self.cluster, self.folder, self.target = cluster, folder, target
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "snakemake.log"
        where = ["--cores", "1"]
        if cluster is not None:
            where = ["--profile", str(write_profile(folder / "profile", **changes))]
        self._call = [sys.executable, "-m", "snakemake", *where, "--snakefile", str(ROOT / "Snakefile")]
        self._call += ["--directory", str(folder), "--configfile", str(config)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> "Workflow":
        """Starts Snakemake, and does not wait for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._call, *options, "--", self.target],
                env=environment(self.cluster),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def call(self, *options: str, seconds: float = 300) -> str:
        """Runs Snakemake with options to its end; returns what it printed."""
        done = subprocess.run(
            [*self._call, *options, "--", self.target],
            env=environment(self.cluster),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def finish(self, seconds: float = 900) -> int:
        """Waits for Snakemake to end; returns its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop(signal.SIGKILL)
            raise

    def stop(self, number: signal.Signals) -> None:
        """Sends Snakemake a signal."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def text(self) -> str:
        """What Snakemake printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ids(self) -> list[str]:
        """The SLURM jobs that were submitted so far, in order."""
        return re.findall(r"submitted with SLURM jobid (\d+)", self.text())

    def jobs(self, rule: str) -> list[Job]:
        """The jobs of a rule that this workflow submitted and the cluster remembers."""
        assert self.cluster is not None
        mine = set(self.ids())
        return [job for job in self.cluster.jobs(f"rule_{rule}_") if job.id in mine]

    def wait_for_job(self, rule: str, *states: str, seconds: float = 300) -> Job:
        """Waits for a job of a rule that is in one of the states."""

        def found() -> Job | None:
            assert self.process is None or self.process.poll() in (None, 0), self.text()
            return next((job for job in self.jobs(rule) if job.state in states), None)

        return wait_for(found, seconds, f"a job of {rule} in {states}")

    def wait_for_file(self, pattern: str, seconds: float = 300) -> Path:
        """Waits for a file."""

        def found() -> Path | None:
            assert self.process is None or self.process.poll() in (None, 0), self.text()
            return next(self.folder.glob(pattern), None)

        return wait_for(found, seconds, pattern)

    def wait_for_no_job(self, seconds: float = 120) -> None:
        """Waits until no job of this workflow is left on the cluster."""
        assert self.cluster is not None
        mine, cluster = set(self.ids()), self.cluster
        wait_for(lambda: not [j for j in cluster.jobs() if j.id in mine and j.state not in ENDED], seconds, "jobs")

    def summary(self) -> bytes:
        """The table of all audits."""
        return (self.folder / SUMMARY).read_bytes()
