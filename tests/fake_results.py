"""A finished experiment without its models: small, with every kind of file that a bundle holds, made in a second.

Two cells, of both games and both kinds of epsilon, each of two blocks; scores are drawn, audits are real.
"""

import numpy as np
import pandas as pd

from metacanary import families, store, summary

CONFIG = {
    "experiment": "fake",
    "trainings": {"sgd": {"epsilons": [float("inf")]}, "dpsgd": {"epsilons": ["8"]}},
    "seed": 1,
}
CELLS = (
    {"dataset": "digits-train200", "canary": "random", "training": "sgd", "epsilon": "inf"},
    {"dataset": "digits-train200", "canary": "mislabeled", "training": "dpsgd", "epsilon": "8"},
)
STEPS = (10, 20)
ROLES = ("audited", "audited", "surrogate", "reference")  # runs 0 and 1 are the first block
NUM_CANARIES = 20
ALSO = ["canaries/digits-train200/noise/canaries.npz", "canaries/digits-train200/noise/history.csv", "summary/cost.csv"]


def path_of(cell):
    """The folder of a cell."""
    return "{dataset}/{canary}/{training}/eps{epsilon}".format(**cell)


def provenance(digest, **settings):
    """The provenance of a result, with the digest of its settings."""
    return store.provenance(config_digest=digest, code_digest="c0de", wall_seconds=1 / 3, settings=settings)


def settings_of(cell):
    """How a cell is audited."""
    private = cell["training"] == "dpsgd"
    return {
        "scores": ["negative_loss", "rmia"],
        "game": "paired" if private else "independent",
        "delta": 1e-5,
        "significance": 0.05,
        "auditors": ["steinke", "gaussian_auroc"],
        "protocols": ["fixed", "surrogate"],
        "sampling_prob": 0.1 if private else None,
    }


def write(folder, *, cells=CELLS):
    """Writes the results; returns the folder."""
    for dataset in {cell["dataset"]: None for cell in cells}:
        for kind in ("random", "mislabeled", "noise"):
            _write_canaries(folder, dataset, kind)
    history = pd.DataFrame({"metastep": [1, 2], "objective": [-0.1, 1 / 3], "seconds": [0.5, np.nan]})
    store.write_csv(folder / ALSO[1], history, provenance("canaries"))
    for number, cell in enumerate(cells):
        _write_cell(folder, cell, np.random.default_rng(number))
    tables = [store.read_csv(folder / "audits" / path_of(cell) / "epsilon.csv") for cell in cells]
    inputs = {"audits": [f"audits {path_of(cell)}" for cell in cells]}
    store.write_csv(folder / "summary/epsilon.csv", summary.collect(tables), provenance("summary", inputs=inputs))
    store.write_csv(folder / ALSO[2], pd.DataFrame({"seconds": [12.5]}), provenance("cost"))
    return folder


def _write_canaries(folder, dataset, kind):
    """Canaries of random images with two channels less than a photograph."""
    images = np.random.default_rng(0).integers(0, 256, (200, 6, 4, 1)).astype(np.uint8)
    family = "mislabeled" if kind == "mislabeled" else "random"
    made = families.make(family, images, np.arange(200) % 10, num_canaries=NUM_CANARIES, num_classes=10, seed=0)
    settings = {"dataset": "digits", "num_train": 200}
    path = folder / f"canaries/{dataset}/{kind}/canaries.npz"
    store.write_npz(path, made.arrays(), provenance(f"canaries {dataset} {kind}", **settings))


def _write_cell(folder, cell, rng):
    """Scores, runs, population and audits of a cell."""
    scores, runs, population = [], [], []
    for block in range(2):
        numbers = np.arange(2 * block, 2 * block + 2)
        scores.append(pd.concat([_scores(run, cell, rng) for run in numbers], ignore_index=True))
        index = [(run, ROLES[run], step) for run in numbers for step in STEPS]
        accuracies = {"test_accuracy": rng.random(4), "noise_multiplier": 0.0 if cell["training"] == "sgd" else 1.1}
        runs.append(pd.DataFrame(index, columns=["run", "role", "step"]).assign(**accuracies))
        values = np.log(rng.random((2, 2, 7)))
        population.append({"run": numbers, "step": np.array(STEPS), "log_probability": values})
        inputs = {"canaries": f"canaries {cell['dataset']} {cell['canary']}"}
        made = provenance(f"scores {path_of(cell)} {block}", inputs=inputs)
        base = folder / "scores" / path_of(cell)
        store.write_csv(base / f"block{block}.csv", scores[-1], made)
        store.write_csv(base / f"runs{block}.csv", runs[-1], made)
        store.write_npz(base / f"population{block}.npz", population[-1], made)
    audit = settings_of(cell)
    table = summary.epsilon_table(
        pd.concat(scores), pd.concat(runs), summary.Settings(**audit), cell=cell, population=population
    )
    inputs = {"scores": [f"scores {path_of(cell)} {block}" for block in range(2)]}
    made = provenance(f"audits {path_of(cell)}", inputs=inputs, audit=audit)
    store.write_csv(folder / "audits" / path_of(cell) / "epsilon.csv", table, made)


def _scores(run, cell, rng):
    """Scores of a run: normal, and higher for included canaries."""
    included = rng.integers(0, 2, NUM_CANARIES)
    if cell["training"] == "dpsgd":
        included[1::2] = 1 - included[::2]
    frames = []
    for step in STEPS:
        margin = rng.normal(size=NUM_CANARIES) + 3 * included
        for score, values in (("logit_margin", margin), ("negative_loss", -np.logaddexp(0, -margin))):
            columns = {"run": run, "step": step, "canary_id": np.arange(NUM_CANARIES), "included": included}
            frames.append(pd.DataFrame(columns | {"score": score, "value": values}))
    return pd.concat(frames, ignore_index=True)
