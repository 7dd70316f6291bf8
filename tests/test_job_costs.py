"""Seconds and memory of jobs, from benchmark files."""

import pytest

from metacanary import job_costs


@pytest.fixture
def folder(tmp_path):
    files = {"train/digits/0.tsv": (1.5, "310.25"), "train/digits/1.tsv": (2.25, "299.5"), "table.tsv": (0.5, "-")}
    for name, (seconds, memory) in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:02\t{memory}\n")
    return tmp_path


def test_by_rule_sums_seconds_and_takes_the_largest_memory(folder):
    found = job_costs.by_rule(folder).set_index("rule")
    assert found.loc["train"].to_dict() == {"jobs": 2, "seconds": 3.75, "seconds_longest": 2.25, "memory_mb": 310.25}
    assert found.loc["table"].to_dict() == {"jobs": 1, "seconds": 0.5, "seconds_longest": 0.5, "memory_mb": 0.0}


def test_by_rule_takes_the_wanted_rules_alone(folder):
    assert job_costs.by_rule(folder, ["table", "other"])["rule"].tolist() == ["table"]


def test_by_rule_of_no_folder_is_empty(tmp_path):
    found = job_costs.by_rule(tmp_path / "absent")
    assert found.empty
    assert tuple(found.columns) == job_costs.COLUMNS
