"""How a job with checkpoints ends on SIGTERM, and how SLURM is asked to run it again.

SLURM sends SIGTERM before the time limit (`--signal` in slurm/profile.yaml), at the beginning of the grace of a job
that is preempted, and when a job is cancelled; a local Snakemake that is stopped sends it too.
"""

import os
import re
import signal
import subprocess
import time
from typing import Any


class Termination:
    """SIGTERM as a question that a computation asks after each of its steps."""

    def __init__(self) -> None:
        self._requested: float | None = None

    def listen(self) -> "Termination":
        """From now on SIGTERM no longer ends the process."""
        signal.signal(signal.SIGTERM, self._request)
        return self

    def __call__(self) -> bool:
        """Whether SIGTERM has come."""
        return self._requested is not None

    def seconds(self) -> float:
        """The time since SIGTERM came; 0 if it has not."""
        return 0.0 if self._requested is None else time.monotonic() - self._requested

    def _request(self, *_: Any) -> None:
        self._requested = self._requested or time.monotonic()


def run_again(rule: str) -> str:
    """Asks SLURM to run this job again from its queue, if it is one that Snakemake submitted and nobody cancelled it.

    So that a job longer than its time limit takes as many attempts as it needs, of which each goes on where the last
    one ended, and none counts as one of Snakemake's retries. To be called after a step that a checkpoint keeps, so
    that no attempt is in vain.

    Args:
      rule: The name of the job's rule, which stands in the comment that Snakemake gives its jobs.

    Returns:
      What happens next, in words.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "the next attempt goes on"
    try:
        shown = _scontrol("--oneliner", "show", "job", job)
        state, reason, comment = (_field(shown, name) for name in ("JobState", "Reason", "Comment"))
        if not re.match(rf"rule_{re.escape(rule)}(_|$)", comment):
            return "the next attempt goes on"  # Snakemake runs within a job of another's making, which is not ours
        # It runs before its limit and in its grace; at its limit it ends, as it does if somebody cancelled it.
        if state != "RUNNING" and reason != "TimeLimit":
            return f"SLURM says {state}; the next attempt goes on"
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM was not to be asked for another attempt ({error}); one of Snakemake's retries goes on"
    return f"SLURM runs job {job} again, which goes on"


def _scontrol(*arguments: str) -> str:
    """Runs scontrol.

    A controller that does not answer must not keep the job; nor may another SIGTERM, which SLURM sends to all processes
    of the job, end scontrol.
    """
    # A shell, whose ignored signals scontrol inherits; Python code after a fork could deadlock with XLA's threads.
    call = ["/bin/sh", "-c", 'trap "" TERM; exec scontrol "$@"', "sh", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout


def _field(shown: str, name: str) -> str:
    """A field of what scontrol shows, up to the next white space."""
    found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
    return found.group(1) if found else ""
