"""Bundles: written, checked, restored."""

import json
import pickle
import re
import shutil
from pathlib import Path

import fake_results
import numpy as np
import pandas as pd
import pytest

from metacanary import bundle, bundle_layout, bundle_package, parquet, store


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Results and their bundle."""
    folder = tmp_path_factory.mktemp("bundled")
    results = fake_results.write(folder / "results")
    bundle.write(results, folder / "bundle", config=fake_results.CONFIG, also=fake_results.ALSO)
    return folder


@pytest.fixture
def results(made, tmp_path):
    """A copy of the results, to be changed."""
    return Path(shutil.copytree(made / "results", tmp_path / "results"))


@pytest.fixture
def bundled(made, tmp_path):
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))


def contents(folder):
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(bundled, table, **changes):
    """Changes columns of a table of a bundle, and renews the checksums, as one would who meant to deceive."""
    path, types = bundled / f"{table}.parquet", bundle_layout.types(table)
    parquet.write(path, [parquet.read(path, types).assign(**changes)], types)
    bundle_package.write_sums(bundled)


def test_restore_gives_every_file_back_byte_for_byte(made, tmp_path):
    bundle.restore(made / "bundle", tmp_path / "restored")
    assert contents(tmp_path / "restored") == contents(made / "results")


def test_restore_writes_in_the_order_of_the_workflow(made, tmp_path):
    """What is made of another file is not older than it, or the workflow would make it again."""
    bundle.restore(made / "bundle", tmp_path)
    path = fake_results.path_of(fake_results.CELLS[0])
    order = ["canaries/digits-train200/random/canaries.npz", f"scores/{path}/block0.csv", f"audits/{path}/epsilon.csv"]
    order += ["summary/epsilon.csv", "summary/cost.csv"]
    times = [(tmp_path / name).stat().st_mtime_ns for name in order]
    assert times == sorted(times)
    for cell in map(fake_results.path_of, fake_results.CELLS):
        scores = max(path.stat().st_mtime_ns for path in (tmp_path / "scores" / cell).iterdir())
        assert (tmp_path / "audits" / cell / "epsilon.csv").stat().st_mtime_ns >= scores


@pytest.mark.parametrize("epsilons", [("8", "4"), ("8", "0.5"), ("inf", "1e+06")])
def test_restore_prints_epsilon_as_it_was(tmp_path, epsilons):
    """pandas prints 8 in a column of whole numbers, and 8.0 beside an infinity or a fraction."""
    cells = [fake_results.CELLS[1] | {"epsilon": epsilon} for epsilon in epsilons]
    results = fake_results.write(tmp_path / "results", cells=cells)
    bundle.write(results, tmp_path / "bundle", config={})
    bundle.restore(tmp_path / "bundle", tmp_path / "restored")
    summary = (tmp_path / "restored/summary/epsilon.csv").read_bytes()
    assert summary == (results / "summary/epsilon.csv").read_bytes()
    assert (b",8.0," in summary) == (epsilons == ("8", "0.5"))


def test_write_gives_the_same_bytes_again(made, results, tmp_path):
    (tmp_path / "bundle").mkdir()
    for _ in range(2):  # the second time over the first
        bundle.write(results, tmp_path / "bundle", config=fake_results.CONFIG, also=fake_results.ALSO)
        assert contents(tmp_path / "bundle") == contents(made / "bundle")


def test_bundle_of_restored_results_is_the_same(made, tmp_path):
    bundle.restore(made / "bundle", tmp_path / "results")
    bundle.write(tmp_path / "results", tmp_path / "again", config=fake_results.CONFIG, also=fake_results.ALSO)
    assert contents(tmp_path / "again") == contents(made / "bundle")


def test_scores_are_those_of_all_cells(made):
    """Read without this package, as others will."""
    scores = pd.read_parquet(made / "bundle/scores.parquet")
    for cell in fake_results.CELLS:
        base = made / "results/scores" / fake_results.path_of(cell)
        expected = pd.concat([pd.read_csv(base / f"block{block}.csv") for block in range(2)])
        own = scores[(scores["training"] == cell["training"]) & (scores["epsilon"] == float(cell["epsilon"]))]
        assert len(own) == len(expected) == 4 * 2 * 2 * fake_results.NUM_CANARIES
        for name in ("run", "step", "canary_id", "included", "score", "value"):
            assert own[name].tolist() == expected[name].tolist()
        assert own["role"].tolist() == [fake_results.ROLES[run] for run in own["run"]]


def test_canaries_are_exact(made):
    """Read without this package, as others will."""
    rows = pd.read_parquet(made / "bundle/canaries.parquet")
    assert rows["canary"].unique().tolist() == ["random", "mislabeled", "noise"]
    shapes = store.read_json(made / "bundle/datapackage.json")["metacanary"]["image_shapes"]
    for kind, own in rows.groupby("canary"):
        name = f"canaries/digits-train200/{kind}/canaries.npz"
        arrays, _ = store.read_npz(made / "results" / name)
        images = np.stack([row.reshape(shapes[name]) for row in own["image"]])
        assert images.dtype == np.float32
        assert np.array_equal(images, arrays["images"])
        assert own["label"].tolist() == arrays["label"].tolist()


def test_package_describes_every_file(made):
    package = store.read_json(made / "bundle/datapackage.json")
    described = {resource["path"] for resource in package["resources"]}
    apart = {bundle_layout.PACKAGE, bundle_layout.SUMS, bundle_layout.DATASHEET}
    assert described == set(bundle_package.files(made / "bundle")) - apart
    (scores,) = (r for r in package["resources"] if r["name"] == "scores.parquet")
    assert scores["rows"] == len(pd.read_parquet(made / "bundle/scores.parquet"))
    assert [field["name"] for field in scores["schema"]["fields"]] == list(bundle_layout.TABLES["scores"])
    assert package["sources"][0]["licence"] == "CC BY 4.0"
    assert json.loads((made / "bundle/config.json").read_text(encoding="utf-8")) == fake_results.CONFIG


def test_config_keeps_the_order_of_its_keys(made):
    """Which is that of cells."""
    assert list(store.read_json(made / "bundle/config.json")["trainings"]) == ["sgd", "dpsgd"]


def test_check_recomputes_every_audit(made):
    found = bundle.check(made / "bundle")
    assert found.endswith("bounds were recomputed from its scores to the last bit")
    assert f"{len(pd.read_csv(made / 'results/summary/epsilon.csv'))} bounds" in found


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("audits", {"epsilon_lower": lambda rows: rows["epsilon_lower"] + 0.01}),
        ("audits", {"protocol": "fixed"}),
        ("scores", {"included": lambda rows: 1 - rows["included"]}),
        ("scores", {"value": lambda rows: -rows["value"]}),
        ("runs", {"test_accuracy": 0.5}),
        ("runs", {"noise_multiplier": 0.9}),
        ("population", {"log_probability": lambda rows: [values[::-1] - 2.0 for values in rows["log_probability"]]}),
    ],
)
def test_check_finds_audits_that_are_not_of_the_scores(bundled, table, changes):
    change(bundled, table, **changes)
    bundle.verify(bundled)  # checksums are right
    with pytest.raises(ValueError, match=r"audits: \w+ is .*, expected .* from the scores"):
        bundle.check(bundled)


def test_every_changed_byte_is_found(bundled, tmp_path):
    for name in bundle_package.files(bundled):
        path, whole = bundled / name, (bundled / name).read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=r"SHA-256|plain file name|not list|is missing"):
            bundle.verify(bundled)
        path.write_bytes(whole)
    (bundled / "scores.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="has the SHA-256"):
        bundle.restore(bundled, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def edit_package(bundled, edit):
    """Changes what datapackage.json says for this package, and renews the checksums."""
    package = store.read_json(bundled / "datapackage.json")
    edit(package["metacanary"])
    store.write_json(bundled / "datapackage.json", package)
    bundle_package.write_sums(bundled)


def test_audits_of_no_cell_are_refused(bundled, tmp_path):
    """They would pass for recomputed, having no scores to be compared with."""
    types = bundle_layout.types("audits")
    audits = parquet.read(bundled / "audits.parquet", types)
    invented = audits[audits["canary"] == "random"].assign(training="secret", epsilon_lower=99.0)
    parquet.write(bundled / "audits.parquet", [audits, invented], types)
    bundle_package.write_sums(bundled)
    message = r"audits: there are rows of \('digits-train200', 'random', 'secret', inf\), expected those of the bundle"
    with pytest.raises(ValueError, match=message):
        bundle.check(bundled)
    with pytest.raises(ValueError, match=message):
        bundle.restore(bundled, tmp_path / "restored")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda own: own["cells"].clear(), r"cells: got \[\], expected one or more"),
        (lambda own: own["cells"].pop(), "audits: there are rows of .*'mislabeled', 'dpsgd', 8.0"),
        (lambda own: own["cells"].append(own["cells"][0]), "cells: got .* expected one or more, each once"),
        (lambda own: own["cells"][0]["audit"].update(significance=0.5), "made with .*, expected .* as in datapackage"),
        (lambda own: own["cells"][0]["audit"].update(foo=1), "unexpected keyword argument 'foo'"),
        (lambda own: own["cells"][0]["audit"].update(scores=None), "audit.scores of .*: got None, expected a setting"),
    ],
)
def test_other_cells_than_those_that_were_audited_are_refused(bundled, tmp_path, capsys, edit, message):
    edit_package(bundled, edit)
    for arguments in (["check", bundled], ["restore", bundled, tmp_path / "restored"]):
        assert bundle.main(list(map(str, arguments))) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert not (tmp_path / "restored").exists()


def test_tables_with_other_columns_are_refused(bundled):
    types = bundle_layout.types("scores")
    scores = parquet.read(bundled / "scores.parquet", types)
    parquet.write(bundled / "scores.parquet", [scores], {name: types[name] for name in ("run", "value")})
    bundle_package.write_sums(bundled)
    with pytest.raises(ValueError, match=r"scores.parquet' has columns run \(int64\), value \(double\), expected"):
        bundle.verify(bundled)


def test_provenance_of_every_result_is_required(bundled, tmp_path):
    entries = store.read_json(bundled / "provenance.json")
    store.write_json(bundled / "provenance.json", [e for e in entries if "summary/epsilon.csv" not in e["files"]])
    bundle_package.write_sums(bundled)
    with pytest.raises(ValueError, match=r"provenance.json' lacks summary/epsilon.csv"):
        bundle.restore(bundled, tmp_path / "restored")


@pytest.mark.parametrize("entries", [[{}], {}, None, [1], [{"files": ["summary/epsilon.csv"], "provenance": 1}]])
def test_provenance_of_another_form_is_explained_in_one_line(bundled, tmp_path, capsys, entries):
    store.write_json(bundled / "provenance.json", entries)
    bundle_package.write_sums(bundled)
    for arguments in (["check", bundled], ["restore", bundled, tmp_path / "restored"]):
        assert bundle.main(list(map(str, arguments))) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: path='.*provenance.json' (is .*, expected objects with|lacks summary/).*\n", error)


def test_restore_leaves_other_results_alone(made, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty, expected a new or an empty folder"):
        bundle.restore(made / "bundle", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_restore_follows_no_link_out_of_the_bundle(bundled, tmp_path):
    outside = tmp_path / "outside.csv"
    shutil.move(bundled / "csv/summary/cost.csv", outside)
    (bundled / "csv/summary/cost.csv").symlink_to(outside)
    with pytest.raises(ValueError, match="expected a plain file name inside"):
        bundle.restore(bundled, tmp_path / "restored")


def test_nothing_is_pickled_or_unpickled(results, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("pickled or unpickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    bundle.write(results, tmp_path / "bundle", config={}, also=fake_results.ALSO)
    bundle.check(tmp_path / "bundle")
    bundle.restore(tmp_path / "bundle", tmp_path / "restored")


def test_write_refuses_an_edited_table_and_leaves_no_bundle(results, tmp_path):
    """Its floats would come back with other digits."""
    path = results / "summary/epsilon.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(",0.0,", ",0.00,", 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"summary/epsilon.csv' would not come back byte for byte"):
        bundle.write(results, tmp_path / "bundle", config={})
    assert bundle_package.files(tmp_path / "bundle") == []


def test_write_refuses_results_of_another_config(results, tmp_path):
    name = f"scores/{fake_results.path_of(fake_results.CELLS[0])}/runs1.csv"
    store.write_csv(results / name, store.read_csv(results / name), fake_results.provenance("other"))
    with pytest.raises(ValueError, match=rf"{name}' was made with another config \(digest other"):
        bundle.write(results, tmp_path / "bundle", config={})


def test_write_refuses_canaries_of_another_config(results, tmp_path):
    """Scores are of the canaries that were there when models were scored."""
    name = "canaries/digits-train200/random/canaries.npz"
    arrays, made = store.read_npz(results / name)
    store.write_npz(results / name, arrays | {"images": 1 - arrays["images"]}, made | {"config_digest": "other"})
    with pytest.raises(ValueError, match=rf"{name}' was made with another config \(digest other, expected canaries"):
        bundle.write(results, tmp_path / "bundle", config={})
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"thesis.tex": "mine"}, "holds thesis.tex, which this bundle has not; delete it first"),
        ({"thesis.tex": "mine", "SHA256SUMS": "precious"}, "has the line 'precious', expected a SHA-256"),
        ({"SHA256SUMS": f"{'0' * 64}  thesis.tex\n"}, "holds thesis.tex, which this bundle has not; delete it first"),
        ({"config.json": "{}"}, "holds config.json, which no SHA256SUMS lists, expected an empty folder or a bundle"),
        ({"config.json": "{}", "SHA256SUMS": ""}, "holds config.json, which no SHA256SUMS lists, expected an empty"),
    ],
)
def test_write_leaves_a_folder_with_other_files_alone(results, tmp_path, files, message):
    (tmp_path / "bundle").mkdir()
    for name, text in files.items():
        (tmp_path / "bundle" / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        bundle.write(results, tmp_path / "bundle", config={})
    assert contents(tmp_path / "bundle") == {name: text.encode() for name, text in files.items()}


def test_write_leaves_a_whole_bundle_alone_if_results_are_refused(results, bundled):
    (results / f"audits/{fake_results.path_of(fake_results.CELLS[1])}/epsilon.csv").unlink()
    store.write_json(results / f"audits/{fake_results.path_of(fake_results.CELLS[1])}/epsilon.provenance.json", {})
    before = contents(bundled)
    with pytest.raises(ValueError, match="was made with another config"):
        bundle.write(results, bundled, config=fake_results.CONFIG, also=fake_results.ALSO)
    assert contents(bundled) == before


def test_write_deletes_nothing_outside_of_the_folder(results, tmp_path):
    (tmp_path / "mine.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a plain file name inside"):
        bundle.write(results, tmp_path / "bundle", config={}, also=["../../mine.csv"])
    assert (tmp_path / "mine.csv").exists()


def test_write_names_a_missing_result(results, tmp_path):
    name = f"scores/{fake_results.path_of(fake_results.CELLS[1])}/population0.npz"
    (results / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        bundle.write(results, tmp_path / "bundle", config={})


def test_main_checks_and_restores(made, tmp_path, capsys):
    assert bundle.main(["check", str(made / "bundle")]) == 0
    assert "to the last bit" in capsys.readouterr().out
    assert bundle.main(["restore", str(made / "bundle"), str(tmp_path / "results")]) == 0
    assert "--configfile" in capsys.readouterr().out
    assert (tmp_path / "results/summary/epsilon.csv").exists()


def test_main_explains_an_error_in_one_line(bundled, tmp_path, capsys):
    (bundled / "scores.parquet").unlink()
    for arguments in (["check", bundled], ["restore", bundled, tmp_path / "results"], ["check", tmp_path / "absent"]):
        assert bundle.main(list(map(str, arguments))) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
