"""How the results of a bundle were made; test_bundle.py has it through whole bundles."""

import fake_results
import pytest

from metacanary import bundle_provenance, store


@pytest.fixture
def results(tmp_path):
    """The results."""
    return fake_results.write(tmp_path)


def chained(results):
    """The cells and the provenance of all results."""
    return bundle_provenance.chained(results, store.read_csv(results / bundle_provenance.SUMMARY))


def test_chained_follows_the_summary_back_to_canaries(results):
    cells, made = chained(results)
    assert [cell.path for cell in cells] == [fake_results.path_of(cell) for cell in fake_results.CELLS]
    assert [cell.num_blocks for cell in cells] == [2, 2]
    assert [dict(cell.audit) for cell in cells] == [fake_results.settings_of(cell) for cell in fake_results.CELLS]
    listed = {bundle_provenance.SUMMARY}
    for cell in cells:
        listed |= {bundle_provenance.audit_file(cell), bundle_provenance.canary_file(cell)}
        names = [f"{name}{block}" for name in ("block", "runs", "population") for block in range(2)]
        files = [path for path in (results / "scores" / cell.path).iterdir() if path.stem in names]
        listed |= {path.relative_to(results).as_posix() for path in files}
    assert made.keys() == listed
    assert all(made[name] == store.read_provenance(results / name) for name in listed)


@pytest.mark.parametrize("name", ["audits/{}/epsilon.csv", "scores/{}/block1.csv", "scores/{}/runs0.csv"])
def test_chained_refuses_a_table_of_another_config(results, name):
    path = results / name.format(fake_results.path_of(fake_results.CELLS[1]))
    store.write_csv(path, store.read_csv(path), store.read_provenance(path) | {"config_digest": "other"})
    with pytest.raises(ValueError, match=rf"{path.name}' was made with another config \(digest other, expected"):
        chained(results)


def test_chained_refuses_canaries_of_another_config(results):
    path = results / "canaries/digits-train200/mislabeled/canaries.npz"
    arrays, made = store.read_npz(path)
    store.write_npz(path, arrays, made | {"config_digest": "other"})
    with pytest.raises(ValueError, match=r"mislabeled/canaries.npz' was made with another config \(digest other"):
        chained(results)


def test_chained_needs_the_digests_of_inputs(results):
    path = results / "scores" / fake_results.path_of(fake_results.CELLS[0]) / "block0.csv"
    made = store.read_provenance(path)
    store.write_csv(path, store.read_csv(path), made | {"settings": {}})
    with pytest.raises(ValueError, match=r"provenance lacks settings.inputs.canaries, expected that of a result"):
        chained(results)


def test_read_is_the_inverse_of_grouped(results, tmp_path):
    cells, made = chained(results)
    entries = bundle_provenance.grouped(made)
    assert len(entries) < len(made)  # a block's files share one
    store.write_json(tmp_path / "bundle/provenance.json", entries)
    package = {"metacanary": {"image_shapes": {bundle_provenance.canary_file(cells[0]): [6, 4, 1]}, "extras": []}}
    assert bundle_provenance.read(tmp_path / "bundle", package, cells) == made
    package["metacanary"]["extras"] = ["summary/cost.csv"]
    with pytest.raises(ValueError, match=r"provenance.json' lacks summary/cost.csv, expected all results"):
        bundle_provenance.read(tmp_path / "bundle", package, cells)
