"""Seconds and memory of jobs, from benchmark files."""

import pytest

from metacanary import job_costs

WRITTEN = {
    "train/digits/0.tsv": (1.5, "310.25"),
    "train/digits/1.tsv": (2.25, "299.5"),
    "train/removed/0.tsv": (100.0, "9000"),
    "table.tsv": (0.5, "-"),
}


@pytest.fixture
def folder(tmp_path):
    for name, (seconds, memory) in WRITTEN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:02\t{memory}\n")
    return tmp_path


def test_by_rule_sums_seconds_and_takes_the_largest_memory(folder):
    """Of the files that are named, and no others below the same folder."""
    files = {"train": [folder / f"train/digits/{block}.tsv" for block in range(2)], "table": [folder / "table.tsv"]}
    found = job_costs.by_rule(files).set_index("rule")
    assert found.loc["train"].to_dict() == {"jobs": 2, "seconds": 3.75, "seconds_longest": 2.25, "memory_mb": 310.25}
    assert found.loc["table"].to_dict() == {"jobs": 1, "seconds": 0.5, "seconds_longest": 0.5, "memory_mb": 0.0}


def test_jobs_are_all_below_a_folder(folder):
    rules = [rule for rule, _ in job_costs.jobs(folder)]
    assert rules == ["table", "train", "train", "train"]
    assert sum(float(job["s"]) for _, job in job_costs.jobs(folder)) == 104.25


def test_by_rule_of_no_files_is_empty(tmp_path):
    found = job_costs.by_rule({"train": [tmp_path / "absent.tsv"], "table": []})
    assert found.empty
    assert tuple(found.columns) == job_costs.COLUMNS
