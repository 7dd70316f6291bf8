"""The table of model variants: their metasmoothness, and what metagradient descent then reached with each.

It joins the measurements of `metasmoothness` and the histories of `optimization`; it needs neither JAX nor models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from metacanary import store, table_formats

OPTIONS = ("model", "width", "activation", "logit_scale", "group_norm", "norm_after_activation", "pool", "final_pool")
RECIPE = ("batch_size", "sampling_prob", "clip_norm", "noise_multiplier", "num_steps", "learning_rate")
SETTINGS = (*OPTIONS, "algorithm", *RECIPE, "objective")
"""What variants may differ in: a column of the printed table where they do, a word of its note where they do not."""

COLUMNS = (
    *("dataset", "canary"),
    *SETTINGS,
    *("num_directions", "step", "metasmoothness_mean", "metasmoothness_std", "relative_change"),
    *("num_metasteps", "num_averaged", "objective_before", "objective_after", "objective_reduction"),
    *("auroc_before", "auroc_after", "auroc_gain"),
)
_LEGEND = (
    "Metasmoothness (Engstrom et al. 2025, Definition 2) is the mean over random sign directions on the pixels of the "
    "canaries, ± the standard deviation over directions, which is no interval; the directions, coins, initial seeds "
    "and orders of all variants are the same. The objective (minimised) and the AUROC are means over the first and "
    "over the last metasteps of one optimisation, each before its update, on coins and models that the canaries had "
    f"not met. {table_formats.NO_VALUE}: no value."
)


def collect(
    variants: Sequence[Mapping[str, Any]],
    measured: Sequence[pd.DataFrame],
    histories: Sequence[pd.DataFrame],
    *,
    num_averaged: int,
) -> pd.DataFrame:
    """Joins what is known of each variant.

    Args:
      variants: Of each variant its names `dataset` and `canary`, and of its canary kind `algorithm` and the mappings
        `model` (name and options), `training` and `objective`.
      measured: Of each variant the rows of `metasmoothness.of_canaries`, one for each direction.
      histories: Of each variant the history of its optimisation: a row per metastep with objective and auroc.
      num_averaged: Metasteps to average at each end of a history.

    Returns:
      One row per variant in the order given, with the columns `COLUMNS`; docs/output.md says what each means.
      Options that a model does not have are missing, and so is the standard deviation of a single direction.

    Raises:
      ValueError: For lists of different lengths, directions that differ between variants, or a history shorter than
        twice num_averaged.
    """
    lengths = {"variants": len(variants), "measured": len(measured), "histories": len(histories)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"variants, measured and histories: got {lengths} of them, expected one for each variant")
    for rows in measured:
        if rows[["seed", "step"]].to_numpy().tolist() != measured[0][["seed", "step"]].to_numpy().tolist():
            raise ValueError("measured: got other seeds or steps for one variant than for another, expected the same")
    joined = [
        _settings(variant) | _smoothness(rows) | _descent(history, num_averaged)
        for variant, rows, history in zip(variants, measured, histories, strict=True)
    ]
    return pd.DataFrame(joined, columns=list(COLUMNS))


def _settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What one variant is."""
    options = dict(variant["model"]["options"])
    sizes = options.get("widths", [options["width"]] if "width" in options else [])
    options |= {"model": variant["model"]["name"], "width": "-".join(f"{size:g}" for size in sizes) or None}
    named = {name: options.get(name) for name in OPTIONS} | {name: variant["training"].get(name) for name in RECIPE}
    names = {name: variant[name] for name in ("dataset", "canary", "algorithm")}
    return names | named | {"objective": variant["objective"]["name"]}


def _smoothness(rows: pd.DataFrame) -> dict[str, Any]:
    """What was measured of one variant."""
    return {
        "num_directions": len(rows),
        "step": rows["step"].iloc[0],
        "metasmoothness_mean": rows["metasmoothness"].mean(),
        "metasmoothness_std": rows["metasmoothness"].std(),
        "relative_change": rows["relative_change"].mean(),
    }


def _descent(history: pd.DataFrame, num_averaged: int) -> dict[str, Any]:
    """What the optimisation of one variant began with and reached."""
    if num_averaged < 1 or 2 * num_averaged > len(history):
        raise ValueError(f"num_averaged: got {num_averaged}, expected 1 to half of the {len(history)} metasteps")
    before, after = history.iloc[:num_averaged].mean(), history.iloc[-num_averaged:].mean()
    return {
        "num_metasteps": len(history),
        "num_averaged": num_averaged,
        "objective_before": before["objective"],
        "objective_after": after["objective"],
        "objective_reduction": before["objective"] - after["objective"],
        "auroc_before": before["auroc"],
        "auroc_after": after["auroc"],
        "auroc_gain": after["auroc"] - before["auroc"],
    }


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Turns the table into the text of its cells; settings that all variants share are left to `note`."""
    varying = [name for name in ("dataset", *SETTINGS) if _varies(table, name)]
    cells = {"variant": list(table["canary"])} | {_header(name): [_text(v) for v in table[name]] for name in varying}
    smooth = zip(table["metasmoothness_mean"], table["metasmoothness_std"], strict=True)
    cells["metasmoothness"] = [_fixed(m) if pd.isna(s) else f"{_fixed(m)} ± {_fixed(s)}" for m, s in smooth]
    for quantity, word, last in (("objective", "objective", "reduction"), ("auroc", "AUROC", "gain")):
        cells |= {f"{word}\n{end}": [*map(_fixed, table[f"{quantity}_{end}"])] for end in ("before", "after", last)}
    return pd.DataFrame(cells, dtype=object)


def note(table: pd.DataFrame) -> str:
    """Says what all variants share, and how to read the numbers."""
    shared = [name for name in ("dataset", *SETTINGS) if not _varies(table, name) and table[name].notna().any()]
    counts = ("num_directions", "step", "num_metasteps", "num_averaged")
    words = [f"{name.replace('_', ' ')} {_text(table[name].iloc[0])}" for name in (*shared, *counts)]
    return f"Model variants and what metagradient descent reached with each: {', '.join(words)}. {_LEGEND}"


def markdown(table: pd.DataFrame) -> str:
    """Writes the table as an aligned Markdown table under its note."""
    return table_formats.markdown_table(f"**Metasmoothness.** {note(table)}", printed(table), _words())


def latex(table: pd.DataFrame) -> str:
    """Writes the table as `table_formats.latex_table` does."""
    return table_formats.latex_table(printed(table), _words(), caption=note(table), label="tab:metasmoothness")


def write(table: pd.DataFrame, *paths: store.PathLike, provenance: Mapping[str, Any]) -> None:
    """Writes the table to files as `table_formats.write` does, in these forms."""
    table_formats.write(table, *paths, provenance=provenance, markdown=markdown, latex=latex)


def _varies(table: pd.DataFrame, name: str) -> bool:
    """Tells whether variants differ in a setting; not to have it is a difference too."""
    return table[name].nunique(dropna=False) > 1


def _header(name: str) -> str:
    """Writes the name of a setting over two lines at most."""
    return name.replace("_", " ").replace(" ", "\n", 1).replace("\nafter ", " after\n")


def _text(value: Any) -> str:
    """Writes a setting."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return table_formats.NO_VALUE
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if str(value) == "True" else "no"
    return value if isinstance(value, str) else f"{value:g}"


def _fixed(value: float) -> str:
    """Writes a measured number."""
    return table_formats.NO_VALUE if pd.isna(value) else f"{value:.3f}"


def _words() -> set[str]:
    """Lists the columns that hold words, which are set flush left."""
    return {
        "variant",
        *map(_header, ("dataset", "model", "activation", "pool", "final_pool", "algorithm", "objective")),
    }
