"""The private trainings of the large configs as they are written: full model, batch and copies, for two updates.

`make test-full` runs them all, on a GPU in minutes, on a CPU in hours: a WRN-16-4 takes half an hour per update of one
core. `MICROBATCH=8` divides the memory: the batch's sum is taken of smaller parts, which changes it by rounding alone
(test_steps). `COPIES=1` divides the time, and leaves the batch and the model. `make test` runs the small one alone, by
which this file itself is tested.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_config import complete, read

from metacanary import store
from metacanary.interruption import Stopped

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import _build  # noqa: E402
import _cost  # noqa: E402
import _family  # noqa: E402
import _stages  # noqa: E402
import train_audit_models  # noqa: E402

LARGE = ("config", "de_et_al", "tan_reference")
"""Configs for GPUs with private trainings from scratch."""


def entries():
    """The private trainings from scratch of each config; of epsilons the first."""
    yield "tests/tiny.yaml", "dpsgd"
    for path in (f"config/{name}.yaml" for name in LARGE):
        for name, training in read(path)["trainings"].items():
            if training["algorithm"] == "dpsgd" and "pretraining" not in training:
                yield pytest.param(path, name, marks=[pytest.mark.full, pytest.mark.timeout(0)])


@pytest.mark.parametrize(("path", "name"), list(entries()))
def test_two_updates_as_configured(tmp_path, path, name, request):
    """Each ends with finite parameters, and the second goes on from the first one's checkpoint."""
    stages = _stages.Stages(complete(read(path)))
    cell = next(cell for cell in stages.cells() if cell["training"] == name)
    settings = stages.settings("models", **cell, block="0")
    dataset, chosen = _cost.pictures(settings), train_audit_models.recipe(settings)
    if microbatch := request.config.getoption("microbatch"):
        chosen = dataclasses.replace(chosen, microbatch=microbatch)
    if copies := request.config.getoption("copies"):
        augmentation = dataclasses.replace(chosen.augmentation, multiplicity=copies)
        chosen = dataclasses.replace(chosen, augmentation=augmentation)
    model = _build.model(settings["model"], len(dataset.class_names))
    inserted = _family.canaries_of("random", settings | {"num_canaries": 2, "seed": 0}, dataset)
    checkpoint, params = tmp_path / "training.npz", []
    for update in (1, 2):
        began = time.perf_counter()
        with pytest.raises(Stopped, match=f"stopped after step {update} of {chosen.num_steps}"):
            train_audit_models.train_runs(
                settings,
                chosen,
                model,
                dataset,
                inserted,
                settings["roles"][:1],
                seeds=settings["seeds"][:1],
                checkpoint=checkpoint,
                should_stop=lambda: True,
            )
        print(f"{path}, {name}: update {update} with its compilation {time.perf_counter() - began:.0f} s", flush=True)
        leaves, _ = store.read_npz(checkpoint)
        assert int(next(leaf for name, leaf in leaves.items() if "step" in name)) == update
        params.append({name: leaf for name, leaf in leaves.items() if "'params'" in name})
        assert all(np.isfinite(leaf).all() for leaf in params[-1].values())
    assert all((params[0][name] != params[1][name]).any() for name in params[0])
