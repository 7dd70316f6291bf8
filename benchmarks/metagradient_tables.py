"""Tables and statements of the benchmark of metagradients, for benchmarks/README.md and docs/metagradients.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import metagradient
from benchmarks.markdown import markdown

NAMED = {
    "metacanary_all": "all states held",
    "metacanary_plan": "as `plan` chooses for a quarter more than a step takes",
    "metacanary_sqrt": "about 2 sqrt(T)",
    "metacanary_tree8": "branching 8",
    "metacanary_tree2": "branching 2",
    "jax_scan_checkpoint": "`jax.grad` through `lax.scan`, `jax.checkpoint` on the step",
    "jax_scan_nested": "the same, a scan of scans",
    "jax_scan": "`jax.grad` through `lax.scan`",
    "equinox_sqrt": "Equinox's checkpointed scan",
    "bergson_sqrt": "bergson (PyTorch)",
}
"""What the guide's table shows."""
SCHEDULES = (metagradient.REFERENCE, *metagradient.OURS)
HALF_OURS = ("jax_scan_nested_mixed",)
"""Peers' schedules with metacanary's step: in the tables, but not among the others that ours are compared with."""


def by_num_steps(sweep: pd.DataFrame, column: str, digits: int) -> pd.DataFrame:
    """A row for each contender and a column for each T; why there is no number where there is none."""
    formatted = sweep[column].map(lambda value: f"{value:.{digits}f}")
    cells = formatted.where(sweep["status"] == "ok", sweep["status"])
    wide = sweep.assign(cell=cells).pivot(index="contender", columns="num_steps", values="cell")
    wide = wide.reindex(sweep["contender"].unique()).fillna("not run")
    wide.columns = [f"T = {steps}" for steps in wide.columns]
    return wide.reset_index()


def agreement(sweep: pd.DataFrame) -> pd.DataFrame:
    """The largest relative error of each contender over all T."""
    done = sweep[sweep["status"] == "ok"]
    worst = done.groupby("contender", sort=False)["relative_error"].max().map("{:.1e}".format)
    return worst.rename("largest relative error").reset_index()


def described(sweep: pd.DataFrame) -> str:
    """What the numbers were measured on."""
    first, versions = sweep.iloc[0], sorted({v for text in sweep["versions"].dropna() for v in text.split(", ")})
    return f"{first['processor']}, one thread, {', '.join(versions)}, seed {first['seed']:.0f}, {sweep['date'].max()}."


def on_cpu(sweep: pd.DataFrame) -> pd.DataFrame:
    """The demo's network on a CPU, which the statements below are about."""
    return sweep[(sweep["setting"] == "digits") & (sweep["device"] == "cpu")]


def targets(sweep: pd.DataFrame) -> str:
    """Which schedules cost at most what was aimed at."""
    done = on_cpu(sweep[sweep["status"] == "ok"]).sort_values("num_steps")
    kept, exceeded = [], []
    for limit, schedules in metagradient.TARGETS.items():
        for name in schedules:
            ratio = done[done["contender"] == name].set_index("num_steps")["ratio"]
            above = ratio[ratio > limit]
            if above.empty:
                kept.append(f"`{name}` (at most {ratio.max():.2f})")
            else:
                exceeded.append(f"`{name}` at T = {listed(above.index)} (up to {above.max():.2f})")
    of_sqrt, of_trees = (f"{limit:g}" for limit in metagradient.TARGETS)
    return (
        f"Grey lines: at most {of_sqrt} plain trainings were aimed at with about 2 sqrt(T) states, at most {of_trees} "
        f"with k log_k T. Kept at every T by {', '.join(kept)}; exceeded by {'; '.join(exceeded) or 'none'}."
    )


def against_others(sweep: pd.DataFrame) -> pd.DataFrame:
    """For each of our schedules and each T, the fastest other contender within `ALLOWANCE` times its memory.

    Returns:
      contender (ours), num_steps, other, and ratio (our seconds over the other's).
    """
    rows = []
    for steps, ours, others in _by_num_steps_and_side(sweep):
        for _, own in ours.iterrows():
            near = others[others["memory_mib"] <= metagradient.ALLOWANCE * own["memory_mib"]]
            rows.append(_compared(own["contender"], steps, own, near))
    return pd.DataFrame(rows).sort_values("contender", key=lambda names: names.map(SCHEDULES.index), kind="stable")


def within_memory(sweep: pd.DataFrame) -> pd.DataFrame:
    """For each other contender and each T, the fastest of our schedules that needs no more memory, but for `SLACK`.

    Returns:
      contender (the other), num_steps, other (ours, empty if all need more), and ratio (the other's seconds over ours).
    """
    rows = []
    for steps, ours, others in _by_num_steps_and_side(sweep):
        for _, other in others.iterrows():
            near = ours[ours["memory_mib"] <= metagradient.SLACK * other["memory_mib"]]
            rows.append(_compared(other["contender"], steps, other, near))
    order = [*sweep["contender"].unique()]
    return pd.DataFrame(rows).sort_values("contender", key=lambda names: names.map(order.index), kind="stable")


def _by_num_steps_and_side(sweep: pd.DataFrame) -> Iterable[tuple[int, pd.DataFrame, pd.DataFrame]]:
    """What was measured at each T of ours and of others; `HALF_OURS` are neither."""
    done = on_cpu(sweep[sweep["status"] == "ok"])
    for steps, part in done.groupby("num_steps"):
        is_ours = part["contender"].isin(SCHEDULES)
        yield steps, part[is_ours], part[~is_ours & ~part["contender"].isin(HALF_OURS)]


def _compared(name: str, steps: int, row: pd.Series, near: pd.DataFrame) -> dict[str, Any]:
    """A contender's seconds over those of the fastest of those near it."""
    if near.empty:
        return {"contender": name, "num_steps": steps, "other": "", "ratio": np.nan}
    fastest = near.loc[near["metagradient_seconds"].idxmin()]
    ratio = row["metagradient_seconds"] / fastest["metagradient_seconds"]
    return {"contender": name, "num_steps": steps, "other": fastest["contender"], "ratio": ratio}


def where_fastest(sweep: pd.DataFrame) -> str:
    """At which T ours is the fastest within `ALLOWANCE` times its memory, and whom it beats within theirs."""
    ours, others = against_others(sweep), within_memory(sweep)

    def by_contender(compared: pd.DataFrame, chosen: pd.Series) -> str:
        steps = compared[chosen].groupby("contender", sort=False)["num_steps"].apply(listed)
        return "; ".join(f"`{name}` at T = {numbers}" for name, numbers in steps.items()) or "none"

    mixed = ", ".join(f"`{name}`" for name in HALF_OURS)
    slower = ~(others["ratio"] > 1)
    beaten = [f"`{name}`" for name in others["contender"].unique() if name not in {*others.loc[slower, "contender"]}]
    return (
        f"Aimed at: ours the fastest of all contenders that need at most {metagradient.ALLOWANCE:g} times its memory, "
        f"other than {mixed}, which runs metacanary's step. That holds of {by_contender(ours, ours['ratio'] < 1)}, and "
        f"of no other schedule at any T. The other way round: given the memory that another contender needs, one of "
        f"our schedules is faster than {', '.join(beaten) or 'none'} at every T, and is not faster than "
        f"{by_contender(others, slower)}. {spread(sweep)}"
    )


def spread(sweep: pd.DataFrame) -> str:
    """How far calls of the same contender lie apart."""
    several = on_cpu(sweep[sweep["repeats"] > 1])
    part = (several["metagradient_max"] - several["metagradient_min"]) / several["metagradient_seconds"]
    return (
        f"Calls of one contender at one T lie {part.median():.0%} apart (median; at most {part.max():.0%}), so that "
        "ratios near 1 decide nothing."
    )


def fastest(sweep: pd.DataFrame) -> str:
    """The statement; our seconds over the fastest other's for each schedule and T, and others' over our fastest."""
    allowance, slack = f"{metagradient.ALLOWANCE:g}", f"{metagradient.SLACK:g}"
    parts = [
        where_fastest(sweep),
        f"Our seconds over those of the fastest other contender within {allowance} times our memory; below 1 ours is "
        "the fastest:",
        _wide(against_others(sweep)),
        f"Another's seconds over those of the fastest of our schedules within {slack} times its memory; above 1 ours "
        "is faster, and a dash stands where all of ours need more:",
        _wide(within_memory(sweep)),
    ]
    return "\n\n".join(parts)


def _wide(compared: pd.DataFrame) -> str:
    """A row for each contender and a column for each T, each ratio beside what was compared with."""
    pairs = zip(compared["ratio"], compared["other"], strict=True)
    cells = [f"{ratio:.2f} `{other}`" if other else "—" for ratio, other in pairs]
    wide = compared.assign(cell=cells).pivot(index="contender", columns="num_steps", values="cell")
    wide = wide.reindex(compared["contender"].unique()).fillna("not run")
    wide.columns = [f"T = {steps}" for steps in wide.columns]
    return markdown(wide.reset_index())


def with_flax(sweep: pd.DataFrame) -> str:
    """How much longer the fastest peer takes than ours where convolutions are Flax's own, at the largest T measured."""
    done = sweep[(sweep["setting"] == "digits_lax") & (sweep["device"] == "cpu") & (sweep["status"] == "ok")]
    last = done[done["num_steps"] == done["num_steps"].max()].set_index("contender")["metagradient_seconds"]
    is_ours = last.index.isin(SCHEDULES)
    peer = last[~is_ours].idxmin()
    ratios = ", ".join(
        f"{last[peer] / seconds:.1f} times as long as `{name}`" for name, seconds in last[is_ours].items()
    )
    return (
        f"With convolutions as Flax has them (`digits_lax`, T = {done['num_steps'].max()}) `{peer}`, the fastest of "
        f"{', '.join(f'`{name}`' for name in last[~is_ours].index)}, takes {ratios}."
    )


def listed(numbers: Iterable[int]) -> str:
    """Numbers with commas."""
    return ", ".join(map(str, numbers))


def microbatches(projected: pd.DataFrame) -> str:
    """What the paper's step and its pull-back need in memory, whole and in microbatches."""
    first = projected.iloc[0]
    sizes = projected.groupby("microbatch")["working_gib"].first()
    return (
        f"For ResNet-9 of width 2.5 and {sizes.index.max():,} images, XLA's account of what a training step or its "
        f"pull-back needs beside its arguments is {sizes.iloc[-1]:.1f} GiB whole and {sizes.iloc[0]:.1f} GiB in "
        f"microbatches of {sizes.index.min()} (compiled for {first['compiled_for']}, {first['versions']})."
    )


def modes(measured: pd.DataFrame) -> str:
    """The pull-backs of each network and batch, a column for each form and mode."""
    measured = measured.assign(
        cell=[f"{a:.1f} / {b:.0f}" for a, b in measured[["pull_back_ms", "temporaries_mib"]].to_numpy()]
    )
    keys = ["network", "batch", "microbatch"]
    wide = measured.pivot(index=keys, columns=["convolution", "mode"], values="cell")
    wide = wide.reindex(pd.MultiIndex.from_frame(measured[keys].drop_duplicates()))
    wide.columns = [", ".join(column) for column in wide.columns]
    first = measured.iloc[0]
    described = (
        f"{first['processor']}, one thread, jax {first['jax']}, least of {first['turns']} turns, {first['date']}."
    )
    return f"{described}\n\n{markdown(wide.reset_index())}"


def sections(sweep: pd.DataFrame, projected: pd.DataFrame, measured: pd.DataFrame) -> dict[str, str]:
    """The generated parts of the README by name."""
    parts = []
    for (setting, device), part in sweep.groupby(["setting", "device"], sort=False):
        parts += [f"### {setting} on {device}\n\n{described(part)}"]
        for title, column, digits in (
            ("Seconds per metagradient", "metagradient_seconds", 2),
            ("Seconds per metagradient / seconds per plain training in the same framework", "ratio", 2),
            ("Peak memory, MiB", "memory_mib", 0),
        ):
            parts.append(f"{title}:\n\n{markdown(by_num_steps(part, column, digits))}")
        parts.append(f"Against `{metagradient.REFERENCE}`:\n\n{markdown(agreement(part))}")
    chosen = projected[["basis", "branching", "microbatch", "states_held", "hours", "total_gib"]].copy()
    chosen[["hours", "total_gib"]] = chosen[["hours", "total_gib"]].map("{:.1f}".format)
    return {
        "metagradient": "\n\n".join(parts),
        "targets": targets(sweep),
        "fastest": fastest(sweep),
        "flax": with_flax(sweep),
        "paper_cost": markdown(chosen),
        "step_vjp": modes(measured),
    }


def guide_sections(sweep: pd.DataFrame, projected: pd.DataFrame) -> dict[str, str]:
    """The generated parts of the guide by name."""
    return {
        "cost": cost(sweep),
        "targets": targets(sweep),
        "fastest": where_fastest(sweep),
        "flax": with_flax(sweep),
        "microbatches": microbatches(projected),
    }


def cost(sweep: pd.DataFrame) -> str:
    """The guide's table: the contenders of NAMED at the largest T that all of them met, on a CPU."""
    part = on_cpu(sweep)
    part = part[part["contender"].isin(NAMED)]
    met = part.groupby("num_steps")["contender"].nunique()
    met_all = met[met == len(NAMED)].index
    if met_all.empty:
        raise ValueError(f"sweep: got no T at which all of {', '.join(NAMED)} were run, expected one")
    steps = met_all.max()
    last = part[part["num_steps"] == steps].set_index("contender").reindex(NAMED)

    def cell(column: str, digits: int) -> list[str]:
        pairs = zip(last[column], last["status"], strict=True)
        return [f"{value:.{digits}f}" if status == "ok" else f"too much {status}" for value, status in pairs]

    table = pd.DataFrame(
        {
            "way": [*NAMED.values()],
            "states held": last["states_held"].map("{:.0f}".format).replace("nan", "—").to_list(),
            "seconds": cell("metagradient_seconds", 1),
            "plain trainings": cell("ratio", 2),
            "MiB": cell("memory_mib", 0),
        }
    )
    what = f"One metagradient by the pixels of 100 canaries through T = {steps} steps of the demo's network."
    return f"{what} {described(part)}\n\n{markdown(table)}"
