"""What the jobs of an audit cost, from their provenance: seconds, trainings, steps and the device of each.

It reads what is stored beside results; it needs neither JAX nor models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

COLUMNS = (
    *("stage", "dataset", "canary", "training", "epsilon", "platform", "device", "cpu"),
    *("seconds", "num_trainings", "num_steps"),
)
OPTIMIZATION, TRAINING = "optimize_canaries", "train_audit_models"
CELL = ("dataset", "canary", "training", "epsilon")


def job(
    stage: str, cell: Mapping[str, str], made: Mapping[str, Any], history: pd.DataFrame | None = None
) -> dict[str, Any]:
    """Says what one job cost.

    Args:
      stage: The name of its rule.
      cell: What it was about: of `CELL` what its rule has; the target epsilon as text.
      made: The provenance of its result.
      history: Of an optimisation, with a column seconds.

    Returns:
      A row with the columns `COLUMNS`. Seconds are the wall time of the job's last attempt, or the sum over the history
      if that is more: it holds the updates of earlier attempts, but neither the proxies of Gradient Max nor what an
      attempt lost of the metastep that it was stopped in. Trainings and steps are missing for jobs that train nothing.
    """
    device, seconds = made["device"], float(made["wall_seconds"])
    if history is not None:
        seconds = max(seconds, float(history["seconds"].sum()))
    where = {name: cell.get(name) for name in CELL}
    trainings, steps = _work(made["settings"])
    return {
        "stage": stage,
        **where,
        "platform": device["platform"],
        "device": device["kind"],
        "cpu": device["cpu"],
        "seconds": seconds,
        "num_trainings": trainings,
        "num_steps": steps,
    }


def table(jobs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Puts rows of `job` together, in the order given, with the columns `COLUMNS`."""
    return pd.DataFrame(jobs, columns=list(COLUMNS))


def optimizations(costs: pd.DataFrame) -> pd.DataFrame:
    """Sums what optimisations cost.

    Args:
      costs: From `table`.

    Returns:
      seconds, num_trainings and num_steps by dataset and canary kind; kinds that are not optimised have no row.
    """
    return _sums(costs[costs["stage"] == OPTIMIZATION], ["dataset", "canary"])


def audits(costs: pd.DataFrame) -> pd.DataFrame:
    """Sums what the audit of each cell cost, its canaries not counted: training, scoring and bounds, of all its runs.

    Returns:
      seconds, num_trainings and num_steps by `CELL`, the target epsilon as a float.
    """
    rows = costs[costs["stage"] != OPTIMIZATION]
    return _sums(rows.assign(epsilon=rows["epsilon"].astype(float)), list(CELL))


def devices(costs: pd.DataFrame) -> list[str]:
    """Names the devices, each once: a GPU by its kind, a CPU by its model."""
    names = [cpu if platform == "cpu" else kind for platform, kind, cpu in costs[["platform", "device", "cpu"]].values]
    return list(dict.fromkeys(names))


def _sums(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Adds up by keys."""
    return rows.groupby(keys, sort=False)[["seconds", "num_trainings", "num_steps"]].sum()


def _work(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Trainings of a job and the steps of all of them, each counted once however often replay repeats it."""
    kind = settings.get("kind")
    if kind is None and "runs" in settings and "options" in settings:
        return len(settings["runs"]), len(settings["runs"]) * settings["options"]["num_steps"]
    if kind is None or "training" not in kind:
        return None, None
    per_metastep = kind.get("num_splits", 1) * (2 if kind.get("complement") else 1)
    trainings = kind["num_proxies"] if "num_proxies" in kind else kind["num_metasteps"] * per_metastep
    # What comes after the last step that the objective is taken at is not trained.
    last = (kind.get("objective_steps") or [kind["training"]["num_steps"]])[-1]
    return trainings, trainings * last
