"""Results of the workflow as rows of a bundle's tables, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from metacanary import canaries, parquet, store, summary
from metacanary.bundle_layout import Cell, types

SCORE_COLUMNS = ["run", "step", "canary_id", "included", "score", "value"]
RUN_COLUMNS = ["run", "role", "step", "test_accuracy", "noise_multiplier"]
"""Columns of the workflow's files, which a block has for itself."""


def block_files(cell: Cell, block: int) -> tuple[str, str, str]:
    """The scores, the runs and the population of a block."""
    names = (f"block{block}.csv", f"runs{block}.csv", f"population{block}.npz")
    scores, runs, population = (f"scores/{cell.path}/{name}" for name in names)
    return scores, runs, population


def canary_rows(name: str, arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Canaries as rows of canaries.parquet; `name` is the path of their file."""
    _, dataset, kind, _ = name.split("/")
    flat = {"image": arrays["images"], "source_image": arrays["source_images"]}
    same = {column: arrays[column] for column in ("id", "label", "source_index")}
    columns = same | {"source_label": arrays["source_labels"]}
    pixels = {column: list(images.reshape(len(images), -1)) for column, images in flat.items()}
    return pd.DataFrame({"dataset": dataset, "canary": kind} | columns | pixels)


def canary_arrays(rows: pd.DataFrame, name: str, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """The inverse of `canary_rows`; `shape` is that of an image."""
    _, dataset, kind, _ = name.split("/")
    own = rows[(rows["dataset"] == dataset) & (rows["canary"] == kind)]
    integers = ("id", "source_index", "label")
    return canaries.Canaries(
        **{column: own[column].to_numpy(np.int32) for column in integers},
        source_labels=own["source_label"].to_numpy(np.int32),
        images=_images(own["image"], shape),
        source_images=_images(own["source_image"], shape),
    ).arrays()


def _images(pixels: pd.Series, shape: Sequence[int]) -> np.ndarray:
    """Images float32 [m, height, width, channels] from rows of pixels."""
    return np.stack([*pixels]).astype(np.float32).reshape(-1, *shape)


def score_rows(results: Path, cell: Cell) -> pd.DataFrame:
    """The scores of all blocks of a cell."""
    frames = [store.read_csv(results / block_files(cell, block)[0]) for block in range(cell.num_blocks)]
    roles = run_rows(results, cell).drop_duplicates("run").set_index("run")["role"]
    table = pd.concat(frames, ignore_index=True)
    return table.assign(**cell.values, role=table["run"].map(roles))


def run_rows(results: Path, cell: Cell) -> pd.DataFrame:
    """The runs of all blocks of a cell."""
    paths = [results / block_files(cell, block)[1] for block in range(cell.num_blocks)]
    frames = [store.read_csv(path).assign(block=block) for block, path in enumerate(paths)]
    return pd.concat(frames, ignore_index=True).assign(**cell.values)


def population_rows(results: Path, cell: Cell) -> pd.DataFrame:
    """The population under all models of a cell."""
    frames = []
    for block in range(cell.num_blocks):
        arrays, _ = store.read_npz(results / block_files(cell, block)[2])
        num_runs, num_steps, _ = arrays["log_probability"].shape
        models = {"run": np.repeat(arrays["run"], num_steps), "step": np.tile(arrays["step"], num_runs)}
        values = [row for run in arrays["log_probability"] for row in run]
        frames.append(pd.DataFrame(models | {"log_probability": values}))
    return pd.concat(frames, ignore_index=True).assign(**cell.values)


def audits(folder: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """All audits of a bundle; raises ValueError for those that are of none of its cells."""
    table = parquet.read(folder / "audits.parquet", types("audits"))[list(summary.COLUMNS)]
    listed = {tuple(cell.values.values()) for cell in cells}
    for found in table[["dataset", "canary", "training", "epsilon"]].drop_duplicates().itertuples(index=False):
        if tuple(found) not in listed:
            raise ValueError(f"audits: there are rows of {tuple(found)}, expected those of the bundle's cells alone")
    return table


def of_cell(audits: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The audits of a cell, with epsilon as `compute_epsilon` writes it."""
    own = np.logical_and.reduce([audits[name] == value for name, value in cell.values.items()])
    return audits[own].assign(epsilon=cell.epsilon)


def scores(folder: Path, cell: Cell) -> pd.DataFrame:
    """The scores of a cell."""
    return parquet.read(folder / "scores.parquet", types("scores"), **cell.values)[SCORE_COLUMNS]


def runs(folder: Path, cell: Cell) -> pd.DataFrame:
    """The runs of a cell, with their blocks."""
    return parquet.read(folder / "runs.parquet", types("runs"), **cell.values)[["block", *RUN_COLUMNS]]


def population(folder: Path, cell: Cell) -> list[dict[str, np.ndarray]]:
    """The population under the models of each block of a cell, as `block_scores.population_block` has it."""
    rows, models = parquet.read(folder / "population.parquet", types("population"), **cell.values), runs(folder, cell)
    blocks = []
    for block in range(cell.num_blocks):
        own = rows[rows["run"].isin(models.loc[models["block"] == block, "run"])]
        arrays = {name: own[name].unique() for name in ("run", "step")}
        shape = (arrays["run"].size, arrays["step"].size, -1)
        blocks.append(arrays | {"log_probability": np.reshape(np.stack([*own["log_probability"]]), shape)})
    return blocks
