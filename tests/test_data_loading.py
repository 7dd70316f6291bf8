"""Tests of benchmarks.data_loading."""

import fake_archives
import pandas as pd
import pytest

from benchmarks import data_loading, tables
from metacanary import data
from metacanary.source import Archive


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A data_dir with the archive of a tiny data set."""
    arrays = fake_archives.make_arrays()
    monkeypatch.setitem(
        data.SOURCES, "tiny", fake_archives.registered("cifar10", arrays, [Archive(file_name="tiny.tar.gz")])
    )
    fake_archives.write_cifar10(tmp_path / "downloads/manual/tiny.tar.gz", arrays)
    return tmp_path


def test_measured_loads_the_same_images_in_every_way(prepared):
    tasks = [task for task in data_loading.TASKS if "subset" not in task]
    rows = [data_loading.measured(task, "tiny", prepared) for task in tasks]
    assert [row["num_images"] for row in rows] == [24] * len(tasks)
    assert all(row["seconds"] > 0 and row["peak_rss_mib"] > 10 for row in rows)


@pytest.fixture(scope="module")
def committed():
    """The published table."""
    return pd.read_csv(data_loading.RESULTS)


def test_committed_results_keep_what_is_promised(committed):
    assert committed["task"].tolist() == list(data_loading.TASKS)
    assert committed.columns.tolist() == data_loading.COLUMNS
    for task, (_, seconds, mib) in data_loading.TASKS.items():
        (row,) = committed[committed["task"] == task].to_dict("records")
        assert row["seconds"] <= (seconds or float("inf"))
        assert row["peak_rss_mib"] <= (mib or float("inf"))


def test_readme_holds_the_committed_results(committed):
    text = tables.README.read_text(encoding="utf-8")
    assert tables.filled(text, {"data_loading": tables.loading(committed)}) == text, "run `python -m benchmarks.tables`"
