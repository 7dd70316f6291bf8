"""The table of scores of a cell: reference scores against loops over runs and steps, and independence of the coins."""

import numpy as np
import pandas as pd
import pytest

from metacanary import reference_scores
from metacanary.score_table import of_role, with_reference_scores

NAMES = tuple(reference_scores.MIN_REFERENCES)
ROLES = {3: "audited", 1: "surrogate", 0: "reference", 5: "audited", 4: "reference"}  # not by number, as any may be
STEPS = (10, 20)
RUNS = pd.DataFrame([{"run": run, "role": role, "step": step} for run, role in ROLES.items() for step in STEPS])


def make_scores(seed=0):
    """Base scores [12] of each run and step as a table, and by (run, step, score); rows in a random order."""
    rng = np.random.default_rng(seed)
    values, frames = {}, []
    for run in ROLES:
        included = rng.integers(0, 2, 12)
        for step in STEPS:
            for score in ("negative_loss", "logit_margin"):
                values[run, step, score] = -rng.exponential(size=12)
                columns = {"run": run, "step": step, "canary_id": np.arange(12), "included": included}
                frames.append(pd.DataFrame(columns | {"score": score, "value": values[run, step, score]}))
    return pd.concat(frames).sample(frac=1, random_state=seed), values


def make_population(seed=0):
    """Two blocks of runs, and the values [7] by (run, step)."""
    rng, values, blocks = np.random.default_rng(seed), {}, []
    for runs in ([3, 1, 0], [5, 4]):
        drawn = -rng.exponential(size=(len(runs), len(STEPS), 7))
        blocks.append({"run": np.array(runs), "step": np.array(STEPS), "log_probability": drawn})
        values |= {(run, step): drawn[i, j] for i, run in enumerate(runs) for j, step in enumerate(STEPS)}
    return blocks, values


def expected(name, run, step, base, population):
    """One score of one run, its references picked by hand."""
    losses = [base[reference, step, "negative_loss"] for reference in (0, 4)]
    if name == "relative_to_reference":
        return base[run, step, "negative_loss"] - np.mean(losses, axis=0)
    if name == "offline_lira":
        margins = [base[reference, step, "logit_margin"] for reference in (0, 4)]
        return reference_scores.offline_lira(base[run, step, "logit_margin"], margins)
    others = [population[reference, step] for reference in (0, 4)]
    own = (base[run, step, "negative_loss"], population[run, step])
    return reference_scores.rmia(*own, losses, others, gamma=2.0, offline_a=0.5)


def test_of_role_lists_runs():
    assert [of_role(RUNS, role) for role in ("audited", "surrogate", "reference")] == [{3, 5}, {1}, {0, 4}]


def test_reference_scores_equal_those_of_one_run_at_a_time():
    (scores, base), (blocks, population) = make_scores(), make_population()
    table = with_reference_scores(scores, RUNS, NAMES, population=blocks, gamma=2.0, offline_a=0.5)
    assert list(table.columns) == list(scores.columns)
    assert set(table["run"]) == {1, 3, 5}
    by_cell = {key: rows.sort_values("canary_id") for key, rows in table.groupby(["run", "step", "score"])}
    assert len(by_cell) == 3 * 2 * (2 + len(NAMES))
    coins = scores.set_index(["run", "step", "score", "canary_id"])["included"]
    for (run, step, score), rows in by_cell.items():
        wanted = base[run, step, score] if score in scores["score"].unique() else None
        wanted = expected(score, run, step, base, population) if wanted is None else wanted
        np.testing.assert_allclose(rows["value"], wanted, rtol=1e-12)
        assert rows["canary_id"].tolist() == list(range(12))
        assert rows["included"].tolist() == [coins[run, step, "negative_loss", i] for i in range(12)]


def test_no_score_looks_at_the_coins():
    scores, _ = make_scores()
    rng = np.random.default_rng(1)
    shuffled = scores.assign(included=rng.permutation(scores["included"]))
    tables = [with_reference_scores(t, RUNS, NAMES, population=make_population()[0]) for t in (scores, shuffled)]
    pd.testing.assert_series_equal(tables[0]["value"], tables[1]["value"], check_exact=True)


def test_without_reference_scores_only_the_reference_runs_are_left_out():
    scores, _ = make_scores()
    table = with_reference_scores(scores, RUNS, ["negative_loss"])
    left = scores[~scores["run"].isin([0, 4])]
    keys = ["run", "step", "score", "canary_id"]
    pd.testing.assert_frame_equal(*(frame.sort_values(keys, ignore_index=True) for frame in (table, left)))


def test_too_few_reference_runs_are_refused():
    runs = RUNS.assign(role=RUNS["role"].where(RUNS["run"] != 4, "surrogate"))
    with pytest.raises(ValueError, match="runs has 1 reference runs, expected at least 2 for offline_lira"):
        with_reference_scores(make_scores()[0], runs, ["offline_lira"])


def test_a_population_that_lacks_a_run_or_step_is_refused():
    scores, blocks = make_scores()[0], make_population()[0]
    with pytest.raises(ValueError, match=r"population lacks runs \[5\] at step 10, expected all runs and steps"):
        with_reference_scores(scores, RUNS, ["rmia"], population=blocks[:1])
    blocks[0] |= {"step": np.array([10, 30])}
    with pytest.raises(ValueError, match=r"population lacks runs \[1, 3\] at step 20"):
        with_reference_scores(scores, RUNS, ["rmia"], population=blocks)
