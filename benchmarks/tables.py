"""Writes the tables of benchmarks/README.md and of three guides in docs from the CSV files in benchmarks/results.

python -m benchmarks.tables
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from benchmarks import (
    audit_peers,
    audit_speed,
    calibration,
    data_loading,
    dirac_bounds,
    dpsgd,
    dpsgd_tables,
    ghost_norms,
    metagradient,
    paper_cost,
    runs_together,
    step_vjp,
)
from benchmarks.audit_tables import audit_sections, auditing_sections
from benchmarks.markdown import filled, markdown
from metacanary import store

README = Path(__file__).resolve().parent / "README.md"
GUIDE = README.parent.parent / "docs" / "metagradients.md"
AUDITING = README.parent.parent / "docs" / "auditing.md"
LEDGER = README.parent.parent / "docs" / "ledger.md"
NAMED = {
    "metacanary_all": "all states held",
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
      contender (ours), num_steps, other, ratio (our seconds over the other's), and faster_in_no_more: the others that
      are faster than ours in no more memory.
    """
    done = on_cpu(sweep[sweep["status"] == "ok"])
    rows = []
    for steps, part in done.groupby("num_steps"):
        is_ours = part["contender"].isin(SCHEDULES)
        others = part[~is_ours]
        for _, ours in part[is_ours].iterrows():
            memory, seconds = ours["memory_mib"], ours["metagradient_seconds"]
            near = others[others["memory_mib"] <= metagradient.ALLOWANCE * memory]
            fastest = near.loc[near["metagradient_seconds"].idxmin()]
            beats = (others["memory_mib"] <= memory) & (others["metagradient_seconds"] < seconds)
            rows.append(
                {
                    "contender": ours["contender"],
                    "num_steps": steps,
                    "other": fastest["contender"],
                    "ratio": seconds / fastest["metagradient_seconds"],
                    "faster_in_no_more": [*others.loc[beats, "contender"]],
                }
            )
    return pd.DataFrame(rows).sort_values("contender", key=lambda names: names.map(SCHEDULES.index), kind="stable")


def where_fastest(sweep: pd.DataFrame) -> str:
    """At which T ours is the fastest within `ALLOWANCE` times its memory, and at which it is beaten in no more."""
    compared = against_others(sweep)

    def by_schedule(chosen: pd.Series) -> str:
        steps = compared[chosen].groupby("contender", sort=False)["num_steps"].apply(listed)
        return "; ".join(f"`{name}` at T = {numbers}" for name, numbers in steps.items())

    beaten = compared["faster_in_no_more"].map(len) > 0
    winners = sorted({other for others in compared["faster_in_no_more"] for other in others})
    return (
        f"Aimed at: ours the fastest of all contenders that need at most {metagradient.ALLOWANCE:g} times its memory. "
        f"That holds of {by_schedule(compared['ratio'] < 1) or 'none'}, and of no other schedule at any T. In no more "
        f"memory than ours, one of {', '.join(f'`{name}`' for name in winners) or 'none'} is faster than "
        f"{by_schedule(beaten) or 'none'}. {spread(sweep)}"
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
    """The statement, and our seconds over the fastest other's for each schedule and T."""
    compared = against_others(sweep)
    stars = compared["faster_in_no_more"].map(lambda names: " *" if names else "")
    cells = compared["ratio"].map("{:.2f} ".format) + compared["other"].map("`{}`".format) + stars
    wide = compared.assign(cell=cells).pivot(index="contender", columns="num_steps", values="cell")
    wide = wide.reindex(compared["contender"].unique()).fillna("not run")
    wide.columns = [f"T = {steps}" for steps in wide.columns]
    what = (
        f"Our seconds over those of the fastest other contender within {metagradient.ALLOWANCE:g} times our memory; "
        "below 1 ours is the fastest. `*`: some contender is faster in no more memory than ours."
    )
    return f"{where_fastest(sweep)}\n\n{what}\n\n{markdown(wide.reset_index())}"


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
        "paper_cost": markdown(chosen),
        "step_vjp": modes(measured),
    }


def guide_sections(sweep: pd.DataFrame, projected: pd.DataFrame) -> dict[str, str]:
    """The generated parts of the guide by name."""
    return {
        "cost": cost(sweep),
        "targets": targets(sweep),
        "fastest": where_fastest(sweep),
        "microbatches": microbatches(projected),
    }


def cost(sweep: pd.DataFrame) -> str:
    """The guide's table: the contenders of NAMED at the largest T that all of them met, on a CPU."""
    part = on_cpu(sweep)
    part = part[part["contender"].isin(NAMED)]
    met = part.groupby("num_steps")["contender"].nunique()
    steps = met[met == len(NAMED)].index.max()
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


def loading(measured: pd.DataFrame) -> str:
    """Seconds and memory of each way to load a data set, beside what is promised."""
    first = measured.iloc[0]
    described = f"{first['name']}, {first['processor']}, {first['versions']}, {first['date']}."
    named = {"task": "task", "num_images": "images", "seconds": "seconds", "peak_rss_mib": "peak MiB"}
    table = measured[list(named)].rename(columns=named)
    table["seconds"] = table["seconds"].map("{:.3f}".format)
    table["peak MiB"] = table["peak MiB"].map("{:.0f}".format)
    for column, unit in (("promised_seconds", "promised seconds"), ("promised_mib", "promised MiB")):
        table[unit] = measured[column].map("{:g}".format).where(measured[column].notna(), "")
    return f"{described}\n\n{markdown(table)}"


def main() -> None:
    """Fill in the README and the guides."""
    results = [pd.read_csv(module.RESULTS) for module in (metagradient, paper_cost, step_vjp)]
    audits = [pd.read_csv(module.RESULTS) for module in (calibration, audit_peers, audit_speed)]
    others = {"data_loading": loading(pd.read_csv(data_loading.RESULTS))}
    others |= {"dpsgd": dpsgd_tables.steps(pd.read_csv(dpsgd.RESULTS))}
    others |= {"runs_together": runs_together.table(pd.read_csv(runs_together.RESULTS))}
    others |= {"ghost_norms": ghost_norms.table(pd.read_csv(ghost_norms.RESULTS))}
    for path, generated in (
        (README, sections(*results) | audit_sections(*audits[:2]) | others),
        (GUIDE, guide_sections(*results[:2])),
        (AUDITING, auditing_sections(*audits)),
        (LEDGER, {"dirac_bounds": dirac_bounds.table(pd.read_csv(dirac_bounds.RESULTS))}),
    ):
        store.write_text(path, filled(path.read_text(encoding="utf-8"), generated))


if __name__ == "__main__":
    main()
