"""The data sheet of a bundle."""

import re
from pathlib import Path

import fake_results
import pandas as pd
import pytest

from metacanary import auditors, bundle, bundle_layout, datasheet
from metacanary.bundle_layout import Cell


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


@pytest.mark.parametrize("first", fake_results.CELLS)
def test_example_takes_the_last_step_of_one_cell_as_printed(tmp_path, monkeypatch, first):
    """Where other data sets, and other epsilons of the same training, stand beside it."""
    others = [first | {"dataset": "digits-train100"}, first | {"epsilon": "4"}, first | {"epsilon": "0.5"}]
    results = fake_results.write(tmp_path / "results", cells=[first, *others])
    bundle.write(results, tmp_path / "bundle", config={})
    monkeypatch.chdir(tmp_path / "bundle")
    sheet = Path("datasheet.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", sheet, re.DOTALL)
    names = {}
    exec(code, names)
    game = names["game"]
    assert len(game) == 2 * fake_results.NUM_CANARIES  # the audited runs
    assert not game.duplicated(["run", "canary_id"]).any()
    assert game["step"].unique().tolist() == [20]
    found = game[["dataset", "canary", "training", "epsilon"]].drop_duplicates().to_dict("records")
    assert found == [first | {"epsilon": float(first["epsilon"])}]


@pytest.mark.parametrize(("names", "shown"), [(["rmia", "logit_margin"], "logit_margin"), (["rmia"], "negative_loss")])
def test_example_shows_a_score_that_is_stored(names, shown):
    """Scores relative to reference models are made of others when they are audited."""
    cell = Cell(**fake_results.CELLS[1], num_blocks=1, audit={"scores": names})
    assert f"score == '{shown}'" in datasheet._example(cell)


def test_limits_except_what_holds_at_no_level(sheet):
    limits = " ".join(sheet.partition("## Limits")[2].split())
    assert "Rows with protocol `paper` (`assumption` is `none`) are no bounds" in limits
    assert "those with assumption `credible` (auditor `credible_rates`) no confidence bounds" in limits
    (credible,) = (auditor for auditor in auditors.AUDITORS if auditor.name == "credible_rates")
    assert credible.assumption == "credible"
