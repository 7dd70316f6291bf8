"""The data sheet of a bundle, in Markdown: why it was made, what is in it, how to use it, what it cannot tell.

The questions are those of Gebru et al., Datasheets for Datasets (arXiv 1803.09010); every number comes from the bundle.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from metacanary.bundle_layout import TABLES, Cell
from metacanary.reference_scores import MIN_REFERENCES

_MOTIVATION = """
An audit of privacy by membership: canaries are put into a training set or left out by fair coins, models are trained,
and from how well the coins are guessed follow lower bounds on epsilon. The scores are here so that others can audit
them with bounds, protocols and choices of their own without training a model, and can check the published bounds.
"""
_COLLECTION = """
A model was trained for every run, by the recipe of that name in `config.json`, on the data set without the canaries'
source images and with those canaries whose coins say so. Coins, seeds and orders come from the config's seed. Scores
are functions of models, images and labels, and never of the coins. `provenance.json` says of each result with which
settings, code, versions and device it was made, and in how many seconds; `files` there are paths in the workflow.
"""
_USES = """
Any reader of Parquet reads the tables. Their first columns join them; `canary_id` of scores is `id` of canaries:

```python
import pandas as pd

scores = pd.read_parquet("scores.parquet")
{example}
```

Each `run` of it is a game, and `included` its coins. Guess them from `value`, count what is right, and compare with
`audits.parquet`. Audit runs with role `audited` alone; choose (a score, a number of guesses) on runs with role
`surrogate`. Pixels stand in one list, `row.image.reshape(height, width, channels)`; `image_shapes` in
`datapackage.json` has the shapes.

    sha256sum -c SHA256SUMS                                               # in this folder: is it whole?
    python -m metacanary.bundle check FOLDER                              # do the bounds follow from the scores?
    python -m metacanary.bundle restore FOLDER RESULTS                    # RESULTS: the results_dir of config.json
    snakemake --cores 1 --configfile FOLDER/config.json -- tables figures

The last two make every table and figure again and train nothing, with metacanary {version} in its folder.
"""
_LIMITS = """
- Checksums tell of accidents. Who can change a file can change `SHA256SUMS` too. `check` shows that the bounds follow
  from the scores; nothing here shows that the scores are those of models.
- The models are not here, so that other scores cannot be computed.
- Each bound holds by itself, under its `assumption`, at its significance; the largest of several holds at none. Those
  with assumption `asymptotic` hold so for many canaries. Rows with protocol `paper` (`assumption` is `none`) are no
  bounds, and those with assumption `credible` (auditor `credible_rates`) no confidence bounds but the lower ends of
  Bayesian intervals.
- A low bound says nothing about privacy where its `ceiling` is low.
- All runs of a cell share one set of canaries; optimised canaries come from one optimisation. Intervals over runs leave
  out how these vary.
- Scores are those of the attacks that were run. A better attack may show more.
"""


def text(
    package: Mapping[str, Any],
    cells: Sequence[Cell],
    provenance: Mapping[str, Mapping[str, Any]],
    counts: pd.DataFrame,
) -> str:
    """Writes the data sheet.

    Args:
      package: datapackage.json of the bundle.
      cells: What is audited.
      provenance: Of the results, by path.
      counts: A row per cell: its names and numbers of runs, snapshots, canaries, scores.

    Returns:
      Markdown.

    Guarantees:
      A function of the arguments: no date, no machine.
    """
    own = package["metacanary"]
    parts = [
        f"# {package['title']}",
        "## Motivation",
        _MOTIVATION,
        "## Composition",
        _files(package),
        f"{len(cells)} cells are audited:",
        _table(counts),
        _audited(cells),
        "## Columns",
        *(f"`{name}.parquet`\n\n{_columns(name)}" for name in TABLES),
        "## Images",
        _sources(package["sources"]),
        "## Collection",
        _COLLECTION,
        _made_with(provenance),
        "## Uses",
        _USES.format(example=_example(cells[0]), version=own["version"]),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _files(package: Mapping[str, Any]) -> str:
    """Files with their sizes and numbers of rows."""
    rows = [
        {"file": f"`{r['path']}`", "rows": f"{r['rows']:,}" if "rows" in r else "", "bytes": f"{r['bytes']:,}"}
        for r in package["resources"]
    ]
    return _table(pd.DataFrame(rows))


def _audited(cells: Sequence[Cell]) -> str:
    """How the cells are audited, one line for those that share it."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        audit = cell.audit
        line = (
            f"game {audit['game']}, delta {audit['delta']:g}, significance {audit['significance']:g}; scores "
            f"{', '.join(audit['scores'])}; auditors {', '.join(audit['auditors'])}; protocols "
            f"{', '.join(audit['protocols'])}"
        )
        groups.setdefault(line, []).append(f"`{cell.path}`")
    return "\n".join(f"- {', '.join(paths)}: {line}." for line, paths in groups.items())


def _columns(name: str) -> str:
    """Columns with their types and meanings."""
    rows = [{"column": f"`{column}`", "type": kind, "meaning": text} for column, (kind, text) in TABLES[name].items()]
    return _table(pd.DataFrame(rows))


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    """Where the images are from, and on which terms."""
    lines = [f"- {s['title']}. {s['path']}. Terms: {s['licence']}." for s in sources]
    return "\n".join([*lines, "", "Canaries and their source images are here under the terms of their data set."])


def _made_with(provenance: Mapping[str, Mapping[str, Any]]) -> str:
    """Versions and devices of all results."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in sorted(p["versions"].items())) for p in provenance.values()})
    devices = sorted({f"{p['device']['kind']} ({p['device']['cpu']})" for p in provenance.values()})
    return f"Canaries, scores and audits were made with {'; or '.join(versions)}, on {'; '.join(devices)}."


def _example(cell: Cell) -> str:
    """Lines of pandas that take the games of one cell."""
    # Scores that are relative to reference models are made of the stored ones when they are audited.
    score = next((name for name in cell.audit["scores"] if name not in MIN_REFERENCES), "negative_loss")
    return (
        f"game = scores.query(\"dataset == '{cell.dataset}' and canary == '{cell.canary}' and training == "
        f"'{cell.training}' and epsilon == {cell.epsilon}\")\n"
        f"game = game.query(\"role == 'audited' and score == '{score}' and step == step.max()\")"
    )


def _table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    head = [[str(name) for name in frame.columns], ["---"] * len(frame.columns)]
    body = [[str(value).replace("|", "\\|") for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + body)
