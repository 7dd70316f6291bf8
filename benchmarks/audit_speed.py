"""Seconds of a bound beside jax-privacy's of the same counts, and of a whole audit.

    python -m benchmarks.audit_speed                        # to results/audit_speed.csv

All caches are empty at each call. Ours and the peer's are timed in turns, so that load on the machine meets both alike;
the least of all turns counts. One thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jax_privacy import auditing
from tqdm import tqdm

from benchmarks.channels import BY_NAME, DELTA
from benchmarks.measure import processor
from metacanary import accounting, audits, bounds, bounds_fdp, bounds_product, bounds_rates, store

RESULTS = Path(__file__).resolve().parent / "results" / "audit_speed.csv"
SIGNIFICANCE, SEED = 0.05, 0
BOUNDS = {
    "fdp_gaussian": (audits.fdp_gaussian, "epsilon_one_run_fdp"),
    "steinke": (audits.steinke, "epsilon_one_run"),
}
COUNTS = [
    *(("fdp_gaussian", 1000, r, v) for r, v in ((1000, 600), (500, 350), (500, 480), (250, 200), (100, 95), (16, 16))),
    *(("steinke", 1000, r, v) for r, v in ((500, 350), (100, 95))),
    *(("steinke", 100_000, r, v) for r, v in ((100_000, 60_000), (50_000, 40_000), (1000, 950))),
]
"""Auditor, canaries (m), guesses (r), right ones (v)."""
COLUMNS = [
    *("task", "num_canaries", "num_guesses", "num_correct"),
    *("epsilon_lower", "seconds", "peer", "peer_epsilon_lower", "peer_seconds", "ratio", "difference"),
    *("turns", "threads", "seed", "processor", "versions", "date"),
]
"""Of the CSV. ratio: the peer's seconds over ours. difference: of the two bounds, absolute."""


def forget() -> None:
    """Empty all caches of ours and of the peer."""
    for module in (accounting, bounds, bounds_fdp, bounds_product, bounds_rates, auditing):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def fastest(calls: Sequence[Callable[[], Any]], turns: int) -> tuple[list[float], list[Any]]:
    """The least seconds of each call over turns of all, and what each returned."""
    least = [float("inf")] * len(calls)
    results: list[Any] = [None] * len(calls)
    for _ in range(turns):
        for i, call in enumerate(calls):
            forget()
            began = time.perf_counter()
            results[i] = call()
            least[i] = min(least[i], time.perf_counter() - began)
    return least, results


def of_counts(name: str, m: int, r: int, v: int, turns: int) -> dict[str, Any]:
    """A row for one bound. The peer takes scores: v members and r - v others are above the threshold."""
    ours, theirs = BOUNDS[name]
    members, others = np.zeros(max(v, m // 2)), np.zeros(m - max(v, m // 2))
    members[:v], others[: r - v] = 1.0, 1.0
    peer = getattr(auditing.CanaryScoreAuditor(members, others), theirs)
    (seconds, peer_seconds), (bound, peer_bound) = fastest(
        [
            lambda: ours(m, r, v, delta=DELTA, significance=SIGNIFICANCE),
            lambda: peer(SIGNIFICANCE, DELTA, threshold_strategy=auditing.Explicit(0.5)),
        ],
        turns,
    )
    return {
        "task": name,
        "num_canaries": m,
        "num_guesses": r,
        "num_correct": v,
        "epsilon_lower": bound,
        "seconds": seconds,
        "peer": f"jax-privacy {theirs}",
        "peer_epsilon_lower": peer_bound,
        "peer_seconds": peer_seconds,
        "ratio": peer_seconds / seconds,
        "difference": abs(peer_bound - bound),
    }


def of_audit(protocol: str, size: int, turns: int) -> dict[str, Any]:
    """A row for an audit of one run by all auditors, without a peer."""
    rng, channel = np.random.default_rng(SEED), BY_NAME["gaussian_1"]
    scores, included = channel.draw(rng, 1, size)
    surrogates = channel.draw(rng, 4, size) if protocol == "surrogate" else None

    def call() -> pd.DataFrame:
        return audits.audit(scores[0], included[0], delta=DELTA, protocol=protocol, surrogates=surrogates)

    (seconds,), _ = fastest([call], turns)
    return {"task": f"audit, {protocol}", "num_canaries": size, "seconds": seconds}


def measure(turns: int, size: int = 1000) -> pd.DataFrame:
    """All rows."""
    tasks: list[Callable[[], dict[str, Any]]] = []
    tasks += [partial(of_counts, *counts, turns) for counts in COUNTS]
    tasks += [partial(of_audit, protocol, size, turns) for protocol in audits.PROTOCOLS]
    table = pd.DataFrame([task() for task in tqdm(tasks, unit="row")], columns=COLUMNS)
    packages = ("jax-privacy", "scipy", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    counts = ["num_guesses", "num_correct"]
    table[counts] = table[counts].astype("Int64")
    return table.assign(turns=turns, threads=1, seed=SEED, processor=processor(), versions=versions, date=date.today())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    store.write_text(args.output, measure(args.turns).to_csv(index=False))


if __name__ == "__main__":
    main()
