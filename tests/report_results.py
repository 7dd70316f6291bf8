"""Small results for the tests of the report page: two canary kinds, one of a hostile name, in two trainings."""

import functools

import numpy as np
import pandas as pd

from metacanary import report_data, report_page, summary
from metacanary.canaries import Canaries

HOSTILE = "<b>\"x\"&'y'</b>"  # a name that would be markup
KINDS = ("random", HOSTILE)
TRAININGS = (("sgd", np.inf, 0.0), ("dpsgd", 8.0, 2.0))
NUM_CANARIES, NUM_RUNS, STEPS = 30, 3, (5, 10)
PROVENANCE = {
    "config_digest": "c0ffee",
    "code_digests": {"train": ["a", "b"]},
    "versions": {"metacanary": "0.1.0", "numpy": "2.0"},
    "device": {"kind": "cpu", "count": 1, "cpu": "A <fast> one", "cores": 2},
}
FACTS = report_page.Facts(
    experiment="try <1> & 2",
    seed=3,
    delta=1e-5,
    significance=0.05,
    score="negative_loss",
    auditor="steinke",
    protocol="fixed",
    provenance=PROVENANCE,
)
COSTS = pd.DataFrame(
    {
        "rule": ["a", "b"],
        "jobs": [1, 2],
        "seconds": [9.0, 30.0],
        "seconds_longest": [9.0, 20.0],
        "memory_mb": [50.0, 7.0],
    }
)


def scores_and_runs(kind, seed, noise):
    """Scores and runs of a cell as the workflow's CSV files hold them: hostile canaries shift by 3 when in."""
    rng = np.random.default_rng(seed)
    rows = []
    for run in range(NUM_RUNS):
        included = rng.integers(0, 2, NUM_CANARIES)
        for step in STEPS:
            margin = rng.normal(size=NUM_CANARIES) + 3 * included * (kind == HOSTILE) * step / STEPS[-1]
            for score, value in (("logit_margin", margin), ("negative_loss", -np.logaddexp(0, -margin))):
                named = {"run": run, "step": step, "score": score}
                rows.append(
                    pd.DataFrame({"canary_id": range(NUM_CANARIES), "included": included, "value": value, **named})
                )
    runs = [
        {"run": run, "role": "audited", "step": step, "test_accuracy": 0.5 + run / 10, "noise_multiplier": noise}
        for run in range(NUM_RUNS)
        for step in STEPS
    ]
    return pd.concat(rows, ignore_index=True), pd.DataFrame(runs)


@functools.cache
def cells():
    """By dataset, canary, training and epsilon: scores, runs."""
    return {
        ("digits", kind, training, epsilon): scores_and_runs(kind, 10 * place + number, noise)
        for place, (training, epsilon, noise) in enumerate(TRAININGS)
        for number, kind in enumerate(KINDS)
    }


@functools.cache
def frame():
    """summary/epsilon.csv of these cells."""
    found = []
    for key, (scores, runs) in cells().items():
        settings = summary.Settings(
            scores=("negative_loss", "logit_margin"),
            game="independent",
            delta=1e-5,
            auditors=("steinke", "fdp_gaussian"),
            protocols=("fixed", "paper"),
            guess_fraction=0.5,
            sampling_prob=None if key[2] == "sgd" else 0.05,
        )
        cell = dict(zip(("dataset", "canary", "training", "epsilon"), key, strict=True))
        found.append(summary.epsilon_table(scores, runs, settings, cell=cell))
    return summary.collect(found)


@functools.cache
def shown_scores():
    """`report_data.cell_scores` of all cells."""
    names = ("dataset", "canary", "training", "epsilon")
    return pd.concat(
        [
            report_data.cell_scores(scores, runs, "negative_loss", cell=dict(zip(names, key, strict=True)))
            for key, (scores, runs) in cells().items()
        ],
        ignore_index=True,
    )


def pictures():
    """Canaries by data set and kind; those of the hostile kind were changed."""
    rng = np.random.default_rng(0)
    source = rng.uniform(size=(NUM_CANARIES, 6, 6, 1)).astype(np.float32)
    found = {}
    for kind in KINDS:
        images = 1 - source if kind == HOSTILE else source
        labels = np.arange(NUM_CANARIES, dtype=np.int32) % 3
        found["digits", kind] = (
            Canaries(
                id=np.arange(NUM_CANARIES, dtype=np.int32),
                source_index=np.arange(NUM_CANARIES, dtype=np.int32) + 100,
                label=labels,
                images=images,
                source_images=source,
                source_labels=(labels + (kind == HOSTILE)) % 3,
            ),
            ["zero", "one & <two>", "three"],
        )
    return found


@functools.cache
def page():
    """The page of these results."""
    return report_page.render(frame(), shown_scores(), pictures(), COSTS, FACTS)
