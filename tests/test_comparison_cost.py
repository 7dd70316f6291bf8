"""What jobs cost: seconds of all attempts, trainings and steps by hand, sums by what was optimised or audited."""

import numpy as np
import pandas as pd
import pytest

from metacanary import comparison_cost

CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "cpu": "AMD EPYC", "cores": 2}
GPU = {"platform": "gpu", "kind": "NVIDIA H100", "count": 1, "cpu": "AMD EPYC", "cores": 2}
CELL = {"dataset": "digits", "canary": "metagradient", "training": "sgd", "epsilon": "inf"}


def made(settings, seconds=10.0, device=CPU):
    """The provenance of a result."""
    return {"device": device, "wall_seconds": seconds, "settings": settings}


@pytest.mark.parametrize(
    ("settings", "trainings", "steps"),
    [
        ({"kind": {"num_metasteps": 3, "training": {"num_steps": 7}}}, 3, 21),
        ({"kind": {"num_metasteps": 3, "num_splits": 2, "complement": True, "training": {"num_steps": 7}}}, 12, 84),
        ({"kind": {"num_metasteps": 3, "objective_steps": [2, 5], "training": {"num_steps": 7}}}, 3, 15),
        ({"kind": {"num_proxies": 4, "num_steps": 100, "training": {"num_steps": 7}}}, 4, 28),  # 100 updates of pixels
        ({"runs": [3, 4, 5], "options": {"num_steps": 7}}, 3, 21),
        ({"inputs": {}, "scores": ["negative_loss"]}, None, None),
    ],
)
def test_job_counts_trainings_and_their_steps(settings, trainings, steps):
    row = comparison_cost.job("optimize_canaries", CELL, made(settings))
    assert (row["num_trainings"], row["num_steps"]) == (trainings, steps)
    assert tuple(row) == comparison_cost.COLUMNS


@pytest.mark.parametrize(("history", "seconds"), [([1.0, 2.0], 10.0), ([9.0, 8.0], 17.0)])
def test_job_counts_earlier_attempts_by_the_history(history, seconds):
    history = pd.DataFrame({"seconds": history})
    assert comparison_cost.job("optimize_canaries", CELL, made({}), history)["seconds"] == seconds


def test_sums_keep_optimisations_and_audits_apart():
    where = {name: CELL[name] for name in ("dataset", "canary")}
    optimized = comparison_cost.job(
        "optimize_canaries", where, made({"kind": {"num_metasteps": 2, "training": {"num_steps": 5}}})
    )
    audit = [
        comparison_cost.job(stage, {**CELL, "training": training, "epsilon": epsilon}, made(settings, seconds))
        for training, epsilon in (("sgd", "inf"), ("dpsgd", "8"))
        for stage, settings, seconds in (
            ("train_audit_models", {"runs": [0, 1], "options": {"num_steps": 5}}, 20.0),
            ("train_audit_models", {"runs": [2], "options": {"num_steps": 5}}, 12.0),
            ("score_membership", {}, 3.0),
        )
    ]
    costs = comparison_cost.table([optimized, *audit])
    assert comparison_cost.optimizations(costs).loc[("digits", "metagradient")].tolist() == [10.0, 2, 10]
    audits = comparison_cost.audits(costs)
    assert audits.loc[("digits", "metagradient", "sgd", np.inf)].tolist() == [35.0, 3, 15]
    assert audits.loc[("digits", "metagradient", "dpsgd", 8.0)].tolist() == [35.0, 3, 15]
    assert len(audits) == 2


def test_devices_names_gpus_by_kind_and_cpus_by_model():
    jobs = [comparison_cost.job("a", CELL, made({}, device=device)) for device in (GPU, CPU, GPU)]
    assert comparison_cost.devices(comparison_cost.table(jobs)) == ["NVIDIA H100", "AMD EPYC"]
