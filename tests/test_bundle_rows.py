"""Results as rows of a bundle's tables, and back; test_bundle.py has them through files."""

import fake_results
import numpy as np
import pandas as pd
import pytest

from metacanary import bundle_layout, bundle_rows, parquet, store
from metacanary.bundle_layout import Cell


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results."""
    return fake_results.write(tmp_path_factory.mktemp("results"))


def cells():
    """The cells of the results."""
    return [Cell(**names, num_blocks=2, audit=fake_results.settings_of(names)) for names in fake_results.CELLS]


def test_canary_rows_have_an_inverse(results):
    names = [f"canaries/digits-train200/{kind}/canaries.npz" for kind in ("mislabeled", "random")]
    stored = {name: store.read_npz(results / name)[0] for name in names}
    rows = pd.concat([bundle_rows.canary_rows(name, arrays) for name, arrays in stored.items()], ignore_index=True)
    for name, arrays in stored.items():
        again = bundle_rows.canary_arrays(rows, name, arrays["images"].shape[1:])
        assert list(again) == list(arrays)
        for column, array in arrays.items():
            assert again[column].dtype == array.dtype
            assert np.array_equal(again[column], array)


def test_runs_know_their_blocks(results):
    rows = bundle_rows.run_rows(results, cells()[0])
    assert rows.drop_duplicates("run")["block"].tolist() == [0, 0, 1, 1]
    assert rows["training"].unique().tolist() == ["sgd"]


def test_population_has_a_row_for_each_model(results):
    cell = cells()[1]
    rows = bundle_rows.population_rows(results, cell)
    assert rows[["run", "step"]].to_numpy().tolist() == [[run, step] for run in range(4) for step in (10, 20)]
    arrays, _ = store.read_npz(results / bundle_rows.block_files(cell, 1)[2])
    assert np.array_equal(rows["log_probability"][5], arrays["log_probability"][0, 1])


def test_audits_are_of_the_listed_cells(results, tmp_path):
    table, types = store.read_csv(results / "summary/epsilon.csv"), bundle_layout.types("audits")
    parquet.write(tmp_path / "audits.parquet", [table], types)
    assert len(bundle_rows.audits(tmp_path, cells())) == len(table)
    with pytest.raises(
        ValueError, match=r"audits: there are rows of \('digits-train200', 'mislabeled', 'dpsgd', 8.0\)"
    ):
        bundle_rows.audits(tmp_path, cells()[:1])


def test_of_cell_takes_the_rows_of_one_cell(results):
    audits = store.read_csv(results / "summary/epsilon.csv")
    for cell in cells():
        own = bundle_rows.of_cell(audits, cell)
        assert len(own) == len(store.read_csv(results / "audits" / cell.path / "epsilon.csv"))
        assert own["epsilon"].unique().tolist() == [cell.epsilon]
        assert own["canary"].unique().tolist() == [cell.canary]
