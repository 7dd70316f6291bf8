"""Publishing: what is copied, what is said of its making, and what is refused."""

import gzip
import json
import shutil

import pandas as pd
import pytest

from metacanary import documents, publish

MARK = "<!-- table digits: made by `make publish`, not by hand -->"


@pytest.fixture
def results(root, tmp_path):
    """The files of a finished workflow, as far as they are published, in a repository with a README."""
    published = root / "docs/results/digits"
    for name in publish.PUBLISHED:
        path = tmp_path / "results/digits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published / path.name if name != publish.SUMMARY else published / "epsilon.csv.gz", path)
    summary = tmp_path / "results/digits" / publish.SUMMARY
    summary.write_bytes(gzip.decompress(summary.read_bytes()))
    setup = json.loads((published / documents.SETUP).read_text())
    for name, inputs in {
        **{f"tables/{name}": {"summary": "c"} for name in ("bounds", "table1", "table2", "reproduction")},
        "figures/figure1": {"canaries": "k"},
        "figures/figure2": {"summary": "c"},
    }.items():
        settings = {"settings": (setup if name == "tables/reproduction" else {}) | {"inputs": inputs}}
        (tmp_path / f"results/digits/{name}.provenance.json").write_text(json.dumps(settings))
    made = {"device": {"kind": "cpu"}, "versions": {"jax": "1"}, "config_digest": "c"}
    made["code_digests"] = {"make_canaries": ["a"], "train_audit_models": ["b"]}
    (tmp_path / "results/digits/summary/epsilon.provenance.json").write_text(json.dumps(made))
    timed = tmp_path / "results/digits/benchmarks/train_audit_models/digits"
    timed.mkdir(parents=True)
    for block, (seconds, memory) in enumerate([(1.5, "310.25"), (2.25, "299.5")]):
        (timed / f"{block}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:02\t{memory}\n")
    (tmp_path / "results/digits/benchmarks/make_table1.tsv").write_text("s\th:m:s\tmax_rss\n0.5\t0:00:00\t-\n")
    (tmp_path / "README.md").write_text(f"above\n\n{MARK}\nold numbers\n<!-- end of table -->\n\nbelow\n")
    (tmp_path / "config").mkdir()
    shutil.copy(root / "config/published.csv", tmp_path / "config")
    return tmp_path / "results/digits"


def run(results):
    """Publishes into the repository; returns the folder of the published results."""
    root = results.parents[1]
    publish.main([str(results), "--root", str(root)])
    return root / "docs/results/digits"


def test_publish_copies_and_renews_the_documents(results):
    docs = run(results)
    for name in publish.PUBLISHED:
        copy = docs / name.split("/")[1]
        content = (
            gzip.decompress(copy.with_suffix(".csv.gz").read_bytes()) if name == publish.SUMMARY else copy.read_bytes()
        )
        assert content == (results / name).read_bytes()
    text = (docs.parents[2] / "README.md").read_text()
    assert text.startswith(f"above\n\n{MARK}\n| training")
    assert text.endswith("<!-- end of table -->\n\nbelow\n")
    assert "old numbers" not in text


def test_publish_takes_along_what_only_some_configs_ask_for(results):
    for name, inputs in (("tables/comparison_start", {"summary": "c"}), ("figures/comparison_start", {"table": "d"})):
        (results / f"{name}.provenance.json").write_text(
            json.dumps({"config_digest": "d", "settings": {"inputs": inputs}})
        )
    for name in ("tables/comparison_start.csv", "tables/comparison_start.md", "figures/comparison_start.png"):
        (results / name).write_text(name)
    docs = run(results)
    assert (docs / "comparison_start.csv").read_text() == "tables/comparison_start.csv"
    assert (docs / "comparison_start.png").read_text() == "figures/comparison_start.png"
    other = json.dumps({"settings": {"inputs": {"table": "another"}}})
    (results / "figures/comparison_start.provenance.json").write_text(other)
    with pytest.raises(ValueError, match=r"comparison_start\.png"):
        run(results)


def test_publish_keeps_how_the_experiment_was_set_up(results, root):
    docs = run(results)
    assert (docs / documents.SETUP).read_text() == (root / "docs/results/digits" / documents.SETUP).read_text()


def test_publish_makes_the_comparison_anew(results):
    """From the published summary and the published numbers, whatever an earlier workflow wrote."""
    content = (results / publish.REPRODUCTION).read_text()
    (results / publish.REPRODUCTION).write_text("of older published numbers")
    assert (run(results) / "reproduction.csv").read_text() == content


def test_publish_numbers_alone_touches_no_results(results):
    root = results.parents[1]
    docs = run(results)
    (root / "README.md").write_text("<!--= digits/table1 max(num_runs) --><!--/-->")
    (docs / "table1.csv").write_text((docs / "table1.csv").read_text())
    before = (docs / "made_on.json").read_bytes()
    shutil.rmtree(results)
    publish.main(["--numbers", "--root", str(root)])
    assert (root / "README.md").read_text().endswith(f"-->{pd.read_csv(docs / 'table1.csv')['num_runs'].max()}<!--/-->")
    assert (docs / "made_on.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [[], ["results/digits", "--numbers"]])
def test_publish_takes_results_or_numbers(arguments, capsys):
    with pytest.raises(SystemExit):
        publish.main(arguments)
    assert "expected either results or --numbers" in capsys.readouterr().err


def test_publish_says_on_what_and_with_what_code_results_were_made(results):
    made_on = json.loads((run(results) / "made_on.json").read_text())
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
    assert not (results.parents[1] / "docs").exists()


@pytest.mark.parametrize("name", ["tables/bounds.csv", "tables/reproduction.csv", "figures/figure2.png"])
def test_publish_refuses_what_was_made_of_another_summary(results, name):
    """As a table that an earlier config left."""
    path = (results / name).with_suffix(".provenance.json")
    path.write_text(path.read_text().replace('"summary": "c"', '"summary": "old"'))
    with pytest.raises(ValueError, match=rf"{name}' was made with another config \(digest old, expected c\)"):
        run(results)
    assert not (results.parents[1] / "docs").exists()


def test_publish_twice_changes_nothing(results):
    def files(docs):
        return {path: path.read_bytes() for path in [docs.parents[2] / "README.md", *docs.iterdir()]}

    assert files(run(results)) == files(run(results))


def test_publish_refuses_unfinished_results(results):
    (results / "tables/table2.md").unlink()
    with pytest.raises(ValueError, match=r"lacks tables/table2\.md"):
        run(results)
    assert not (results.parents[1] / "docs").exists()


@pytest.mark.parametrize("names", [publish.METASMOOTHNESS, publish.TAN])
def test_publish_copies_an_experiment_without_audits(results, names):
    for name in names:
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(f"the text of {name}\n")
    made = json.loads((results / "summary/epsilon.provenance.json").read_text())
    (results / names[1]).write_text(json.dumps(made | {"config_digest": "m"}))
    figure = (results / names[-1]).with_suffix(".provenance.json")
    figure.write_text(json.dumps({"settings": {"inputs": {"table": "m"}}}))
    (results / publish.PUBLISHED[0]).unlink()
    (results.parents[1] / "README.md").write_text("no table")
    docs = run(results)
    assert sorted(path.name for path in docs.iterdir()) == sorted(
        ["made_on.json", *(name.split("/")[1] for name in names)]
    )
    assert json.loads((docs / "made_on.json").read_text())["config_digest"] == "m"
    figure.write_text(json.dumps({"settings": {"inputs": {"table": "old"}}}))
    with pytest.raises(ValueError, match=rf"{names[-1]}' was made with another config"):
        run(results)
