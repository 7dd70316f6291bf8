"""The tables about audits of benchmarks/README.md and docs/auditing.md: level, power and seconds of bounds."""

from __future__ import annotations

import pandas as pd

from benchmarks import audit_peers
from benchmarks.calibration import PROTOCOLS
from benchmarks.channels import BY_NAME
from benchmarks.markdown import markdown

GROUPS = {"fixed": "fixed, corrected, surrogate", "holdout": "holdout, median"}
"""Protocols that are shown together: those that choose the number of guesses beforehand, and by the same output."""
SIZE = 1000
"""The number of canaries at which docs/auditing.md shows what breaks a bound."""


def audit_sections(played: pd.DataFrame, peers: pd.DataFrame) -> dict[str, str]:
    """The generated parts of the README about audits by name."""
    return {"audit_calibration": alarms_by_channel(played), "audit_peers": beside_peers(peers)}


def auditing_sections(played: pd.DataFrame, peers: pd.DataFrame, speed: pd.DataFrame) -> dict[str, str]:
    """The generated parts of docs/auditing.md by name."""
    return {
        "calibration": f"{highest_alarms(played)}\n\n{broken(played)}",
        "power": f"{shares_beside_peers(peers)}\n\n{shares_by_size(played)}",
        "audit-speed": faster(speed),
    }


def grouped(played: pd.DataFrame) -> pd.DataFrame:
    """The rows of protocols that promise a level, with their group; `assumption` is the same within one."""
    kinds = played["protocol"].map({name: kind for name, (kind, _) in PROTOCOLS.items()})
    groups = {kind.strip(): group for group in GROUPS.values() for kind in group.split(",")}
    return played.assign(group=kinds.map(groups)).dropna(subset="group")


def highest_alarms(played: pd.DataFrame) -> str:
    """A row per auditor and group of protocols that claims a level: its highest rate of false alarms, by canaries."""
    rows = []
    claiming = grouped(played[played["holds"]])
    for (name, group), part in claiming.groupby(["auditor", "group"], sort=False):
        row = {"bound": f"`{name}`", "protocols": "any" if set(part["protocol"]) == {"fixed"} else group}
        row["assumption"] = f"`{part['assumption'].iloc[0]}`"
        for size, of_size in part.groupby("num_canaries"):
            worst = of_size.loc[of_size["rate"].idxmax()]
            row[f"m = {size}"] = f"{_percent(worst)}, `{worst['channel']}`"
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("protocols", key=lambda c: c == GROUPS["holdout"], kind="stable")
    first, at_first = played.iloc[0], claiming[~claiming["played_again"]]
    games = ", ".join(f"{g} at m = {m}" for m, g in at_first.groupby("num_canaries")["games"].max().items())
    what = (
        f"Highest share of games whose bound exceeds the true epsilon, nominal {first['significance']:.0%}, over the "
        f"channels that satisfy the assumption, and where. `python -m benchmarks.calibration`, {_where(played)}; "
        f"games: {games}, half as many under `holdout`, an eighth under `median`; ten times as many for "
        f"{int(claiming['played_again'].sum())} of {len(claiming)} rows that were over 5% by 1.5 standard errors."
    )
    return f"{what}\n\n{markdown(table)}"


def broken(played: pd.DataFrame) -> str:
    """A row per channel: the bounds that break on it because it does not satisfy their assumption."""
    failing = played[~played["holds"] & ~played["keeps_level"] & (played["num_canaries"] == SIZE)]
    valid = grouped(failing[failing["assumption"] != "credible"])
    rows = []
    for channel, part in valid.groupby("channel", sort=False):
        lacks = [a for a in ("family", "product") if not BY_NAME[channel].satisfies(a)]
        declared, split = (part[part["group"] == group] for group in GROUPS.values())
        only_split = split[~split["auditor"].isin(declared["auditor"])]
        cells = [_rates(declared), _rates(only_split, " under `holdout`")]
        rows.append((f"`{channel}`", f"not {', '.join(lacks)}", ", ".join(cell for cell in cells if cell)))
    paper = failing[(failing["protocol"] == "paper") & (failing["channel"] == "ignore")]
    paper = paper[paper["auditor"].isin(played.loc[played["holds"], "auditor"])]
    rows.append(("`ignore`", "protocol `paper`", _rates(paper)))
    credible = played[(played["assumption"] == "credible") & ~played["keeps_level"]].nlargest(1, "rate")
    for worst in credible.itertuples():
        where = f"`{worst.channel}`, m = {worst.num_canaries}"
        rows.append((where, "no level is claimed", f"`{worst.auditor}` {100 * worst.rate:.0f}"))
    table = pd.DataFrame(rows, columns=["channel", "what it lacks", "bounds too large, % of games"])
    what = (
        f"What breaks a bound, m = {SIZE}: channels and protocols outside the assumption, highest rate over\n`fixed`, "
        "`corrected` and `surrogate`, and under `holdout` of what these do not break (all: "
        "[benchmarks/README.md](../benchmarks/README.md))"
    )
    return f"{what}:\n\n{markdown(table)}"


def _rates(part: pd.DataFrame, where: str = "") -> str:
    """The highest rate of each auditor."""
    worst = part.groupby("auditor", sort=False)["rate"].max()
    return ", ".join(f"`{name}` {100 * rate:.0f}{where}" for name, rate in worst.items())


def alarms_by_channel(played: pd.DataFrame) -> str:
    """For each number of canaries a row per channel and group, a column per auditor: the highest rate."""
    parts, valid = [_where(played)], grouped(played)
    keys = ["channel", "group"]
    for size, part in valid.groupby("num_canaries"):
        worst = part.loc[part.groupby([*keys, "auditor"], sort=False)["rate"].idxmax()]
        marks = worst["holds"].map({True: "", False: " *"})
        cells = worst.assign(cell=(100 * worst["rate"]).map("{:.1f}".format) + marks)
        wide = cells.pivot(index=keys, columns="auditor", values="cell").fillna("")
        wide = wide.reindex(index=part[keys].drop_duplicates(), columns=part["auditor"].unique())
        parts.append(f"m = {size}, %:\n\n{markdown(wide.reset_index().rename(columns={'group': 'protocols'}))}")
    return "\n\n".join(parts)


def shares_by_size(played: pd.DataFrame, channel: str = "gaussian_1") -> str:
    """A row per auditor and protocol, a column per number of canaries: mean bound over true epsilon."""
    shown = played["protocol"].isin(("corrected", "surrogate")) | (played["auditor"] == "gaussian_auroc")
    part = played[(played["channel"] == channel) & shown]
    cells = part["mean_share"].map("{:.2f}".format)
    wide = part.assign(cell=cells).pivot(index=["auditor", "protocol"], columns="num_canaries", values="cell")
    wide = wide.reindex(pd.MultiIndex.from_frame(part[["auditor", "protocol"]].drop_duplicates()).sortlevel(0)[0])
    wide.columns = [f"m = {size}" for size in wide.columns]
    epsilon = part["true_epsilon"].iloc[0]
    what = f"Mean bound over true epsilon on the channel `{channel}` (epsilon {epsilon:.2f}) by number of canaries"
    return f"{what}:\n\n{markdown(wide.reset_index())}"


def shares_beside_peers(peers: pd.DataFrame) -> str:
    """A row per method but ours under "holdout", by assumption: highest rate of false alarms, shares, milliseconds."""
    shown = peers[(peers["package"] != audit_peers.OURS) | (peers["protocol"] != "holdout")]
    rows = []
    for key, part in _by_assumption(shown):
        worst = part.loc[part["rate"].idxmax()]
        row = _named(key) | {"false alarms": f"{_percent(worst)}{'' if part['keeps_level'].all() else ', too many'}"}
        for name, of_channel in part.set_index("channel").drop(index="ignore").iterrows():
            row[f"mu = {str(name).partition('_')[2]}"] = f"{of_channel['mean_share']:.2f}"
        rows.append(row | {"ms": f"{1e3 * part['seconds'].mean():.1f}"})
    epsilons = peers[peers["channel"] != "ignore"].groupby("channel", sort=False)["true_epsilon"].first()
    what = (
        f"Mean bound over true epsilon on Gaussian channels of {', '.join(f'{e:.2f}' for e in epsilons)} at delta "
        f"{peers['delta'].iloc[0]:g}, {peers['num_canaries'].iloc[0]} canaries, and the highest share of games whose "
        f"bound exceeds the true epsilon, over these and scores that ignore the coins. Compare within an assumption. "
        f"{_peers_played(peers)}"
    )
    return f"{what}\n\n{markdown(pd.DataFrame(rows))}"


def beside_peers(peers: pd.DataFrame) -> str:
    """A row per method, by assumption: false alarms, mean bound on each Gaussian channel, seconds."""
    rows = []
    for key, part in _by_assumption(peers):
        by_channel = part.set_index("channel")
        row = _named(key) | {"false alarms": _percent(by_channel.loc["ignore"])}
        row["keeps its level"] = "yes" if part["keeps_level"].all() else "no"
        for name, of_channel in by_channel.drop(index="ignore").iterrows():
            row[f"{name} ({of_channel['true_epsilon']:.2f})"] = f"{of_channel['mean_bound']:.2f}"
        rows.append(row | {"ms": f"{1e3 * part['seconds'].mean():.1f}"})
    what = (
        f"Mean bounds on {peers['num_canaries'].iloc[0]} canaries, in brackets the true epsilon at delta "
        f"{peers['delta'].iloc[0]:g}; false alarms on scores that ignore the coins. {_peers_played(peers)}"
    )
    return f"{what}\n\n{markdown(pd.DataFrame(rows))}"


def _by_assumption(peers: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """The rows of each method, those of one assumption together."""
    methods = list(peers.groupby(["assumption", *audit_peers.KEY[:3]], sort=False))
    order = list(peers["assumption"].unique())
    return sorted(methods, key=lambda method: order.index(method[0][0]))


def _named(key: tuple[str, ...]) -> dict[str, str]:
    """The first columns of a method."""
    assumption, package, method, protocol = key
    return {"assumption": f"`{assumption}`", "bound": f"{package} `{method}`, {protocol}"}


def _peers_played(peers: pd.DataFrame) -> str:
    """How the peers' table was made."""
    packages = peers.loc[peers["version"].notna(), ["package", "version"]].drop_duplicates()
    versions = ", ".join(f"{package} {version}" for package, version in packages.itertuples(index=False))
    games = f"{peers['games'].min()} to {peers['games'].max()} games"
    return f"`python -m benchmarks.audit_peers`, {games}, {versions}, {_where(peers)}."


def faster(speed: pd.DataFrame) -> str:
    """Milliseconds of bounds beside the peer's, and of whole audits."""
    counted, whole = speed[speed["ratio"].notna()], speed[speed["ratio"].isna()]
    bounds = pd.DataFrame(
        {
            "bound": counted["task"].map("`{}`".format),
            "m": counted["num_canaries"],
            "guesses": counted["num_guesses"].astype(int),
            "right": counted["num_correct"].astype(int),
            "ms": (1e3 * counted["seconds"]).map("{:.2f}".format),
            "jax-privacy, ms": (1e3 * counted["peer_seconds"]).map("{:.1f}".format),
            "times faster": counted["ratio"].map("{:.0f}".format),
            "difference": counted["difference"].map("{:.0e}".format),
        }
    )
    audits = pd.DataFrame(
        {
            "all auditors": whole["task"],
            "m": whole["num_canaries"],
            "ms": (1e3 * whole["seconds"]).map("{:.0f}".format),
        }
    )
    first = speed.iloc[0]
    what = (
        f"`python -m benchmarks.audit_speed`, {first['processor']}, one thread, caches empty, {first['versions']}, "
        f"least of {first['turns']} turns, {first['date']}."
    )
    return f"{what}\n\n{markdown(bounds)}\n\n{markdown(audits)}"


def _where(table: pd.DataFrame) -> str:
    """Hardware, seed and date."""
    first = table.iloc[0]
    return f"{first['processor']}, seed {first['seed']}, {table['date'].max()}"


def _percent(row: pd.Series) -> str:
    """A rate with its standard error."""
    return f"{100 * row['rate']:.1f} ± {100 * row['standard_error']:.1f}%"
