"""Publishing: the README's tables are those of docs/results, which are those of the workflow."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from metacanary import publish


@pytest.fixture
def results(tmp_path):
    """The files of a finished workflow, as far as they are published."""
    for name in publish.PUBLISHED:
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {path.name}\n")
    made = {"device": {"kind": "cpu"}, "versions": {"jax": "1"}, "config_digest": "c"}
    made["code_digests"] = {"make_canaries": ["a"], "train_audit_models": ["b"]}
    (tmp_path / "results/summary/epsilon.provenance.json").write_text(json.dumps(made))
    timed = tmp_path / "results/benchmarks/train_audit_models/digits"
    timed.mkdir(parents=True)
    for block, (seconds, memory) in enumerate([(1.5, "310.25"), (2.25, "299.5")]):
        (timed / f"{block}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:02\t{memory}\n")
    (tmp_path / "results/benchmarks/make_table1.tsv").write_text("s\th:m:s\tmax_rss\n0.5\t0:00:00\t-\n")
    (tmp_path / "README.md").write_text(f"above\n\n{publish.START}\nold numbers\n{publish.END}\n\nbelow\n")
    return tmp_path / "results"


def run(results):
    root = results.parent
    publish.main([str(results), "--docs", str(root / "docs"), "--readme", str(root / "README.md")])
    return root


def test_publish_copies_and_renews_the_readme(results):
    root = run(results)
    for name in publish.PUBLISHED:
        copy = root / "docs" / name.split("/")[1]
        content = (
            gzip.decompress(copy.with_suffix(".csv.gz").read_bytes()) if name == publish.SUMMARY else copy.read_bytes()
        )
        assert content == (results / name).read_bytes()
    text = (root / "README.md").read_text()
    assert text.startswith(f"above\n\n{publish.START}\n\nthe text of table1.md\n\nthe text of table2.md\n\n")
    assert text.endswith(f"{publish.END}\n\nbelow\n")
    assert "old numbers" not in text


def test_publish_says_on_what_and_with_what_code_results_were_made(results):
    made_on = json.loads((run(results) / "docs/made_on.json").read_text())
    assert made_on["wall_seconds_by_rule"] == {"make_table1": 0.5, "train_audit_models": 3.75}
    assert made_on["wall_seconds"] == 4.25
    assert made_on["max_rss_mb"] == 310.25
    assert made_on["device"] == {"kind": "cpu"}
    assert made_on["code_digests"] == {"make_canaries": "a", "train_audit_models": "b"}


def test_publish_refuses_results_of_mixed_code(results):
    made = json.loads((results / "summary/epsilon.provenance.json").read_text())
    made["code_digests"]["train_audit_models"].append("c")
    (results / "summary/epsilon.provenance.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="more than one state of the code of train_audit_models;"):
        run(results)
    assert not (results.parent / "docs").exists()


def test_publish_twice_changes_nothing(results):
    first = (run(results) / "README.md").read_bytes()
    assert (run(results) / "README.md").read_bytes() == first


def test_publish_refuses_unfinished_results(results):
    (results / "tables/table2.md").unlink()
    with pytest.raises(ValueError, match=r"lacks tables/table2\.md"):
        run(results)
    assert not (results.parent / "docs").exists()


def test_publish_refuses_a_readme_without_a_place(results):
    (results.parent / "README.md").write_text("no place")
    with pytest.raises(ValueError, match="expected the lines"):
        run(results)


def test_readme_shows_the_published_results(root):
    """The README of this repository holds the tables of docs/results/digits and no others."""
    text = (root / "README.md").read_text(encoding="utf-8")
    assert publish.with_tables(text, root / "docs/results/digits") == text


@pytest.mark.parametrize("names", [publish.METASMOOTHNESS, publish.TAN])
def test_publish_copies_an_experiment_without_audits_and_leaves_the_readme_alone(results, names):
    for name in names:
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(f"the text of {name}\n")
    made = json.loads((results / "summary/epsilon.provenance.json").read_text())
    (results / names[1]).write_text(json.dumps(made | {"config_digest": "m"}))
    (results / publish.PUBLISHED[0]).unlink()
    root = run(results)
    assert sorted(path.name for path in (root / "docs").iterdir()) == sorted(
        ["made_on.json", *(name.split("/")[1] for name in names)]
    )
    assert json.loads((root / "docs/made_on.json").read_text())["config_digest"] == "m"
    assert "old numbers" in (root / "README.md").read_text()


def test_auditing_document_has_the_published_aurocs():
    """Its table of scores, from the published summary."""
    root = Path(__file__).parent.parent
    table = pd.read_csv(root / "docs/results/digits/epsilon.csv.gz")
    wanted = (table["run"] != "pooled") & (table["auditor"] == "steinke") & (table["protocol"] == "fixed")
    last = table[wanted & (table["step"] == table.groupby("training")["step"].transform("max"))]
    means = last.groupby(["training", "canary", "score"])["auroc"].mean()
    text = (root / "docs/auditing.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| training | canary | `negative_loss` | `offline_lira` |\n|---|---|---|---|\n")
    rows = [row.strip("| ").split(" | ") for row in rest.split("\n\n")[0].splitlines()]
    assert len(rows) == 4
    for training, canary, *printed in rows:
        found = [means[training, canary, score] for score in ("negative_loss", "offline_lira")]
        assert [f"{value:.3f}" for value in found] == printed
