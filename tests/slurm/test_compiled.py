"""What it is worth to a job that another one compiled the same programs before, and that it changes no bit."""

import shutil

import numpy as np
import pytest
import yaml
from workflows import ROOT, Workflow

from metacanary import store

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "results/digits/models/digits/random/{}/block0.npz"
LOG = "results/digits/benchmarks/train_audit_models/digits/random/{}/block0.tsv"


@pytest.mark.parametrize("cell", ["sgd/epsinf", "dpsgd/eps8"])
def test_compiled_programs_are_worth_keeping(tmp_path, monkeypatch, compiled_table, cell):
    """One model of config/digits.yaml: without a cache, with an empty one, and with that of the job before."""
    config = yaml.safe_load((ROOT / "config/digits.yaml").read_text(encoding="utf-8"))
    for training in config["trainings"].values():
        training |= {"num_runs": 1, "num_surrogate_runs": 0, "num_reference_runs": 2, "block_size": 1}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    run = Workflow(None, tmp_path / "run", config=file, target=MODEL.format(cell))
    seconds, bits = {}, []
    for cache in ("no cache", "empty cache", "filled cache"):
        monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", str(cache != "no cache").lower())
        if cache == "empty cache":
            shutil.rmtree(run.folder / ".snakemake" / "compiled", ignore_errors=True)
        assert run.start("--force").finish() == 0, run.text()
        names, values = ((run.folder / LOG.format(cell)).read_text(encoding="utf-8").split("\n"))[:2]
        seconds[cache] = float(dict(zip(names.split(), values.split(), strict=True))["cpu_time"])
        arrays = store.read_npz(run.folder / MODEL.format(cell))[0]
        bits.append({name: np.asarray(array).tobytes() for name, array in arrays.items()})
    assert bits[0] == bits[1] == bits[2]
    assert seconds["filled cache"] < seconds["no cache"]
    compiled_table.append(
        {"job": f"one model, {cell}", **{f"{name}, CPU seconds": f"{value:.1f}" for name, value in seconds.items()}}
    )
