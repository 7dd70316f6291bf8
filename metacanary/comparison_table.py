"""Tables of comparisons: canary kinds by where they start, how many they are, whose model they were optimised on, cost.

Each joins the bounds of `tables.summarise` with the settings of the kinds; it needs neither JAX nor models.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from metacanary import comparison_cost, comparisons, store, table_formats, tables

COST = ("optimization_seconds", "num_trainings", "num_steps", "audit_seconds", "device")
GAIN = ("epsilon_gain", "epsilon_gain_low", "epsilon_gain_high", "seconds_per_epsilon")
COLUMNS = (
    *("by", "dataset", "training", "epsilon", "canary", "line", "value"),
    *("metamodel", "audited_model", "own_model", "metarecipe", "audited_recipe", "own_recipe"),
    *("num_runs", "epsilon_mean", "epsilon_low", "epsilon_high", "epsilon_median", "epsilon_pooled"),
    *("ceiling", "ceiling_pooled", "epsilon_accounted", "auroc_mean", "auroc_low", "auroc_high", "test_accuracy"),
    *("step", "num_canaries", "game", "adjacency", "assumption", "auditor", "protocol", "score"),
    *COST,
    *GAIN,
)
_WORDS = {"dataset", "training", "canary", "family", "start", "optimised through", "audited model"}
_LEGEND = (
    "ε is the mean over runs of each run's lower bound, ± half of its 95% t interval over runs; pooled is the lower "
    "bound from the coins of all runs at once, and the ceiling that of an audit whose guesses are all right. Each kind "
    f"is one optimisation, and ± leaves out how optimisations vary. {table_formats.NO_VALUE}: no value."
)
_COST_LEGEND = (
    "jobs' wall time on one such device, a thread each on CPUs; of a job that was interrupted that of its last "
    "attempt, or of an optimisation the sum over its history if that is more, which lacks the proxies of Gradient Max "
    "and what was lost of a metastep. Steps are those of the optimisation's trainings, each counted once, however "
    "often replay repeats it; the audit is training, scoring and bounds of all runs of the row. ε over random is the "
    "mean of differences run by run, ± half of its 95% t interval. Minutes per ε are those of the optimisation for "
    "each unit of it, where that interval lies above 0."
)
_MEANING = {
    "start": "Canaries by where their pixels start, as they are and optimised from there.",
    "num_canaries": "Canaries by their number. More coins raise the ceiling and tighten the bound: compare AUROCs too.",
    "model": "Canaries optimised through one training (rows), audited on others (columns): ε, and AUROC in brackets. A "
    "star is a training of the model that the canaries were optimised on, two are one that starts as theirs and has "
    "their algorithm, too.",
    "cost": "What optimisation costs beside the audit, and what it buys.",
}


def collect(
    frame: pd.DataFrame,
    kinds: Mapping[str, comparisons.Kind],
    trainings: Mapping[str, Mapping[str, Any]],
    *,
    by: str,
    auditor: str,
    protocol: str,
    score: str,
    costs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Compares canary kinds at the last step of every training.

    Args:
      frame: summary/epsilon.csv.
      kinds: Settings of the kinds that are compared, as `comparisons.points` takes them.
      trainings: Of each training that is compared its model (name and options), algorithm and pretraining.
      by: One of `comparisons.BY`.
      auditor, protocol, score: As of `tables.summarise`.
      costs: From `comparison_cost.table`, of all optimisations and cells; for by="cost" alone.

    Returns:
      One row per dataset, training, target epsilon and kind, with the columns `COLUMNS`; docs/output.md says what each
      means. Values of `COST` and `GAIN` are missing if `by` is another; `epsilon_gain` is over the kind of family
      `comparisons.BASELINE`, run by run with its 95% t interval, and missing where runs differ; `seconds_per_epsilon`
      is missing where that interval does not lie above 0.

    Raises:
      ValueError: As `comparisons.points` and `tables.summarise`, and if the frame lacks a kind or training.
    """
    points = comparisons.points(kinds, by)
    summary = tables.summarise(frame, auditor=auditor, protocol=protocol, score=score)
    rows = summary[summary["canary"].isin(points) & summary["training"].isin(trainings) & (summary["num_runs"] > 0)]
    _require_all(rows, points, trainings)
    order = {name: place for place, name in enumerate(_in_order(points, by))}
    cells = rows.groupby(tables.SETTING, sort=False).ngroup()
    rows = rows.assign(_cell=cells, _kind=rows["canary"].map(order)).sort_values(["_cell", "_kind"], ignore_index=True)
    models = {f"kind {name}": kind["model"] for name, kind in kinds.items() if "model" in kind}
    models |= {f"training {name}": training["model"] for name, training in trainings.items()}
    texts = comparisons.model_texts(models)
    rows = rows.assign(
        by=by,
        line=[points[name][0] for name in rows["canary"]],
        value=[points[name][1] for name in rows["canary"]],
        metamodel=rows["canary"].map(lambda name: texts.get(f"kind {name}")),
        audited_model=[texts[f"training {name}"] for name in rows["training"]],
        own_model=[
            comparisons.same_model(models.get(f"kind {kind}"), models[f"training {training}"])
            for kind, training in zip(rows["canary"], rows["training"], strict=True)
        ],
        metarecipe=rows["canary"].map(lambda name: _recipe(kinds[name])),
        audited_recipe=[comparisons.recipe_text(trainings[name]) for name in rows["training"]],
        num_canaries=[kinds[name]["num_canaries"] for name in rows["canary"]],
    )
    rows = rows.assign(own_recipe=rows["own_model"] & (rows["metarecipe"] == rows["audited_recipe"]))
    if by == "cost" and costs is not None:
        (baseline,) = (name for name, kind in kinds.items() if kind["family"] == comparisons.BASELINE)
        gains = _gains(tables.select(frame, auditor=auditor, protocol=protocol, score=score), baseline)
        rows = _with_costs(rows.join(gains, on=tables.CELL), kinds, costs)
    return rows.reindex(columns=list(COLUMNS))


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns a table from `collect` into the text of its cells: by model a matrix, otherwise a line for each row."""
    by = table["by"].iloc[0]
    if by == "model":
        return _matrix(table)
    cells = {"dataset": list(table["dataset"])} if table["dataset"].nunique() > 1 else {}
    cells |= {"training": list(table["training"]), "target\nε": [_number(v, "g") for v in table["epsilon"]]}
    cells |= {"canary": list(table["canary"])}
    if by == "start":
        cells |= {"start": list(table["value"]), "family": list(table["line"])}
    if by == "num_canaries":
        cells |= {"family": list(table["line"]), "canaries": [str(value) for value in table["value"]]}
    if by == "cost":
        cells |= _printed_costs(table)
    cells |= {"runs": [str(count) for count in table["num_runs"]], "ε\nmean": _plus_minus(table, "epsilon", 2)}
    cells |= {"ε\npooled": [_number(value, ".2f") for value in table["epsilon_pooled"]]}
    if by == "cost":
        cells |= {"ε over\nrandom": _gained(table)}
        cells |= {"minutes\nper ε": _minutes(table["seconds_per_epsilon"])}
    ceilings = zip(table["ceiling"], table["ceiling_pooled"], strict=True)
    cells |= {"ceiling\n(pooled)": [f"{_number(one, '.2f')} ({_number(all_, '.2f')})" for one, all_ in ceilings]}
    cells |= {"accounted\nε": [_number(value, ".2f") for value in table["epsilon_accounted"]]}
    cells |= {"AUROC\nmean": _plus_minus(table, "auroc", 3)}
    cells |= {"test\naccuracy": [f"{100 * value:.1f}%" for value in table["test_accuracy"]]}
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what is compared, what all rows share, and how to read the numbers."""
    first = table.iloc[0]
    auditor = table_formats.AUDITORS.get(first["auditor"], first["auditor"])
    words = [f"auditor {auditor}", *(f"{name} {first[name]}" for name in ("protocol", "score"))]
    for name in ("dataset", "game", "assumption"):
        if table[name].nunique() == 1:
            words.append(f"{name} {first[name]}")
    if first["by"] != "num_canaries" and table["num_canaries"].nunique() == 1:
        words.append(f"canaries {first['num_canaries']}")
    runs = sorted(table["num_runs"].unique())
    words.append(f"runs {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} to {runs[-1]}")
    meaning = _MEANING[first["by"]]
    if first["by"] == "cost" and table["device"].notna().any():
        meaning += f" Minutes of {table['device'].dropna().iloc[0]}: {_COST_LEGEND}"
    return f"{meaning} At the last step: {', '.join(words)}. {_LEGEND}"


def markdown(table: pd.DataFrame) -> str:
    """Writes the table as an aligned Markdown table under its note."""
    return table_formats.markdown_table(f"**Comparison by {_name(table)}.** {note(table)}", printed(table), _WORDS)


def latex(table: pd.DataFrame) -> str:
    """Writes the table as `table_formats.latex_table` does; trainings are set apart."""
    label = f"tab:comparison-{table['by'].iloc[0]}".replace("_", "-")
    by_cell = table["by"].iloc[0] != "model"
    groups = table[tables.SETTING].to_numpy().tolist() if by_cell else None
    return table_formats.latex_table(printed(table), _WORDS, caption=note(table), label=label, groups=groups)


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the table to files as `table_formats.write` does, in these forms."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def row_names(table: pd.DataFrame) -> pd.Series:
    """Names what each kind of the matrix was optimised through, by kind: model and recipe; missing if through none."""
    kinds = table.drop_duplicates("canary").set_index("canary")
    return kinds["metamodel"] + ", " + kinds["metarecipe"]


def column_names(table: pd.DataFrame) -> list[str]:
    """Names the columns of the matrix: each training with its target epsilon and, over a line break, its model."""
    cells = table.drop_duplicates(["training", "epsilon"])[["training", "epsilon", "audited_model"]]
    return [
        f"{training}{'' if np.isinf(epsilon) else f' ε {epsilon:g}'}\n{model}"
        for training, epsilon, model in cells.itertuples(index=False)
    ]


def _recipe(kind: comparisons.Kind) -> str | None:
    """Names the recipe that a kind was optimised through, if it was."""
    return comparisons.recipe_text(kind) if "model" in kind else None


def _in_order(points: Mapping[str, tuple[str, str | int]], by: str) -> list[str]:
    """Sorts kinds as they are shown: as listed, numbers of canaries upwards within their line."""
    if by != "num_canaries":
        return list(points)
    lines = list(dict.fromkeys(line for line, _ in points.values()))
    return sorted(points, key=lambda name: (lines.index(points[name][0]), points[name][1]))


def _require_all(rows: pd.DataFrame, kinds: Mapping[str, Any], trainings: Mapping[str, Any]) -> None:
    """Raises ValueError unless every training has every kind."""
    for training in trainings:
        found = set(rows.loc[rows["training"] == training, "canary"])
        if missing := [name for name in kinds if name not in found]:
            raise ValueError(f"frame lacks canaries {missing} in training {training!r}, expected audits of all of them")


def _gains(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Averages over runs what kinds gain over the baseline: by `tables.CELL`, without cells of other runs than its."""
    rows = rows[(rows["run"] != tables.POOLED) & (rows["step"] == rows.groupby(tables.CELL)["step"].transform("max"))]
    runs = rows.pivot(index=[*tables.SETTING, "run"], columns="canary", values="epsilon_lower")
    # Runs of one number share coins, data order and initial model, so that differences vary less than their parts.
    own, base = runs.drop(columns=baseline), runs[baseline]
    unpaired = own.isna().ne(base.isna(), axis=0).groupby(level=tables.SETTING).transform("any")
    gains = own.sub(base, axis=0).mask(unpaired).melt(ignore_index=False, value_name="gain").dropna().reset_index()
    names = {"mean": "epsilon_gain", "low": "epsilon_gain_low", "high": "epsilon_gain_high"}
    return tables.over_runs(gains, tables.CELL, "gain").rename(columns=names)


def _with_costs(rows: pd.DataFrame, kinds: Mapping[str, comparisons.Kind], costs: pd.DataFrame) -> pd.DataFrame:
    """Adds what was spent, and what that is for each unit of ε gained."""
    spent, audited = comparison_cost.optimizations(costs), comparison_cost.audits(costs)
    spent = spent.rename(columns={"seconds": "optimization_seconds"})
    rows = rows.join(spent, on=["dataset", "canary"])
    plain = ~rows["canary"].map(lambda name: "model" in kinds[name])
    rows.loc[plain, list(spent.columns)] = 0
    rows = rows.join(audited["seconds"].rename("audit_seconds"), on=list(comparison_cost.CELL))
    rows = rows.assign(device=" and ".join(comparison_cost.devices(costs)))
    paid = (rows["epsilon_gain_low"] > 0) & (rows["optimization_seconds"] > 0)
    per_epsilon = rows["optimization_seconds"] / rows["epsilon_gain"]
    return rows.assign(seconds_per_epsilon=per_epsilon.where(paid))


def _matrix(table: pd.DataFrame) -> pd.DataFrame:
    """The text of a comparison by model: a row per kind, a column per training."""
    several = table["dataset"].nunique() > 1
    headers, names_of, found = column_names(table), row_names(table).to_dict(), []
    for (dataset, kind), rows in table.groupby(["dataset", "canary"], sort=False):
        names = ({"dataset": dataset} if several else {}) | {"canary": kind}
        stars = rows["own_model"].astype(int) + rows["own_recipe"].astype(int)
        pairs = zip(rows["epsilon_mean"], rows["auroc_mean"], stars, strict=True)
        cells = [f"{_number(e, '.2f')} ({_number(a, '.3f')}){' ' * bool(n)}{'*' * n}" for e, a, n in pairs]
        own = names_of[str(kind)]
        own = table_formats.NO_VALUE if pd.isna(own) else own
        found.append({**names, "optimised through": own, **dict(zip(headers, cells, strict=True))})
    return pd.DataFrame(found, dtype=object)


def _gained(table: pd.DataFrame) -> list[str]:
    """Writes gains with half of their intervals, where they have one."""
    halves = table["epsilon_gain_high"] - table["epsilon_gain"]
    pairs = zip(table["epsilon_gain"], halves, strict=True)
    return [_number(gain, ".2f") + ("" if pd.isna(half) else f" ± {half:.2f}") for gain, half in pairs]


def _printed_costs(table: pd.DataFrame) -> dict[str, list[str]]:
    """The text of what was spent."""
    return {
        "optimisation,\nminutes": _minutes(table["optimization_seconds"]),
        "its\ntrainings": [_number(value, ",.0f") for value in table["num_trainings"]],
        "their\nsteps": [_number(value, ",.0f") for value in table["num_steps"]],
        "audit,\nminutes": _minutes(table["audit_seconds"]),
    }


def _minutes(seconds: pd.Series) -> list[str]:
    """Writes seconds as minutes."""
    return [_number(value / 60, ".1f") for value in seconds]


def _plus_minus(table: pd.DataFrame, name: str, digits: int) -> list[str]:
    """Writes means with half of their intervals, where they have one."""
    halves = table[f"{name}_high"] - table[f"{name}_mean"]
    means = [_number(value, f".{digits}f") for value in table[f"{name}_mean"]]
    return [m if pd.isna(h) else f"{m} ± {h:.{digits}f}" for m, h in zip(means, halves, strict=True)]


def _number(value: float, form: str) -> str:
    """Writes a number."""
    if pd.isna(value):
        return table_formats.NO_VALUE
    return "∞" if value == float("inf") else f"{value:{form}}"


def _name(table: pd.DataFrame) -> str:
    """Says in a word what is compared."""
    return {"num_canaries": "number of canaries"}.get(table["by"].iloc[0], table["by"].iloc[0])
