"""The tables about a step of DP-SGD of benchmarks/README.md."""

from __future__ import annotations

import pandas as pd

from benchmarks.dpsgd import CASE, NOT_PRIVATE, PEERS, SAME_LAYERS
from benchmarks.markdown import markdown

PAPER_BATCH, PAPER_COPIES, PAPER_STEPS = 4096, 16, (2500, 850)
"""Of the paper's two private trainings; which of them is which is not known."""


def steps(measured: pd.DataFrame) -> str:
    """For each case what it was measured on, a row for each contender, and how ours compares; then projected hours."""
    parts = []
    for (setting, device, batch, copies), part in measured.groupby(CASE, sort=False):
        images = f"{copies} copies of each" if copies > 1 else "without augmentation"
        parts.append(f"### {setting} on {device}: {batch} examples, {images}")
        parts.append(f"{described(part)}\n\n{markdown(table(part))}")
        if sentence := comparison(part):
            parts.append(sentence)
    if hours := projected(measured):
        parts.append(hours)
    return "\n\n".join(parts)


def described(part: pd.DataFrame) -> str:
    """What the numbers of a case were measured on."""
    done = part[part["status"] == "ok"]
    versions = sorted({version for text in done["versions"] for version in text.split(", ")})
    first = done.iloc[0]
    turns = f"median and range of {first['rounds']:.0f} rounds"
    return (
        f"{first['processor']}, one thread, {turns}, {', '.join(versions)}, seed {first['seed']:.0f}, {first['date']}."
    )


def table(part: pd.DataFrame) -> pd.DataFrame:
    """A row for each contender; for one that was stopped, the reason."""
    rows = []
    for row in part.to_dict("records"):
        if row["status"] != "ok":
            rows.append({"step": f"`{row['contender']}`", "examples / s": row["status"]})
            continue
        low, high = (1e3 * row[name] for name in ("step_min", "step_max"))
        error = row["relative_error"]
        rows.append(
            {
                "step": f"`{row['contender']}`",
                "examples / s": f"{row['examples_per_second']:,.0f}",
                "ms": f"{1e3 * row['step_seconds']:.4g}",
                "range": f"{low:.4g} to {high:.4g}",
                f"of `{NOT_PRIVATE}`": "" if pd.isna(row["over_sgd"]) else f"{row['over_sgd']:.2f}",
                "peak MiB": f"{row['memory_mib']:.0f}",
                "microbatch": f"{row['microbatch']:.0f}",
                "relative error": "" if pd.isna(error) else f"{error:.0e}",
            }
        )
    return pd.DataFrame(rows).fillna("")


def comparison(part: pd.DataFrame) -> str:
    """Ours beside the fastest peer and beside no privacy, in words; empty if one of the two was not measured."""
    done = part[part["status"] == "ok"].set_index("contender")
    peers = done[done.index.isin(PEERS)]
    if peers.empty or not {NOT_PRIVATE, "metacanary_flat", "metacanary_per_layer"} <= set(done.index):
        return ""
    best = peers["step_seconds"].idxmin()
    faster = done.loc[best, "step_seconds"] / done.loc["metacanary_flat", "step_seconds"]
    memory = done.loc[best, "memory_mib"] / done.loc["metacanary_flat", "memory_mib"]
    over = done.loc["metacanary_per_layer", "over_sgd"]
    sentence = (
        f"`metacanary_flat` takes {faster:.2f} times as many examples per second as `{best}`, the fastest peer, which "
        f"needs {memory:.1f} times its memory; per-layer clipping costs {over:.2f} times a step without privacy."
    )
    if SAME_LAYERS in done.index:
        same = done.loc[SAME_LAYERS, "step_seconds"] / done.loc["metacanary_flat", "step_seconds"]
        sentence += f" Of that, {same:.2f} times is left when `{SAME_LAYERS}` is given metacanary's convolutions."
    return sentence


def projected(measured: pd.DataFrame) -> str:
    """Hours of the paper's private trainings by the measured steps of their batch; empty if none was measured."""
    is_papers = (measured["batch"] == PAPER_BATCH) & (measured["copies"] == PAPER_COPIES)
    part = measured[is_papers & (measured["setting"] == "wrn16_4") & (measured["status"] == "ok")]
    if part.empty:
        return ""
    hours = pd.DataFrame({"step": part["contender"].map("`{}`".format)})
    for number in PAPER_STEPS:
        hours[f"{number:,} steps, h"] = (number * part["step_seconds"] / 3600).map("{:.2f}".format)
    return f"Projected hours of one of the paper's private trainings:\n\n{markdown(hours)}"
