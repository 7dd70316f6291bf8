"""The data sheet of a bundle."""

import re

import fake_results
import pandas as pd
import pytest

from metacanary import bundle, bundle_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle."""
    folder = tmp_path_factory.mktemp("sheet")
    results = fake_results.write(folder / "results")
    bundle.write(results, folder / "bundle", config=fake_results.CONFIG, also=fake_results.ALSO)
    return folder / "bundle"


@pytest.fixture(scope="module")
def sheet(folder):
    """Its data sheet."""
    return (folder / "datasheet.md").read_text(encoding="utf-8")


def test_sections_are_those_of_a_data_sheet(sheet):
    sections = ["Motivation", "Composition", "Columns", "Images", "Collection", "Uses", "Limits"]
    assert re.findall(r"^## (\w+)$", sheet, re.MULTILINE) == sections


def test_numbers_are_those_of_the_bundle(folder, sheet):
    for table in bundle_layout.TABLES:
        rows, size = len(pd.read_parquet(folder / f"{table}.parquet")), (folder / f"{table}.parquet").stat().st_size
        assert f"| `{table}.parquet` | {rows:,} | {size:,} |" in sheet
    runs = pd.read_parquet(folder / "runs.parquet")
    for (_, canary, training), own in runs.groupby(["dataset", "canary", "training"]):
        counts = [own[own["role"] == role]["run"].nunique() for role in ("audited", "surrogate", "reference")]
        row = [canary, training, f"{own['epsilon'].iloc[0]:g}", *counts, own["step"].nunique()]
        assert f"| {' | '.join(map(str, row))} |" in sheet


def test_every_column_is_explained(sheet):
    for columns in bundle_layout.TABLES.values():
        for name, (kind, meaning) in columns.items():
            assert f"| `{name}` | {kind} | {meaning} |" in sheet


def test_terms_settings_and_versions_are_there(sheet):
    assert "Terms: CC BY 4.0." in sheet
    assert "game paired, delta 1e-05, significance 0.05" in sheet
    assert "numpy " in sheet
    assert "{" not in sheet.replace("{json", "")  # no template is left open


def test_example_runs_as_printed(folder, sheet, monkeypatch):
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", sheet, re.DOTALL)
    names = {}
    exec(code, names)
    assert len(names["game"]) == 2 * 2 * fake_results.NUM_CANARIES  # runs, steps, canaries
