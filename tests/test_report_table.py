"""The page's table: its texts are the published tables', and every audit is in it."""

import json

import pytest
import report_results

from metacanary import report_data, report_table, table_formats, tables


@pytest.fixture(scope="module")
def audits():
    return report_data.every_audit(report_results.frame())


@pytest.fixture(scope="module")
def rows(audits):
    return report_table.text_rows(audits)


def cell(row, key):
    return row[[column.key for column in report_table.COLUMNS].index(key)]


def test_text_rows_read_as_the_published_tables(rows):
    table = tables.table1(report_results.frame(), protocol="fixed")
    printed = table_formats.printed(table)
    wanted = {"auditor": "steinke", "protocol": "fixed", "score": "negative_loss"}
    found = [row for row in rows if all(cell(row, key) == value for key, value in wanted.items())]
    assert len(found) == len(printed) == 4
    headers = {"pooled": "ε\npooled", "mean": "ε\nmean", "median": "ε\nmedian", "ceiling": "ceiling\n(pooled)"}
    headers |= {"auroc": "AUROC\nmean", "accuracy": "test\naccuracy", "canary": "canary", "training": "training"}
    for key, header in headers.items():
        assert [cell(row, key) for row in found] == printed[header].tolist()
    assert {cell(row, "coins") for row in found} == {"30 (90)"}


def test_text_rows_say_that_the_paper_protocol_is_no_bound(rows, audits):
    labels = [cell(row, "protocol") for row in rows]
    assert labels == ["paper (not a bound)" if name == "paper" else name for name in audits["protocol"]]
    assert "paper (not a bound)" in labels


def test_text_rows_list_single_runs(rows, audits, monkeypatch):
    for row, bounds in zip(rows, audits["by_run"], strict=True):
        assert row[report_table.SINGLE_RUNS] == ", ".join(f"{bound:.2f}" for bound in bounds)
    monkeypatch.setattr(report_table, "MAX_SINGLE_RUNS", audits["num_runs"].sum() - 1)
    assert {row[report_table.SINGLE_RUNS] for row in report_table.text_rows(audits)} == {""}


def test_filters_have_every_value_and_only_columns_that_vary(rows):
    found = {each.key: each for each in report_table.filters(rows, {"auditor": "steinke", "score": "absent"})}
    assert "dataset" not in found
    assert found["canary"].values == ["random", report_results.HOSTILE]
    assert found["epsilon"].values == ["∞", "8"]
    assert (found["auditor"].default, found["score"].default, found["canary"].default) == ("steinke", "", "")


def test_selected_are_the_rows_of_the_defaults(rows):
    chosen = report_table.filters(rows, {"auditor": "steinke", "protocol": "fixed", "score": "negative_loss"})
    found = report_table.selected(rows, chosen)
    assert len(found) == 4
    assert {(cell(row, "auditor"), cell(row, "protocol"), cell(row, "score")) for row in found} == {
        ("steinke", "fixed", "negative_loss")
    }


def test_shown_leaves_out_a_data_set_that_is_the_same_everywhere(rows):
    keys = [report_table.COLUMNS[place].key for place in report_table.shown(rows)]
    assert "dataset" not in keys
    assert {"score", "assumption", "protocol", "ceiling", "coins"} <= set(keys)


def test_payload_gives_back_every_row(rows):
    text = report_table.payload(rows)
    assert "<" not in text
    data = json.loads(text)
    assert [[data["texts"][place] for place in row] for row in data["rows"]] == rows
    assert len(set(data["texts"])) == len(data["texts"])
