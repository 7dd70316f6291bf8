"""The files of a bundle, their columns, and names that lead nowhere else."""

import pytest

from metacanary import bundle_layout, parquet, summary
from metacanary.bundle_layout import Cell, inside

NAMES = {"dataset": "digits-train200", "canary": "random", "training": "sgd", "epsilon": "inf"}


def cell(**changes):
    """A cell."""
    return Cell(**(NAMES | {"num_blocks": 1, "audit": {}} | changes))


def test_audits_have_the_columns_of_the_summary():
    assert set(bundle_layout.TABLES["audits"]) == set(summary.COLUMNS)


def test_every_column_has_a_known_type_and_a_meaning():
    for table, columns in bundle_layout.TABLES.items():
        assert f"{table}.parquet" in bundle_layout.FILES
        for kind, meaning in columns.values():
            assert kind in parquet.TYPES
            assert len(meaning) > 5
        assert set(bundle_layout.DENSE.get(table, ())) <= set(columns)


def test_cell_is_found_under_its_path():
    assert cell(epsilon="0.5").path == "digits-train200/random/sgd/eps0.5"
    assert cell().values == NAMES | {"epsilon": float("inf")}
    assert cell(epsilon="1e-05").values["epsilon"] == 1e-5


@pytest.mark.parametrize("name", ["dataset", "canary", "training", "epsilon"])
@pytest.mark.parametrize("value", ["..", "../x", "a/b", "", "a b", "/etc", "8\n"])
def test_cell_refuses_names_that_are_paths(name, value):
    with pytest.raises(ValueError, match=f"{name}: got "):
        cell(**{name: value})


def test_inside_takes_plain_names(tmp_path):
    assert inside(tmp_path, "csv/tan/digits/search0.csv") == tmp_path / "csv/tan/digits/search0.csv"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a/..", "a//b", "./a", "a/", "", ".", ".a", "a\n"]
)
def test_inside_refuses_names_that_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="expected a plain file name inside"):
        inside(tmp_path, name)


def test_inside_refuses_links_that_lead_out(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "secret").write_text("", encoding="utf-8")
    (folder / "file").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    for name in ("file", "folder/secret"):
        with pytest.raises(ValueError, match="expected a plain file name inside"):
            inside(folder, name)
