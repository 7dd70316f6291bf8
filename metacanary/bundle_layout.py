"""What a bundle is made of: its files, their columns, and the names of the cells in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

VERSION = 1
"""Of the layout: `open_package` refuses others."""

PACKAGE, SUMS, PROVENANCE, CONFIG, DATASHEET = (
    *("datapackage.json", "SHA256SUMS", "provenance.json", "config.json", "datasheet.md"),
)
FILES = (
    *("audits.parquet", "canaries.parquet", "population.parquet", "runs.parquet", "scores.parquet"),
    *(CONFIG, PACKAGE, DATASHEET, PROVENANCE, SUMS),
)
"""Files of every bundle; below the folder `EXTRAS` are CSV files as the workflow wrote them."""
EXTRAS = "csv"

_CELL = {
    "dataset": ("string", "data set, with the number of its training images if it is a subset"),
    "canary": ("string", "canary kind"),
    "training": ("string", "training recipe"),
    "epsilon": ("number", "target epsilon of the training; inf without differential privacy"),
}
_RUN = {
    "run": ("integer", "number of the run within its cell"),
    "role": ("string", "audited, surrogate (choices before an audit) or reference (trained without canaries)"),
    "step": ("integer", "training steps taken"),
}
Columns = Mapping[str, tuple[str, str]]
TABLES: Mapping[str, Columns] = {
    "audits": _CELL
    | {
        "accountant": ("string", "pld or rdp, of epsilon_accounted"),
        "epsilon_accounted": ("number", "what the accountant proves for the steps so far; inf without privacy"),
        "epsilon_accounted_rdp": ("number", "the same by RDP accounting; missing in the paired game"),
        "epsilon_heuristic": ("number", "cost of the last iterate alone if losses were linear; no bound"),
        "game": ("string", "independent (a coin for each canary) or paired (which of two is inserted)"),
        "step": _RUN["step"],
        "run": ("string", "number of the audited run, or pooled: the coins of all audited runs as one game"),
        "score": ("string", "membership score"),
        "auditor": ("string", "which lower bound"),
        "protocol": ("string", "how the number of guesses was chosen"),
        "assumption": ("string", "what the bound needs beyond fair coins; none: there is no claim"),
        "adjacency": ("string", "neighbouring data sets that epsilon speaks of: add_remove or replace_one"),
        "epsilon_lower": ("number", "lower bound on epsilon at delta"),
        "ceiling": ("number", "the bound if every guess had been right"),
        "num_canaries": ("integer", "coins in the audit: canaries, or pairs of the paired game"),
        "num_guesses": ("integer", "guesses made; 0 for an AUROC"),
        "num_guesses_in": ("integer", "guesses that said IN"),
        "num_correct": ("integer", "right guesses"),
        "auroc": ("number", "area under the ROC curve of the score; missing if all coins were equal"),
        "test_accuracy": ("number", "of the audited model, 0 to 1; the mean over runs if pooled"),
    },
    "canaries": {
        "dataset": _CELL["dataset"],
        "canary": _CELL["canary"],
        "id": ("integer", "canary_id of the scores; in the paired game 2i and 2i + 1 are a pair"),
        "label": ("integer", "label that it is trained with, a position in the class names of the data set"),
        "source_index": ("integer", "position of its source image in the training set"),
        "source_label": ("integer", "label of its source image"),
        "image": ("pixels", "height x width x channels pixels in [0, 1], row by row, channels last"),
        "source_image": ("pixels", "the source image in the same form"),
    },
    "population": _CELL
    | {name: _RUN[name] for name in ("run", "step")}
    | {"log_probability": ("numbers", "log-probability of the label of each of the first test images, for rmia")},
    "runs": _CELL
    | {"block": ("integer", "job that trained the run")}
    | _RUN
    | {
        "test_accuracy": ("number", "share of test images that are classified correctly, 0 to 1"),
        "noise_multiplier": ("number", "noise of DP-SGD over its clip norm; 0 without privacy"),
    },
    "scores": _CELL
    | _RUN
    | {
        "canary_id": ("integer", "id of the canary"),
        "included": ("integer", "the coin: 1 if the canary was in the training set of the run, else 0"),
        "score": ("string", "membership score"),
        "value": ("number", "its value, higher for a likely member"),
    },
}
"""Type and meaning of each column; all Parquet files are tables in long form."""
DENSE = {"population": ["log_probability"], "scores": ["value"]}

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EPSILON = re.compile(r"inf|[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is audited: models of one training and target epsilon, with one kind of canaries in one data set.

    Attributes:
      dataset: Its name, with the size of the subset, if it is one.
      canary: The canary kind.
      training: The training recipe.
      epsilon: As paths have it: "8", "0.5", "inf".
      num_blocks: Jobs that its runs were trained in.
      audit: Settings of its audits, as `summary.Settings` takes them.
    """

    dataset: str
    canary: str
    training: str
    epsilon: str
    num_blocks: int
    audit: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("dataset", "canary", "training"):
            _require(_NAME.fullmatch(str(getattr(self, name))), name, getattr(self, name), "a name without slashes")
        _require(_EPSILON.fullmatch(str(self.epsilon)), "epsilon", self.epsilon, "a number or inf")
        _require(isinstance(self.num_blocks, int), "num_blocks", self.num_blocks, "a whole number")
        _require(isinstance(self.audit, Mapping), "audit", self.audit, "a mapping")

    @property
    def path(self) -> str:
        """Its folder under models, scores and audits."""
        return f"{self.dataset}/{self.canary}/{self.training}/eps{self.epsilon}"

    @property
    def names(self) -> dict[str, str]:
        """Its four names, as `summary.epsilon_table` takes them."""
        return {name: str(getattr(self, name)) for name in _CELL}

    @property
    def values(self) -> dict[str, str | float]:
        """Its values in the four columns that every table has."""
        return {**self.names, "epsilon": float(self.epsilon)}


def types(table: str) -> dict[str, str]:
    """The type of each column of a table, as `parquet` takes them."""
    return {name: kind for name, (kind, _) in TABLES[table].items()}


def inside(folder: Path, name: str) -> Path:
    """A path in a folder.

    Args:
      folder: The folder.
      name: Relative, with forward slashes.

    Raises:
      ValueError: If the name, or a link that stands there, leads out of the folder, or it is no plain name.
    """
    parts = PurePosixPath(name).parts
    plain = parts and "/".join(parts) == name and all(map(_PART.fullmatch, parts))
    path = folder / name
    if not plain or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"name is {name!r}, expected a plain file name inside {str(folder)!r}")
    return path


def _require(condition: object, name: str, value: object, expected: str) -> None:
    """Raises ValueError with the name, the value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
