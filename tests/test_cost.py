"""What `make cost` prints: jobs as Snakemake plans them, hours as they are measured or were."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_config import NORM_KIND, complete, read

from metacanary import recipes, store

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import _cost  # noqa: E402
import _stages  # noqa: E402


class Fixed:
    """Measures nothing: 10 s to compile, 2 s a step, 1000 s an optimisation."""

    def training(self, settings, chosen):
        return 10.0, 2.0

    def optimization(self, settings):
        return 1000.0


@pytest.fixture
def config():
    return complete(read("tests/tiny.yaml"))


ADDED = {
    "accuracy": {"trainings": ["dpsgd"], "canary": "random"},
    "comparisons": {"mine": {"canaries": ["random", "metagradient"], "by": "start"}},
    "ledger": {"trainings": ["dpsgd"]},
}


@pytest.mark.parametrize("added", [{}, ADDED], ids=["tiny", "more"])
def test_costs_count_the_jobs_that_snakemake_plans(tmp_path, added):
    config = read("tests/tiny.yaml") | added
    config["trainings"]["dpsgd"]["game"] = "independent"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    config = complete(config)
    call = [sys.executable, "-m", "snakemake", "--dry-run", "--directory", str(tmp_path), "--snakefile"]
    call += [str(ROOT / "Snakefile"), "--configfile", str(tmp_path / "config.yaml"), "--", "all", "metasmoothness"]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    table = re.search(r"^job +count\n[- ]+\n(.*?)\ntotal", text, re.MULTILINE | re.DOTALL).group(1)
    planned = {name: int(count) for name, count in map(str.split, table.splitlines())}
    found = {name: cost.jobs for name, cost in _cost.costs(config, Fixed(), tmp_path).items()}
    others = found.pop("tables, figures")
    assert found == {name: planned.pop(name) for name in found}
    assert others == sum(count for name, count in planned.items() if name not in ("all", "metasmoothness"))


def test_costs_add_up_what_is_measured(config, tmp_path):
    """tests/tiny.yaml: 5 runs of 4 steps for two kinds, 6 of 3 steps in two blocks; an epoch of 5 for the variant."""
    found = _cost.costs(config, Fixed(), tmp_path)
    assert found["train_audit_models"].seconds == 2 * (10 + 5 * 4 * 2) + 2 * (10 + 3 * 3 * 2)
    assert found["train_audit_models"].longest == 10 + 5 * 4 * 2
    assert found["optimize_canaries"].seconds == 2 * 1000
    assert found["measure_metasmoothness"].seconds == 10 + 3 * 2 * 5 * 2
    assert found["score_membership"].seconds is None
    total = 2 * 50 + 2 * 28 + 2000 + 70
    assert re.search(rf"^total +\d+ +{total / 3600:.2f} +{1000 / 3600:.2f} h", _cost.table(found), re.MULTILINE)


def test_runs_that_are_trained_at_once_share_their_steps(config, tmp_path):
    """5 runs of 4 steps in pairs: 3 groups, of which the last has another size; 6 of 3 steps in two blocks of 3."""
    config["trainings"]["sgd"]["runs_together"] = 2
    config["trainings"]["dpsgd"]["runs_together"] = 3
    found = _cost.costs(config, Fixed(), tmp_path)["train_audit_models"]
    assert found.seconds == 2 * (2 * 10 + 3 * 4 * 2) + 2 * (10 + 3 * 2)


def test_measure_takes_steps_of_all_runs_at_once(config, monkeypatch):
    """Once for each number of them, whose steps take the states of so many."""
    stages, sizes, measure = _stages.Stages(config), [], _cost.Measure(steps=1, rows=None)
    initial_state = _cost.training_together.initial_state

    def counted(*args, seeds, **options):
        sizes.append(len(seeds))
        return initial_state(*args, seeds=seeds, **options)

    monkeypatch.setattr(_cost.training_together, "initial_state", counted)
    (cell,) = [cell for cell in stages.cells() if cell["training"] == "dpsgd"]
    settings = stages.settings("models", **cell, block="0")
    for together in (1, 2, 3, 3):
        assert _cost.block_seconds(settings | {"runs_together": together}, measure) > 0
    assert sizes == [2, 3]
    assert len(measure._known) == 3


def test_finished_jobs_count_with_their_own_time(config, tmp_path):
    path = tmp_path / "models/digits/random/sgd/epsinf/block0.npz"
    store.write_npz(path, {}, {"wall_seconds": 7.0})
    found = _cost.costs(config, Fixed(), tmp_path)["train_audit_models"]
    assert found.seconds == 7 + 50 + 2 * 28
    assert found.source == {"steps", "finished jobs"}


def test_disk_is_that_of_the_parameters_and_pixels(config, tmp_path):
    stages = _stages.Stages(config)
    settings = stages.settings("models", **stages.cells()[0], block="0")
    model = _cost._build.model(settings["model"], 10)
    params = _cost.models.init(model, _cost.jax.random.key(0), (8, 8, 1))
    assert _cost.parameter_bytes(settings) == sum(4 * np.size(x) for x in _cost.jax.tree.leaves(params))
    assert _cost.costs(config, Fixed(), tmp_path)["download"].bytes == 1797 * 64


def test_measure_takes_steps_of_every_kind_once(config):
    stages = _stages.Stages(config)
    measure = _cost.Measure(steps=2, rows=None)
    for cell in stages.cells():
        settings = stages.settings("models", **cell, block="0")
        assert _cost.block_seconds(settings, measure) > 0
    assert len(measure._known) == 2  # sgd and dpsgd; the kind of canary makes no difference
    for compiling, step in measure._known.values():
        assert compiling > step > 0


def test_measure_takes_the_steps_of_an_optimisation_of_norms(config):
    """Of twice as many steps and proxies it takes longer; the kind's own number of canaries is measured."""
    kind = NORM_KIND | {"model": {"name": "convnet", "options": {"widths": [4]}}}
    more = kind | {"num_steps": 500, "num_proxies": 4, "proxy_steps": [2, 4], "num_canaries": 12}
    config["canaries"]["kinds"] |= {"less": kind, "more": more}
    stages, measure = _stages.Stages(complete(config)), _cost.Measure(steps=2, rows=None)
    settings = [stages.settings("canaries", dataset="digits", canary=name) for name in ("less", "more")]
    assert [s["num_canaries"] for s in settings] == [10, 12]
    less, more = (measure.optimization(s) for s in settings)
    assert 0 < less < more
    assert measure.optimization(settings[1]) == more  # measured once


@pytest.mark.parametrize(
    ("chosen", "scale"),
    [
        (recipes.SGD(num_steps=9, batch_size=100, learning_rate=0.1, microbatch=50), 4),
        (recipes.DPSGD(num_steps=9, sampling_prob=0.1, clip_norm=1, noise_multiplier=1, learning_rate=1), 4),
        (recipes.SGD(num_steps=9, batch_size=20, learning_rate=0.1), 1),
    ],
)
def test_fewer_rows_are_scaled_up(chosen, scale):
    fewer, found = _cost.Measure(steps=2, rows=25)._fewer_rows(chosen, 1000)
    assert found == pytest.approx(scale)
    rows = fewer.batch_size if isinstance(fewer, recipes.SGD) else fewer.sampling_prob * 1000
    assert rows == pytest.approx(min(25, 100 if scale == 4 else 20))


def test_main_explains_a_wrong_config_in_one_line(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "tests/tiny.yaml").read_text().replace("seed: 1", "seed: -1", 1))
    call = [sys.executable, str(ROOT / "workflow/scripts/_cost.py"), str(wrong)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: seed: got -1, expected a number >= 0"
