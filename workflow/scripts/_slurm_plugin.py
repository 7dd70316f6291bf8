"""Mends what Snakemake's SLURM plugin (2.8.0) does while the controller does not answer.

The plugin asks at every check for how long the cluster remembers finished jobs, and where it gets no answer it turns
from squeue to sacct. Without an accounting database sacct never answers: the plugin gives its jobs up, and Snakemake
waits for ever. What the cluster once said still holds when it does not answer.
"""

import sys
from collections.abc import Callable
from types import ModuleType

PLUGIN = "snakemake_executor_plugin_slurm"


def mend() -> None:
    """Lets the plugin remember the last answer, if this Snakemake has loaded the plugin."""
    plugin = sys.modules.get(PLUGIN)
    if isinstance(plugin, ModuleType) and not hasattr(plugin.get_min_job_age, "remembered"):
        plugin.get_min_job_age = remembering(plugin.get_min_job_age)


def remembering(ask: Callable[[], int | None]) -> Callable[[], int | None]:
    """A function that answers as `ask` does or, where that gives None, as it last did."""

    def answer() -> int | None:
        found = ask()
        answer.remembered = answer.remembered if found is None else found  # type: ignore[attr-defined]
        return answer.remembered  # type: ignore[attr-defined]

    answer.remembered = None  # type: ignore[attr-defined]
    return answer
