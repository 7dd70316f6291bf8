"""The ledger of epsilon: what accountants promise, what each observer recovers of it, and what each gap is due to.

Each row is a claim on epsilon of the same runs: upper bounds, a heuristic, and lower bounds by one auditor under one
protocol from equally many coins. Each has a gap to the row that it is compared with, and the gap an owner.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from metacanary import store, table_formats, tables

COLUMNS = (
    *("dataset", "training", "epsilon", "claim", "canary", "score", "auditor", "protocol", "assumption"),
    *("num_runs", "num_canaries", "epsilon_mean", "epsilon_low", "epsilon_high", "epsilon_pooled"),
    *("ceiling", "ceiling_pooled", "auroc_mean", "auroc_low", "auroc_high"),
    *("compared_with", "owner", "gap_mean", "gap_low", "gap_high", "gap_pooled"),
)
DIRAC = "dirac"  # in the place of a canary kind
RDP, PLD, HEURISTIC = "accounted, RDP", "accounted, PLD", "last iterate, heuristic"
ALL_ITERATES, LAST_ITERATE = "Dirac, all iterates", "Dirac, last iterate"
WHITE_BOX = {ALL_ITERATES: "dirac_all_iterates", LAST_ITERATE: "dirac_last_iterate"}  # the scores of `dirac`
ACCOUNTING, ESTIMATOR, HIDDEN, BLACK_BOX = "accounting", "estimator", "hidden iterates", "black box"
SCORE, CANARY = "score", "canary"
OWNERS = (ACCOUNTING, ESTIMATOR, HIDDEN, BLACK_BOX, CANARY, SCORE)

_CLAIMS = {RDP: ("epsilon_accounted_rdp", "proof"), PLD: ("epsilon_accounted", "proof")}
_CLAIMS |= {HEURISTIC: ("epsilon_heuristic", "linear losses")}
_KEYS = ["canary", "score"]
_WORDS = {"dataset", "training", "claim", "assumption", "gap to", "owner"}
_LEGEND = (
    "Accounted ε are upper bounds; last iterate, heuristic, is no bound. The others are lower bounds: mean over runs "
    "of each run's bound, ± half of its 95% t interval; pooled, from the coins of all runs at once. A gap is the ε of "
    "the row it is compared with minus the row's own, run by run with its interval, and pooled; it may be negative, by "
    "chance. Black-box rows are ordered by their mean: the first is the largest of several bounds and holds at no "
    "stated level, nor does its gap. The gap from Dirac canaries to it joins threat model, canary and score, which "
    "bounds alone cannot tell apart."
)


def collect(
    frame: pd.DataFrame,
    white_box: pd.DataFrame,
    *,
    trainings: Sequence[str],
    canaries: Mapping[str, Collection[str]],
    auditor: str,
    protocol: str,
) -> pd.DataFrame:
    """Puts all claims on epsilon of each cell one below the other, with what lies between them.

    Args:
      frame: summary/epsilon.csv.
      white_box: The audits of Dirac canaries in the same runs, from `summary.epsilon_table` with accountant "pld" and
        the scores of `WHITE_BOX`.
      trainings: In the order of the table.
      canaries: By training, the kinds of black-box canaries.
      auditor: One of `auditors.NAMES`.
      protocol: A valid one of `audits.PROTOCOLS`, not "paper".

    Returns:
      By dataset, training and target epsilon rows of the claims `RDP`, `PLD`, `HEURISTIC`, `ALL_ITERATES`,
      `LAST_ITERATE`, then "<kind>, <score>", the kinds in the order of their best score's mean, and the scores of a
      kind in the order of their means; columns `COLUMNS`, docs/output.md says what each means.

    Raises:
      ValueError: If rows are missing, if the runs, numbers of canaries or mechanisms of frame and white_box differ, if
        the game is not that of independent coins, or for the protocol "paper".

    Guarantees:
      - RDP's epsilon minus that of the first black-box row is the sum of the gaps from `PLD` over `ALL_ITERATES` and
        `LAST_ITERATE` to it, of means and pooled.
      - Gaps between lower bounds are means of differences within a run, whose coins and Poisson draws all rows share.
    """
    if protocol == tables.PAPER:
        raise ValueError(f"protocol: got {protocol!r}, expected one that gives bounds")
    chosen = [_last(table, auditor=auditor, protocol=protocol) for table in (frame, white_box)]
    found = []
    for dataset in white_box["dataset"].unique():
        for training in trainings:
            of_training = [t[(t["dataset"] == dataset) & (t["training"] == training)] for t in chosen]
            if of_training[1].empty:
                raise ValueError(
                    f"white_box lacks training {training!r} on {dataset}, expected audits of all trainings"
                )
            for epsilon in sorted(of_training[1]["epsilon"].unique(), reverse=True):
                black, white = (table[table["epsilon"] == epsilon] for table in of_training)
                cell = {"dataset": dataset, "training": training, "epsilon": epsilon}
                black = black[black["canary"].isin(canaries[training])]
                _check(cell, black, white, canaries[training])
                found.append(_ledger(black, white).assign(**cell, auditor=auditor, protocol=protocol))
    table = pd.concat(found, ignore_index=True)
    table.loc[table["claim"].isin(_CLAIMS), ["auditor", "protocol"]] = None
    return table[list(COLUMNS)]


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns the table into the text of its cells."""
    several = [name for name in ("dataset", "training") if table[name].nunique() > 1]
    cells: dict[str, Any] = {name: list(table[name]) for name in several}
    cells |= {"target\nε": [table_formats.words(value) for value in table["epsilon"]], "claim": list(table["claim"])}
    cells |= {"ε\nmean": table_formats.plus_minus(table, "epsilon", 2)}
    cells |= {"ε\npooled": table_formats.fixed(table["epsilon_pooled"], 2)}
    ceilings = (table_formats.fixed(table[name], 2) for name in ("ceiling", "ceiling_pooled"))
    cells |= {"ceiling\n(pooled)": [_with_second(*pair) for pair in zip(*ceilings, strict=True)]}
    cells |= {"AUROC\nmean": table_formats.plus_minus(table, "auroc", 3)}
    cells |= {"assumption": list(table["assumption"])}
    cells |= {"gap\nmean": table_formats.plus_minus(table, "gap", 2)}
    cells |= {"gap\npooled": table_formats.fixed(table["gap_pooled"], 2)}
    for name, header in (("compared_with", "gap to"), ("owner", "owner")):
        cells[header] = [table_formats.words(value) for value in table[name]]
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what all rows share, and how to read the numbers."""
    bounds = table[table["auditor"].notna()]
    auditor = bounds["auditor"].iloc[0]
    runs, canaries = (sorted(bounds[name].astype(int).unique()) for name in ("num_runs", "num_canaries"))
    counts = [f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (runs, canaries)]
    one = [f"{name} {table[name].iloc[0]}, " for name in ("dataset", "training") if table[name].nunique() == 1]
    audit = f"auditor {table_formats.AUDITORS.get(auditor, auditor)}, protocol {bounds['protocol'].iloc[0]}"
    shared = f"{''.join(one)}{counts[0]} runs of {counts[1]} canaries, {audit}"
    return f"{shared}. {_LEGEND} {table_formats.NO_VALUE}: no value."


def markdown(table: pd.DataFrame) -> str:
    """Writes the table as an aligned Markdown table under its note."""
    return table_formats.markdown_table(f"**Ledger of ε.** {note(table)}", printed(table), _WORDS)


def latex(table: pd.DataFrame) -> str:
    """Writes the table as `table_formats.latex_table` does; cells are set apart."""
    groups = table[tables.SETTING].to_numpy().tolist()
    return table_formats.latex_table(printed(table), _WORDS, caption=note(table), label="tab:ledger", groups=groups)


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the table to files as `table_formats.write` does, in these forms."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def _last(frame: pd.DataFrame, *, auditor: str, protocol: str) -> pd.DataFrame:
    """The audits of an auditor and protocol at the last step of each cell."""
    rows = tables.select(frame, auditor=auditor, protocol=protocol)
    rows = rows[rows["step"] == rows.groupby(tables.CELL)["step"].transform("max")]
    tables.one_per_run(rows, [*tables.CELL, "score"])
    return rows


def _check(cell: Mapping[str, Any], black: pd.DataFrame, white: pd.DataFrame, canaries: Collection[str]) -> None:
    """Checks that all rows of a cell speak of the same runs, coins and mechanism."""
    where = ", ".join(f"{name} {value}" for name, value in cell.items())
    missing = [kind for kind in canaries if kind not in set(black["canary"])]
    if missing or black.empty:
        raise ValueError(f"frame lacks canaries {missing} at {where}, expected audits of all")
    games = sorted({*black["game"], *white["game"]})
    if games != ["independent"]:
        raise ValueError(f"game: got {games} at {where}, expected independent, the only one of Dirac canaries")
    both = pd.concat([black, white])
    if (sets := both.groupby(_KEYS)["run"].agg(frozenset)).nunique() != 1:
        raise ValueError(f"run: got {sorted(map(sorted, set(sets)))} at {where}, expected the same runs in all rows")
    for name, column in (("num_canaries", both[both["run"] != tables.POOLED]["num_canaries"]), ("step", both["step"])):
        if column.nunique() != 1:
            raise ValueError(
                f"{name}: got {sorted(column.unique().tolist())} at {where}, expected the same in all rows"
            )
    accounted = both["epsilon_accounted_rdp"]
    if not np.allclose(accounted, accounted.iloc[0], rtol=1e-6):
        found = sorted(accounted.unique().tolist())
        raise ValueError(f"epsilon_accounted_rdp: got {found} at {where}, expected one mechanism in all rows")


def _ledger(black: pd.DataFrame, white: pd.DataFrame) -> pd.DataFrame:
    """The claims of one cell in order, with their gaps."""
    bounds = pd.concat([white.assign(canary=DIRAC), black])
    by_run = bounds.set_index([*_KEYS, "run"])["epsilon_lower"].sort_index()
    summary = _summary(bounds)
    described: dict[Any, dict[str, Any]] = {key: dict(row) for key, row in summary.iterrows()}
    rows: list[dict[str, Any]] = []
    values: dict[str, pd.Series] = {}
    runs = by_run.loc[DIRAC, WHITE_BOX[ALL_ITERATES]].index

    def add(claim: str, says: Mapping[str, Any], against: str | None, owner: str | None) -> None:
        """Adds a row and its gap."""
        rows.append({"claim": claim, **says, **_gap(values.get(against or ""), values[claim])})
        rows[-1] |= {"compared_with": against, "owner": owner}

    proofs = {RDP: (None, None), PLD: (RDP, ACCOUNTING), HEURISTIC: (PLD, HIDDEN)}
    for claim, (against, owner) in proofs.items():
        column, assumption = _CLAIMS[claim]
        value = float(white[column].iloc[0])
        values[claim] = pd.Series(value, runs)
        add(claim, {"assumption": assumption, "epsilon_mean": value, "epsilon_pooled": value}, against, owner)
    for claim, key, against, owner in _compared(summary):
        values[claim] = by_run.loc[key]
        add(claim, dict(zip(_KEYS, key, strict=True)) | described[key], against, owner)
    return pd.DataFrame(rows).reindex(columns=[name for name in COLUMNS if name not in tables.SETTING])


def _compared(summary: pd.DataFrame) -> Iterator[tuple[str, tuple[str, str], str, str]]:
    """Yields claim, canary kind and score, the claim that it is compared with, and the owner of the gap."""
    yield ALL_ITERATES, (DIRAC, WHITE_BOX[ALL_ITERATES]), PLD, ESTIMATOR
    yield LAST_ITERATE, (DIRAC, WHITE_BOX[LAST_ITERATE]), ALL_ITERATES, HIDDEN
    best: str | None = None
    for kind, scores in _order(summary):
        first = f"{kind}, {scores[0]}"
        yield first, (kind, scores[0]), best or LAST_ITERATE, CANARY if best else BLACK_BOX
        for score in scores[1:]:
            yield f"{kind}, {score}", (kind, score), first, SCORE
        best = best or first


def _order(summary: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Black-box kinds by what their best score recovers, each with its scores by what they recover."""
    black = summary.drop(index=DIRAC, level="canary").reset_index()
    rank = {kind: place for place, kind in enumerate(tables.canary_order(black["canary"]))}
    # Many bounds are 0 where epsilon is small; the AUROC still tells attacks apart.
    black = black.assign(_place=black["canary"].map(rank)).sort_values(
        ["epsilon_mean", "epsilon_pooled", "auroc_mean", "_place", "score"], ascending=[False] * 3 + [True] * 2
    )
    return [(str(kind), list(rows["score"])) for kind, rows in black.groupby("canary", sort=False)]


def _summary(bounds: pd.DataFrame) -> pd.DataFrame:
    """Summarises bounds over runs by canary kind and score."""
    single, pooled = (bounds[(bounds["run"] == tables.POOLED) == is_pooled] for is_pooled in (False, True))
    means = [
        tables.over_runs(single, _KEYS, column).add_prefix(f"{name}_")
        for name, column in (("epsilon", "epsilon_lower"), ("auroc", "auroc"))
    ]
    rest = single.groupby(_KEYS, sort=False).agg(
        num_runs=("run", "size"),
        num_canaries=("num_canaries", "first"),
        ceiling=("ceiling", "max"),
        assumption=("assumption", "first"),
    )
    of_all = pooled.set_index(_KEYS)[["epsilon_lower", "ceiling"]]
    return (
        pd.concat([rest, *means], axis=1)
        .join(of_all.set_axis(["epsilon_pooled", "ceiling_pooled"], axis=1))
        .sort_index()
    )


def _gap(above: pd.Series | None, own: pd.Series) -> dict[str, float]:
    """What a claim's epsilon is below another's, run by run and pooled; by run, of both."""
    if above is None:
        return {}
    difference = (above - own).rename("gap").rename_axis("run").reset_index().assign(all="")
    pooled = difference["run"] == tables.POOLED
    mean = tables.over_runs(difference[~pooled], ["all"], "gap").iloc[0]
    gap = {f"gap_{name}": float(mean[name]) for name in ("mean", "low", "high")}
    if above.nunique() == own.nunique() == 1:  # two constants have no spread that an interval could show
        gap |= {"gap_low": float("nan"), "gap_high": float("nan")}
    return gap | {"gap_pooled": float(difference.loc[pooled, "gap"].iloc[0])}


def _with_second(first: str, second: str) -> str:
    """Writes a number with a second one in brackets."""
    return first if second == table_formats.NO_VALUE else f"{first} ({second})"
