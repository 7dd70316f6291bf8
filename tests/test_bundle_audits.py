"""The audits of a bundle, made again from its scores."""

import fake_results
import numpy as np
import pandas as pd
import pytest

from metacanary import bundle_audits, store
from metacanary.bundle_layout import Cell


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    """A cell with its audits, scores, runs and population."""
    results, names = fake_results.write(tmp_path_factory.mktemp("results")), fake_results.CELLS[1]
    base, path = results / "scores" / fake_results.path_of(names), fake_results.path_of(names)
    cell = Cell(**names, num_blocks=2, audit=fake_results.settings_of(names))
    scores, runs = (
        pd.concat([store.read_csv(base / f"{name}{block}.csv") for block in range(2)], ignore_index=True)
        for name in ("block", "runs")
    )
    population = [store.read_npz(base / f"population{block}.npz")[0] for block in range(2)]
    audits = store.read_csv(results / "audits" / path / "epsilon.csv").astype({"run": str})
    return cell, audits, (scores, runs, population)


def test_recompute_gives_the_audits(game):
    cell, audits, scored = game
    calls = []
    recomputed = bundle_audits.recompute(*scored, cell, on_audit=lambda: calls.append(1))
    assert bundle_audits.compare(audits, recomputed, cell) == 0
    assert len(calls) == bundle_audits.count(scored[1], cell) == 2 * 2 * 2  # steps, scores, protocols


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foo": 1}, "audit of .*: got .*, expected settings of audits: .* unexpected keyword argument 'foo'"),
        ({"guess_fraction": "1"}, "audit of .*: got .*, expected settings of audits"),
        ({"delta": None}, "audit.delta of .*: got None, expected a setting of audits"),
        ({"scores": "negative_loss"}, "audit.scores of .*: got 'negative_loss', expected"),
        ({"protocols": [["fixed"]]}, r"audit.protocols of .*: got \[\['fixed'\]\], expected"),
        ({"game": 1}, "game is 1, expected"),
    ],
)
def test_settings_are_those_of_audits(changes, message):
    names = fake_results.CELLS[1]
    audit = fake_results.settings_of(names)
    assert bundle_audits.settings(Cell(**names, num_blocks=2, audit=audit)).delta == 1e-5
    with pytest.raises(ValueError, match=message):
        bundle_audits.settings(Cell(**names, num_blocks=2, audit=audit | changes))


def test_recompute_depends_on_the_scores(game):
    cell, audits, (scores, runs, population) = game
    turned = scores.assign(value=-scores["value"])
    recomputed = bundle_audits.recompute(turned, runs, population, cell)
    with pytest.raises(ValueError, match=r"audits: \w+ is .* expected .* from the scores"):
        bundle_audits.compare(audits, recomputed, cell)


@pytest.mark.parametrize("column", ["epsilon_lower", "auroc", "num_correct", "protocol", "test_accuracy"])
def test_compare_finds_a_changed_value(game, column):
    cell, audits, _ = game
    changed = audits.copy()
    old = audits.loc[5, column]
    changed.loc[5, column] = "corrected" if isinstance(old, str) else old + 1
    with pytest.raises(ValueError, match=f"audits: {column} is .* at .*'protocol': "):
        bundle_audits.compare(changed, audits, cell)


def test_compare_finds_missing_rows_and_values(game):
    cell, audits, _ = game
    with pytest.raises(ValueError, match=f"got {len(audits) - 1} rows, expected {len(audits)}"):
        bundle_audits.compare(audits[1:], audits, cell)
    with pytest.raises(ValueError, match="audits: auroc is nan"):
        bundle_audits.compare(audits.assign(auroc=[np.nan, *audits["auroc"][1:]]), audits, cell)


def test_compare_allows_rounding_and_tells_of_it(game):
    cell, audits, _ = game
    rounded = audits.assign(ceiling=audits["ceiling"] * (1 + 1e-12))
    assert 1e-13 < bundle_audits.compare(rounded, audits, cell) < 1e-11
    with pytest.raises(ValueError, match="audits: ceiling is"):
        bundle_audits.compare(audits.assign(ceiling=audits["ceiling"] * (1 + 1e-8)), audits, cell)
