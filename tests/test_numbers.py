"""Numbers of documents: what a mark names, and what it refuses."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_tables import make_rows

from metacanary import numbers, tables

FIRST, SECOND = [0.5, 0.7, 1.2], [0.1, 0.3, 0.2]


@pytest.fixture
def results(tmp_path):
    """Published results of one experiment."""
    folder = tmp_path / "digits"
    folder.mkdir()
    kinds = [make_rows(FIRST, canary="a", pooled=1.1), make_rows(SECOND, canary="b", pooled=0.2)]
    kinds += [make_rows([9.0] * 3, canary="a", step=1)]  # of an earlier step
    frame = pd.concat(kinds)
    (folder / "epsilon.csv.gz").write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    tables.table1(frame).to_csv(folder / "table1.csv", index=False)
    made_on = {"wall_seconds_by_rule": {"train": 90.0}, "max_rss_mb": 1536.0, "device": {"kind": "cpu"}}
    (folder / "made_on.json").write_text(json.dumps(made_on))
    return tmp_path


def written(values, digits):
    """A mean and half of its interval, by scipy."""
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    return f"{np.mean(values):.{digits}f} ± {(high - low) / 2:.{digits}f}"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("digits/table1 auroc± canary=a", written([0.5 + value / 10 for value in FIRST], 3)),
        ("digits/table1 epsilon± canary=b", written(SECOND, 2)),
        ("digits/table1 epsilon_pooled canary=a", "1.10"),
        ("digits/table1 epsilon_pooled canary=a digits=1", "1.1"),
        ("digits/table1 test_accuracy canary=a", "90.0%"),
        ("digits/table1 test_accuracy canary=a digits=0", "90%"),
        ("digits/table1 num_runs canary=b", "3"),
        ("digits/table1 max(epsilon_pooled)", "1.10"),
        ("digits/table1 min(epsilon_pooled) step=150", "0.20"),
        ("digits/table1 mean(epsilon_pooled)", "0.65"),
        ("digits/epsilon auroc canary=b", "0.520"),
        ("digits/epsilon epsilon_lower± canary=a", written(FIRST, 2)),
        ("digits/epsilon epsilon_lower± canary=a minus=b", written(np.subtract(FIRST, SECOND), 2)),
        ("digits/epsilon epsilon_lower± canary=a+b", written(np.add(FIRST, SECOND) / 2, 2)),
        ("digits/epsilon epsilon_lower± canary=a+b minus=b", written(np.subtract(FIRST, SECOND) / 2, 2)),
        ("digits/epsilon epsilon_lower± canary=b minus=a+b", written(np.subtract(SECOND, FIRST) / 2, 2)),
        ("digits/made_on wall_seconds_by_rule.train unit=min digits=1", "1.5 min"),
        ("digits/made_on max_rss_mb unit=GiB digits=1", "1.5 GiB"),
    ],
)
def test_number(results, query, expected):
    assert numbers.number(query, results) == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("digits/table1", r"expected FILE QUANTITY \[COLUMN=VALUE"),
        ("../digits/table1 auroc", r"expected FILE QUANTITY \[COLUMN=VALUE"),
        ("digits/table1 auroc canary", r"expected FILE QUANTITY \[COLUMN=VALUE"),
        ("digits/table9 auroc", r"there is no .*table9\.csv"),
        ("digits/table1 auroc_mean", "2 rows match, expected one"),
        ("digits/table1 auroc_mean canary=c", "0 rows match, expected one"),
        ("digits/table1 aurocs canary=a", "there is no column aurocs"),
        ("digits/table1 auroc_mean kind=a", "there is no column kind"),
        ("digits/epsilon auroc canary=c", "0 rows match, expected one for each run"),
        ("digits/epsilon auroc canary=a+c", "0 rows match, expected one for each run"),
        ("digits/epsilon auroc", "6 rows match, expected one for each run"),
        ("digits/made_on wall.train", r"there is no key wall\.train"),
        ("digits/table1 max(auroc_mean) canary=c", "0 rows match, expected some"),
        ("digits/table1 max(auroc)±", r"expected FILE QUANTITY .*, with a QUANTITY like auroc, auroc± or max\(auroc\)"),
        ("digits/table1 auroc_mean) canary=a", r"expected FILE QUANTITY \[COLUMN=VALUE"),
        ("digits/table1 max(auroc_mean canary=a", r"expected FILE QUANTITY \[COLUMN=VALUE"),
        ("digits/epsilon max(auroc) canary=a", "averaged over runs, expected auroc or auroc±"),
        ("digits/epsilon min(auroc) canary=a", "averaged over runs, expected auroc or auroc±"),
        ("digits/made_on max(max_rss_mb)", "JSON has no rows, expected a key alone"),
        ("digits/made_on max_rss_mb±", "JSON has no rows, expected a key alone"),
        ("digits/made_on max_rss_mb canary=a", "JSON has no rows, expected a key alone"),
        ("digits/made_on max_rss_mb unit=GB", "unit: got 'GB', expected one of s, min, h, MiB, GiB"),
    ],
)
def test_number_names_what_is_wrong(results, query, message):
    with pytest.raises(ValueError, match=message):
        numbers.number(query, results)


def test_fill_renews_each_mark_and_nothing_else(results):
    runs, auroc = "<!--= digits/table1 num_runs canary=a -->", "<!--= digits/epsilon auroc canary=b -->"
    filled = numbers.fill(f"1.5 and {runs}old<!--/-->, {auroc}\n<!--/-->.", results)
    assert filled == f"1.5 and {runs}3<!--/-->, {auroc}0.520<!--/-->."
    assert numbers.fill(filled, results) == filled
