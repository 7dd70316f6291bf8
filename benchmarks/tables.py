"""Writes the tables of benchmarks/README.md and of three guides in docs from the CSV files in benchmarks/results.

python -m benchmarks.tables
"""

from __future__ import annotations

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
    metagradient_tables,
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
        (README, metagradient_tables.sections(*results) | audit_sections(*audits[:2]) | others),
        (GUIDE, metagradient_tables.guide_sections(*results[:2])),
        (AUDITING, auditing_sections(*audits)),
        (LEDGER, {"dirac_bounds": dirac_bounds.table(pd.read_csv(dirac_bounds.RESULTS))}),
    ):
        store.write_text(path, filled(path.read_text(encoding="utf-8"), generated))


if __name__ == "__main__":
    main()
