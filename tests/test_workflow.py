"""Tests of the workflow: its graph, what reruns what, its scripts from end to end, and what a kill leaves."""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import logging
import operator
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from flax.traverse_util import flatten_dict
from test_config import NORM_KIND, complete, fine_tuning, read

from metacanary import (
    accounting,
    bundle,
    canaries,
    data,
    objectives,
    reference_scores,
    reproduction,
    score_table,
    store,
    summary,
)
from metacanary.interruption import Stopped

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import _build  # noqa: E402
import _computed  # noqa: E402
import _family  # noqa: E402
import _job  # noqa: E402
import _sources  # noqa: E402
import _stages  # noqa: E402
import optimize_canaries  # noqa: E402
import pretrain_model  # noqa: E402
import train_audit_models  # noqa: E402
import train_tan  # noqa: E402

TINY = ROOT / "tests" / "tiny.yaml"
CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
RULES = ["download", "make_canaries", "optimize_canaries", "train_audit_models", "score_membership"]
RULES += ["compute_epsilon", "collect_epsilon", "make_table1", "make_table2", "make_bounds", "make_reproduction"]
RULES += ["plot_figure1", "plot_figure2", "make_report_page", "all"]


def command(folder, *arguments, config=TINY):
    """Snakemake's command line for a run in a folder."""
    call = [sys.executable, "-m", "snakemake", "--directory", str(folder), "--snakefile", str(ROOT / "Snakefile")]
    configured = [] if config is None else ["--configfile", str(config)]
    return [*call, "--cores", "2", *configured, *map(str, arguments)]


def environment():
    """The environment of a run, without what makes Snakemake slow to start, and without this process's settings."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "XLA_FLAGS", "OMP_NUM_THREADS")}


def snakemake(folder, *arguments, config=TINY):
    """Runs Snakemake to its end; returns its exit status and what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(folder, *arguments, config=config), env=environment(), capture_output=True, text=True, timeout=280
    )
    return SimpleNamespace(status=done.returncode, text=done.stdout + done.stderr)


def counts(text):
    """The numbers of jobs by rule that a dry run announces."""
    table = re.search(r"^job +count\n[- ]+\n(.*?)\ntotal", text, re.MULTILINE | re.DOTALL)
    return {} if table is None else {name: int(n) for name, n in map(str.split, table.group(1).splitlines())}


def changed(folder, **changes):
    """Writes the tiny config with changes of single keys, by path with double underscores; returns the file."""
    config = read("tests/tiny.yaml")
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = config
        for name in parents:
            place = place[name]
        place[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, request):
    """The folder of a finished tiny run; it is made once, by the first process of the tests that needs it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if hasattr(request.config, "workerinput") else shared
    folder = shared / "tiny"
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "finished").exists():
            run = snakemake(folder)
            assert run.status == 0, run.text
            (folder / "log").write_text(run.text, encoding="utf-8")
            (folder / "finished").touch()
    return folder


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of the finished tiny run, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


@pytest.fixture(scope="session")
def stages():
    """The stages of the tiny config."""
    return _stages.Stages(complete(read("tests/tiny.yaml")))


def changed_stages(path, value):
    """The stages of the tiny config with one key changed."""
    config = read("tests/tiny.yaml")
    *parents, last = path.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    return _stages.Stages(complete(config))


CELL = {"dataset": "digits", "canary": "random", "training": "dpsgd", "epsilon": "8"}
WILDCARDS = {
    "canaries": {"dataset": "digits", "canary": "random"},
    "models": {**CELL, "block": "0"},
    "scores": {**CELL, "block": "0"},
    "audits": CELL,
    "summary": {},
    "table1": {},
    "figure1": {},
    "figure2": {},
    "metasmoothness": {"dataset": "digits", "canary": "variant"},
    "metasmoothness_table": {},
    "metasmoothness_figure": {},
}
SHOWN = {"metasmoothness_table", "metasmoothness_figure"}


@pytest.mark.parametrize(
    ("path", "value", "stages_changed"),
    [
        ("seed", 2, set(WILDCARDS)),
        ("canaries.num_canaries", 12, set(WILDCARDS)),
        (
            "canaries.kinds.random",
            {"family": "random", "num_canaries": 12},
            {"canaries", "models", "scores", "audits", "summary", "table1", "figure2"},
        ),
        ("canaries.kinds.metagradient.num_canaries", 12, {"summary", "table1", "figure1", "figure2"}),
        ("canaries.kinds.variant.num_canaries", 12, {"metasmoothness"} | SHOWN),
        ("image_size", 16, set(WILDCARDS)),
        ("channels", 3, set(WILDCARDS)),
        ("trainings.dpsgd.options.clip_norm", 2.0, {"models", "scores", "audits", "summary", "table1", "figure2"}),
        ("delta", 1e-6, {"models", "scores", "audits", "summary", "table1", "figure2"}),
        ("audit.accountant", "rdp", {"models", "scores", "audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.block_size", 2, {"models", "scores", "audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.runs_together", 2, {"models", "scores", "audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.runs_together", 1, set()),
        ("trainings.dpsgd.num_runs", 4, {"audits", "summary", "table1", "figure2"}),
        ("audit.guess_fraction", 1.0, {"audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.num_surrogate_runs", 2, {"audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.num_reference_runs", 3, {"audits", "summary", "table1", "figure2"}),
        ("audit.scores", ["negative_loss"], {"scores", "audits", "summary", "table1", "figure2"}),
        ("audit.score_augmentation", {"flip": True}, {"scores", "audits", "summary", "table1", "figure2"}),
        ("audit.num_population", 30, {"scores", "audits", "summary", "table1", "figure2"}),
        ("audit.rmia_gamma", 2.0, {"audits", "summary", "table1", "figure2"}),
        ("trainings.dpsgd.canaries", ["random", "metagradient"], {"summary", "table1", "figure2"}),
        ("canaries.kinds.metagradient.num_metasteps", 3, {"summary", "table1", "figure1", "figure2"}),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0.1, "harden_after": 3},
            {"summary", "table1", "figure1", "figure2"},
        ),
        ("canaries.kinds.metagradient.labels", None, set()),
        ("canaries.kinds.variant.num_metasteps", 3, SHOWN),
        ("canaries.kinds.variant.training.momentum", 0.5, {"metasmoothness"} | SHOWN),
        ("metasmoothness.step", 0.1, {"metasmoothness"} | SHOWN),
        ("metasmoothness.num_averaged", 2, SHOWN),
        ("trainings.sgd.options.momentum", 0.5, {"summary", "table1", "figure2"}),
        ("tables.protocol", "fixed", {"table1"}),
        ("figures.figure1_num_shown", 4, {"figure1"}),
        ("figures.figure2_auditor", "fdp_gaussian", {"figure2"}),
        ("experiment", "other", set()),
        ("results_dir", "results/other", set()),
    ],
)
def test_settings_hold_what_a_stage_depends_on_and_no_more(stages, path, value, stages_changed):
    other = changed_stages(path, value)
    found = {name for name, names in WILDCARDS.items() if stages.digest(name, **names) != other.digest(name, **names)}
    assert found == stages_changed


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("seed", 2, True),
        ("experiment", "other", True),
        ("audit.guess_fraction", 1.0, True),
        ("audit.rmia_gamma", 2.0, True),
        ("tables.score", "rmia", True),
        ("tables.protocol", "fixed", True),
        ("figures.figure2_auditor", "fdp_gaussian", True),
        ("figures.figure1_num_shown", 4, False),
        ("canaries.kinds.variant.num_metasteps", 3, False),
        ("metasmoothness.step", 0.1, False),
        ("results_dir", "results/other", False),
    ],
)
def test_settings_of_the_page_hold_what_it_shows_and_no_more(stages, path, value, changed):
    assert (changed_stages(path, value).digest("report_page") != stages.digest("report_page")) == changed


def test_number_of_canaries_of_a_kind_stands_for_that_of_all(stages):
    """One number, given here or there, is the same setting; kinds of one number share their source images."""
    own = changed_stages("canaries.kinds.random", {"family": "random", "num_canaries": 10})
    settings = own.settings("canaries", dataset="digits", canary="random")
    assert settings == stages.settings("canaries", dataset="digits", canary="random")
    assert settings["num_canaries"] == 10
    assert settings["kind"] == {"family": "random"}


def norm_stages(**changes):
    """The stages of the tiny config with a kind of optimised gradient norms, 12 canaries from noise."""
    kind = NORM_KIND | {"num_canaries": 12, "start": "noise", "num_proxies": 2, "proxy_steps": [2, 4]} | changes
    kind["model"] = {"name": "convnet", "options": {"widths": [4]}}
    return changed_stages("canaries.kinds.norm", kind)


def optimized(settings, provenance, folder, should_stop=None):
    """What the script makes of the kind of `norm_stages`: the canaries, and the history without its seconds."""
    dataset = _build.dataset(settings, provenance)
    made, history = optimize_canaries.optimize_canaries(settings, dataset, folder, should_stop)
    return made, history.drop(columns="seconds")


def test_stopped_optimization_of_norms_goes_on_to_the_same_canaries(digits_dir, tmp_path, capsys):
    """Asked to stop at each third look: in the training of proxies, between them, and among steps on the pixels."""
    settings = norm_stages().settings("canaries", dataset="digits", canary="norm")
    expected, rows = optimized(settings, digits_dir, tmp_path / "whole")
    assert expected.images.shape == (12, 8, 8, 1)
    assert rows["step"].tolist() == [1, 2, 3, 4, 5]
    norms = rows["geometric_mean_gradient_norm"]
    assert norms.iloc[-1] > norms.iloc[0] > 0
    attempts, found = 0, None
    while found is None:
        looks, attempts = itertools.count(1), attempts + 1
        with contextlib.suppress(Stopped):
            found = optimized(
                settings, digits_dir, tmp_path / "parts", should_stop=lambda looks=looks: next(looks) == 3
            )
    assert attempts == 5  # after 3 and 6 steps of training, then 1 and 4 of the pixels
    assert re.findall(r"after step (\d+)\n", capsys.readouterr().out) == ["1", "4"]
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(found[0].arrays()[name], array)
    pd.testing.assert_frame_equal(found[1], rows)


def test_optimization_of_norms_has_a_seed_of_its_own(digits_dir, tmp_path):
    stages = norm_stages()
    settings = [stages.settings("canaries", dataset="digits", canary=name) for name in ("norm", "metagradient")]
    assert settings[0]["optimization_seed"] != settings[1]["optimization_seed"]
    assert settings[0]["seed"] == settings[1]["seed"]
    first, other = (
        optimized(settings[0] | {"optimization_seed": seed}, digits_dir, tmp_path / str(seed))[0] for seed in (1, 2)
    )
    assert not np.array_equal(first.images, other.images)
    np.testing.assert_array_equal(first.source_images, other.source_images)


def test_stopped_optimization_of_labels_goes_on_to_the_same_canaries(digits_dir, tmp_path):
    """Stopped at each eighth look, before labels harden and after; the history counts the labels that changed."""
    kind = read("tests/tiny.yaml")["canaries"]["kinds"]["metagradient"]
    kind |= {"num_metasteps": 3, "labels": {"learning_rate": 2.0, "harden_after": 2, "scale": 1.0}}
    settings = changed_stages("canaries.kinds.metagradient", kind).settings(
        "canaries", dataset="digits", canary="metagradient"
    )
    assert settings["kind"]["labels"] == {"learning_rate": 2.0, "harden_after": 2, "scale": 1.0}
    expected, rows = optimized(settings, digits_dir, tmp_path / "whole")
    assert list(rows) == ["metastep", "objective", "auroc", "labels_changed"]
    start = _family.canaries_of(settings["kind"]["start"], settings, _build.dataset(settings, digits_dir))
    assert rows["labels_changed"].iloc[-1] == (expected.label != start.label).sum() > 0
    assert expected.label.dtype == np.int32
    attempts, found = 0, None
    while found is None:
        looks, attempts = itertools.count(1), attempts + 1
        with contextlib.suppress(Stopped):
            found = optimized(
                settings, digits_dir, tmp_path / "parts", should_stop=lambda looks=looks: next(looks) == 8
            )
    assert attempts > 3
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(found[0].arrays()[name], array)
    pd.testing.assert_frame_equal(found[1], rows)


def persistence(**changes):
    """The stages of the tiny config, its metagradient kind optimised for the norms of members on the way."""
    kind = read("tests/tiny.yaml")["canaries"]["kinds"]["metagradient"]
    kind |= {"objective": {"name": "gradient_norm"}, "objective_steps": [1, 3], "num_metasteps": 2} | changes
    return changed_stages("canaries.kinds.metagradient", kind)


def test_optimization_for_objectives_on_the_way_is_that_of_the_package(digits_dir, tmp_path, capsys):
    """Of another objective than at the last of the steps alone; the plan is that of the steps that are trained."""
    cell = {"dataset": "digits", "canary": "metagradient"}
    settings = persistence().settings("canaries", **cell)
    assert settings["kind"]["objective_steps"] == [1, 3]
    chosen = optimize_canaries.settings_of(settings["kind"])
    assert (chosen.objective, chosen.objective_steps) == (objectives.GradientNorm(microbatch=64), (1, 3))
    found, rows = optimized(settings, digits_dir, tmp_path / "steps")
    assert "3 steps, branching" in capsys.readouterr().out
    last = persistence(objective_steps=[3]).settings("canaries", **cell)
    other, last_rows = optimized(last, digits_dir, tmp_path / "last")
    assert rows["auroc"].iloc[0] == last_rows["auroc"].iloc[0]
    assert rows["objective"].iloc[0] != last_rows["objective"].iloc[0]
    assert not np.array_equal(found.images, other.images)


def test_objective_steps_that_are_not_asked_for_are_no_setting(stages):
    cell = {"dataset": "digits", "canary": "metagradient"}
    kind = read("tests/tiny.yaml")["canaries"]["kinds"]["metagradient"] | {"objective_steps": []}
    assert "objective_steps" not in stages.settings("canaries", **cell)["kind"]
    assert changed_stages("canaries.kinds.metagradient", kind).digest("canaries", **cell) == stages.digest(
        "canaries", **cell
    )


def test_tables_say_what_canaries_were_optimised_for():
    """Norms on models without canaries apart from those of members, and steps on the way."""
    assert norm_stages().settings("table1")["objectives"]["norm"] == "gradient_norm"
    found = persistence().settings("table1")["objectives"]
    assert found["metagradient"] == "gradient_norm of members after 1, 3"
    assert found["variant"] == "smooth_auroc"
    assert "random" not in found
    facts = [x["facts"] for x in persistence().settings("reproduction")["setup"] if x["canary"] == "metagradient"]
    assert {x["objective"] for x in facts} == {"gradient_norm of members after 1, 3"}
    variant = persistence().settings("canaries", dataset="digits", canary="variant")["kind"]
    assert variant["objective"]["name"] == "smooth_auroc"
    variant = read("tests/tiny.yaml")["canaries"]["kinds"]["variant"]
    for options, expected in (
        ({"interference": 0.5}, "smooth_auroc + 0.5 interference"),
        ({"labels": {"learning_rate": 1.0, "harden_after": 1}}, "smooth_auroc, labels too"),
    ):
        other = changed_stages("canaries.kinds.variant", variant | options)
        assert other.settings("table1")["objectives"]["variant"] == expected
    shown = changed_stages(
        "canaries.kinds.variant", read("tests/tiny.yaml")["canaries"]["kinds"]["variant"] | {"objective_steps": [2, 5]}
    ).settings("metasmoothness_table")["variants"]
    assert [x["objective"] for x in shown] == [{"name": "smooth_auroc after 2, 5", "temperature": 2.0}]


def test_channels_are_of_canaries_and_pool_alike(digits_dir):
    dataset = _build.dataset({"dataset": "digits"}, str(digits_dir))
    settings = {"image_size": 16, "channels": 3, "num_canaries": 4, "seed": 1}
    chosen = _family.canaries_of("random", settings, dataset)
    pool = _build.pool(settings, dataset, chosen)
    assert chosen.images.shape == (4, 16, 16, 3)
    assert pool.images.shape[1:] == (16, 16, 3)
    grey = _family.canaries_of("random", settings | {"channels": None}, dataset)
    np.testing.assert_array_equal(chosen.images, np.repeat(grey.images, 3, axis=-1))


def test_channels_are_no_setting_of_what_was_made_before(stages):
    assert "channels" not in stages.settings("canaries", **WILDCARDS["canaries"])
    assert changed_stages("channels", 3).settings("canaries", **WILDCARDS["canaries"])["channels"] == 3


def test_labels_that_stay_are_no_setting(stages):
    """Canaries that were made before labels could move are the same ones."""
    assert "labels" not in stages.settings("canaries", dataset="digits", canary="metagradient")["kind"]


def test_subset_is_part_of_names_and_settings(stages):
    subset, name = changed_stages("num_train", 1000), "digits-train1000"
    assert {cell["dataset"] for cell in subset.cells() + subset.variants()} == {name}
    assert subset.datasets == {name: "digits"}
    settings = subset.settings("canaries", dataset=name, canary="random")
    assert (settings["dataset"], settings["num_train"]) == ("digits", 1000)
    assert subset.settings("figure2")["figure"]["dataset"] == name
    assert "num_train" not in stages.settings("canaries", **WILDCARDS["canaries"])  # of what was made before


def test_subset_is_made_of_the_stored_data_set_under_a_path_of_its_own(tmp_path):
    run = snakemake(tmp_path, "--dry-run", "all", config=changed(tmp_path, num_train=1000, image_size=4))
    assert run.status == 0, run.text
    assert counts(run.text)["download"] == 1
    assert "results/data/digits/provenance.json" in run.text
    assert "results/tiny/canaries/digits-train1000/random/canaries.npz" in run.text
    assert "/digits/" not in run.text.replace("results/data/digits/", "").replace("download/digits", "")


def test_scores_that_need_reference_runs_are_no_part_of_those_of_a_block():
    """So that to ask for more of them scores no model again; copies and constants count where they are used."""
    names = {"negative_loss": 1, "offline_lira": 2, "rmia": 3}
    chosen = [changed_stages("audit.scores", [*names][:count]) for count in names.values()]
    scores = [stages.settings("scores", **WILDCARDS["scores"]) for stages in chosen]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["scores"] == ["logit_margin", "negative_loss"]
    assert "augmentation" not in scores[0]
    audits = [stages.settings("audits", **WILDCARDS["audits"])["audit"] for stages in chosen]
    assert ["rmia_gamma" in settings for settings in audits] == [False, False, True]


def test_settings_print_alike_whatever_the_order_of_keys(stages):
    config = complete(read("tests/tiny.yaml"))
    reverse = json.loads(json.dumps(config, sort_keys=True), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    other = _stages.Stages(reverse)
    for stage in ("canaries", "models"):
        assert str(other.settings(stage, **WILDCARDS[stage])) == str(stages.settings(stage, **WILDCARDS[stage]))


def test_runs_of_one_number_share_their_seed_across_canary_kinds(stages):
    cell = {"dataset": "digits", "training": "sgd", "epsilon": "inf", "block": "0"}
    seeds = [stages.settings("models", canary=kind, **cell)["seeds"] for kind in ("random", "metagradient")]
    assert seeds[0] == seeds[1]


def test_directions_of_one_number_are_the_same_for_all_variants():
    """Coins, orders and initial models too; the optimisation's seeds are others."""
    config = read("config/digits_metasmoothness.yaml")
    variants = _stages.Stages(complete(config))
    found = [variants.settings("metasmoothness", dataset="digits", canary=kind) for kind in ("base", "rough")]
    assert found[0]["seeds"] == found[1]["seeds"]
    assert len(set(found[0]["seeds"])) == config["metasmoothness"]["num_directions"]
    assert found[0]["kind"]["model"] != found[1]["kind"]["model"]
    assert variants.settings("canaries", dataset="digits", canary="base")["optimization_seed"] not in found[0]["seeds"]


def test_seeds_differ_between_runs_trainings_and_uses(stages):
    models = [stages.settings("models", **{**CELL, "epsilon": e, "block": b}) for e in ("8", "4") for b in "01"]
    seeds = [seed for settings in models for seed in settings["seeds"]]
    optimized = stages.settings("canaries", dataset="digits", canary="metagradient")
    seeds += [optimized["seed"], optimized["optimization_seed"]]
    assert len(set(seeds)) == len(seeds) == 2 * 6 + 2
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_published_results_are_those_of_the_committed_config():
    committed = _stages.Stages(complete(read("config/digits.yaml")))
    made_on = store.read_json(ROOT / "docs/results/digits/made_on.json")
    assert made_on["config_digest"] == committed.digest("summary")


PAPER = {"cifar10": "config", "cifar100": "cifar100", "mnist": "mnist", "fashion_mnist": "mnist"}


def paper_setup(dataset, training, canary):
    """What the comparison knows of a cell of the paper's configs."""
    setup = _stages.Stages(complete(read(f"config/{PAPER[dataset]}.yaml"))).settings("reproduction")["setup"]
    (cell,) = [c for c in setup if (c["dataset"], c["training"], c["canary"]) == (dataset, training, canary)]
    return cell


@pytest.mark.parametrize(
    ("dataset", "training"), [("cifar10", "dpsgd"), *((dataset, "dpsgd_finetune") for dataset in PAPER)]
)
@pytest.mark.parametrize("canary", ["random", "mislabeled", "metagradient"])
def test_cells_of_the_papers_configs_can_be_compared_with_the_papers_numbers(dataset, training, canary):
    """In every fact that the audits do not hold; the config says the number of runs and canaries, and the game."""
    published = reproduction.read_published(_stages.PUBLISHED)
    of = {"dataset": dataset, "training": training, "canary": canary}
    (number,) = published[(published[list(of)] == pd.Series(of)).all(axis=1)].to_dict("records")
    cell = paper_setup(**of)
    assert cell["matches"] == of
    config = read(f"config/{PAPER[dataset]}.yaml")
    game, num_canaries = config["trainings"][training]["game"], config["canaries"]["num_canaries"]
    own = {"score": "negative_loss", "like_mean": 0.0, "game": game, "num_canaries": num_canaries // 2}
    own["num_runs"] = config["trainings"][training]["num_runs"]
    assert reproduction._differences(number, cell, own) == []


def test_comparison_follows_settings_and_not_names():
    """Of a subset of an altered copy, under other names."""
    config = read("config/config.yaml")
    config |= {"datasets": ["cifar10_jpeg75"], "num_train": 20000, "image_size": 16}
    config["figures"] |= {"figure1_dataset": "cifar10_jpeg75", "figure2_dataset": "cifar10_jpeg75"}
    config["trainings"] = {"sgd": config["trainings"]["sgd"], "mine": config["trainings"]["dpsgd"]}
    stages = _stages.Stages(complete(config))
    (cell,) = [
        c for c in stages.settings("reproduction")["setup"] if (c["training"], c["canary"]) == ("mine", "random")
    ]
    assert cell["dataset"] == "cifar10_jpeg75-train20000"
    assert cell["matches"] == {"dataset": "cifar10", "training": "dpsgd", "canary": "random"}
    facts = cell["facts"]
    assert (facts["dataset"], facts["num_train"], facts["image_size"]) == ("cifar10_jpeg75", 20000, 16)
    # q times all that are no canary, and half of the canaries.
    assert facts["batch_size"] == pytest.approx(0.08275 * (19000 + 500), rel=1e-12)


def test_comparison_is_made_anew_when_published_numbers_change(stages, tmp_path, monkeypatch):
    before = {name: stages.settings(name) for name in ("reproduction", "table1")}
    changed = tmp_path / "published.csv"
    changed.write_text(_stages.PUBLISHED.read_text(encoding="utf-8").replace("0.732", "0.733"), encoding="utf-8")
    monkeypatch.setattr(_stages, "PUBLISHED", changed)
    assert stages.settings("reproduction") != before["reproduction"]
    assert stages.settings("table1") == before["table1"]


def test_blocks_hold_every_run_once(stages):
    blocks = [stages.settings("models", **{**CELL, "block": str(block)}) for block in stages.blocks("dpsgd")]
    assert [block["runs"] for block in blocks] == [[0, 1, 2], [3, 4, 5]]
    assert [block["roles"] for block in blocks] == [["audited"] * 3, ["surrogate", "reference", "reference"]]
    assert tuple(_computed.ROLES) == score_table.ROLES


def test_seeds_of_runs_depend_on_no_number_of_runs_of_another_role(stages):
    """Nor do those of audited runs on roles: they are as before there were any."""

    def seeds(stages):
        blocks = [stages.settings("models", **{**CELL, "block": str(block)}) for block in stages.blocks("dpsgd")]
        found = [pair for block in blocks for pair in zip(block["roles"], block["seeds"], strict=True)]
        return {role: [seed for of, seed in found if of == role] for role in _computed.ROLES}

    before, after = seeds(stages), seeds(changed_stages("trainings.dpsgd.num_runs", 5))
    assert (
        after["audited"][:3] == before["audited"] == [stages.seed("run", "digits", "dpsgd", "8", i) for i in range(3)]
    )
    assert (after["surrogate"], after["reference"]) == (before["surrogate"], before["reference"])


def test_sources_are_followed_through_imports(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    files = {
        "script.py": "import numpy\nimport _helper\nfrom package import a, store\n",
        "_helper.py": "def late():\n    import package.b\n",
        "_other.py": "",
        "package/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.d import D\n",
        "package/b.py": "from package.c import C\n",
        "package/c.py": "from package import b\n",
        "package/d.py": "",
        "package/store.py": "from package import d\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = _sources.sources(tmp_path / "script.py", package)
    assert found[0] == tmp_path / "script.py"
    assert {path.stem for path in found} == {"script", "_helper", "a", "b", "c"}


def test_importing_the_scripts_modules_computes_nothing():
    """Or XLA would have read its flags before `backend.configure` sets them."""
    names = {p.stem for p in (ROOT / "metacanary").glob("*.py")} - {"__init__", "cifar"}
    code = f"import {', '.join(f'metacanary.{name}' for name in sorted(names))}; import jax._src.xla_bridge as bridge; "
    code += "assert not bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_parsing_the_workflow_imports_nothing_slow():
    """Each call of Snakemake and each job on a cluster parses it; a figure is redrawn in seconds."""
    code = "import sys; sys.path.insert(0, 'workflow/scripts'); import _check, _checkpoints, _sources, _stages; "
    code += "from metacanary import bundle_layout; slow = {'jax', 'matplotlib', 'pyarrow.parquet', 'scipy.stats'}; "
    code += "assert not slow & sys.modules.keys(), slow & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.filterwarnings("always")
def test_logged_copies_output_warnings_and_errors(tmp_path, capsys):
    def work():
        with _job.logged(tmp_path / "logs" / "job.log"):
            print("printed")
            print("\r50%\r100%", file=sys.stderr)
            warnings.warn("warned", stacklevel=1)
            logging.getLogger("metacanary").error("logged")
            raise ValueError("raised")

    with pytest.raises(ValueError, match="raised"):
        work()
    log = (tmp_path / "logs" / "job.log").read_text(encoding="utf-8")
    for text in ("printed", "\n50%\n100%", "warned", "logged", "ValueError: raised", "Traceback"):
        assert text in log
    captured = capsys.readouterr()
    assert captured.out == "printed\n"
    assert "\r50%\r100%" in captured.err
    assert "Traceback" not in captured.err  # Python prints it when the error ends the script


def test_check_inputs_refuses_another_config(tmp_path):
    store.write_npz(tmp_path / "canaries.npz", {}, {"config_digest": "old"})
    settings = {"inputs": {"canaries": "new"}}
    job = _job.Job(input={"canaries": tmp_path / "canaries.npz"}, output=None, settings=settings, params=None)
    with pytest.raises(ValueError, match=r"was made with another config \(digest old, expected new\)"):
        job.check_inputs()


def made(path, **provenance):
    """Writes a result of the config "c" with more provenance; returns its path."""
    store.write_npz(path, {}, {"config_digest": "c", **provenance})
    return path


def test_check_inputs_refuses_other_versions(tmp_path):
    paths = [made(tmp_path / f"{jax}.npz", versions={"jax": jax, "numpy": "2"}) for jax in ("1.0", "1.1")]
    job = _job.Job(input={"audits": paths}, output=None, settings={"inputs": {"audits": ["c", "c"]}}, params=None)
    with pytest.raises(ValueError, match=r"made with different versions of jax: jax \(1\.0 and 1\.1\) at path='.*1\.1"):
        job.check_inputs()


def test_code_digests_are_those_of_all_inputs_and_its_own(tmp_path):
    paths = [made(tmp_path / f"{i}.npz", code_digests={"train": [code], "make": ["m"]}) for i, code in enumerate("ab")]
    settings = {"inputs": {"models": ["c", "c"]}}
    params = SimpleNamespace(code="s", config_digest="d")
    job = _job.Job(input={"models": paths}, output=None, settings=settings, params=params, rule="score")
    assert job.provenance()["code_digests"] == {"score": ["s"], "train": ["a", "b"], "make": ["m"]}


def test_checkpoints_are_not_taken_up_across_versions_or_devices(tmp_path, monkeypatch):
    params = SimpleNamespace(checkpoints=tmp_path, code="s", config_digest="d")
    job = _job.Job(input=None, output=None, settings={}, params=params)
    versions, device = store.versions(), store.device()
    folder = job.checkpoints
    assert folder == job.checkpoints
    monkeypatch.setattr(store, "versions", lambda: {**versions, "pandas": "0"})
    assert job.checkpoints == folder  # has no part in training
    monkeypatch.setattr(store, "versions", lambda: {**versions, "jaxlib": "0"})
    other_version = job.checkpoints
    monkeypatch.setattr(store, "versions", lambda: versions)
    monkeypatch.setattr(store, "device", lambda: {**device, "kind": "abacus"})
    assert len({folder, other_version, job.checkpoints}) == 3


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (FloatingPointError("logits are\nnot finite"), "error: logits are not finite"),
        (
            FileNotFoundError(2, "No such file or directory", "x.npz"),
            "error: [Errno 2] No such file or directory: 'x.npz'",
        ),
        (KeyError("bug"), None),
    ],
)
def test_running_explains_an_error_in_one_line(tmp_path, monkeypatch, capsys, error, ended):
    for name in ("XLA_FLAGS", "NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE", *CACHE):
        monkeypatch.setenv(name, "")
    params = SimpleNamespace(settings={}, code="s", config_digest="d")
    job = SimpleNamespace(input=None, output=None, threads=1, log=[tmp_path / "log"], params=params, rule="score")
    with pytest.raises(type(error) if ended is None else SystemExit) as raised, _job.running(job):
        raise error
    assert ended is None or raised.value.code == ended
    assert "Traceback" in (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            ROOT / "config" / "digits.yaml",
            {"optimize_canaries": 2, **dict.fromkeys(("score_dirac", "audit_dirac", "make_ledger", "plot_ledger"), 1)},
        ),
        (None, {"make_canaries": 3, "pretrain_model": 1, "train_audit_models": 540, "compute_epsilon": 60}),
    ],
)
def test_dry_run_plans_every_rule(tmp_path, config, expected):
    planned = snakemake(tmp_path, "--dry-run", config=config)
    assert planned.status == 0, planned.text
    jobs = counts(planned.text)
    assert jobs.keys() == {*RULES, *expected}
    assert {name: jobs[name] for name in expected} == expected
    assert jobs["train_audit_models"] == jobs["score_membership"]


def test_lint_is_clean(tmp_path):
    linted = snakemake(tmp_path, "--lint")
    assert linted.status == 0, linted.text
    assert "Congratulations" in linted.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": -1}, "config error: seed: got -1, expected a number >= 0"),
        (
            {"trainings__sgd__canaries": ["clipbkd"]},
            "config error: trainings.sgd.canaries: got 'clipbkd', "
            "expected one of random, metagradient, variant (canaries.kinds)",
        ),
    ],
)
def test_wrong_config_ends_in_one_line_before_anything_is_written(tmp_path, changes, expected):
    config = changed(tmp_path, **changes)
    refused = snakemake(tmp_path / "run", config=config)
    assert refused.status == 1
    lines = [line for line in refused.text.splitlines() if not line.startswith("Using workflow specific profile")]
    assert lines == [expected]
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".snakemake"}  # Snakemake's own log


def test_tiny_run_audits_every_cell(tiny):
    table = store.read_csv(tiny / "results/tiny/summary/epsilon.csv")
    assert tuple(table.columns) == summary.COLUMNS
    cells = table[["canary", "training", "epsilon", "step"]].drop_duplicates()
    expected = {("random", "sgd", np.inf, 2), ("random", "sgd", np.inf, 4), ("random", "dpsgd", 8.0, 3)}
    expected |= {("metagradient", "sgd", np.inf, 2), ("metagradient", "sgd", np.inf, 4)}
    assert set(cells.itertuples(index=False, name=None)) == expected
    private = table[table["training"] == "dpsgd"]
    assert set(private["run"]) == {"0", "1", "2", "pooled"}
    assert set(private["adjacency"]) == {"replace_one"}
    assert (table["epsilon_lower"] <= table["ceiling"]).all()


def test_tiny_run_leaves_every_target_and_no_checkpoint(tiny, stages):
    results = tiny / "results" / "tiny"
    for name in ("table1", "table2", "bounds", "reproduction"):
        for suffix in ("csv", "md", "tex"):
            assert (results / "tables" / f"{name}.{suffix}").stat().st_size > 0
    verdicts = store.read_csv(results / "tables/reproduction.csv")["verdict"].value_counts().to_dict()
    assert verdicts == {reproduction.NOT_RUN: 15, reproduction.NOT_PUBLISHED: len(stages.cells())}
    for name in ("figure1.pdf", "figure1.png", "figure2.pdf", "figure2.png"):
        assert (results / "figures" / name).stat().st_size > 0
    assert 500_000 < (results / "audits.html").stat().st_size < 2_500_000
    assert [path for path in (results / "checkpoints").rglob("*") if path.is_file()] == []


def test_tiny_run_measures_metasmoothness(tiny, stages):
    results = tiny / "results" / "tiny"
    measured = store.read_csv(results / "metasmoothness/digits/variant.csv")
    settings = stages.settings("metasmoothness", **WILDCARDS["metasmoothness"])
    assert measured["seed"].tolist() == settings["seeds"]
    assert measured["metasmoothness"].between(-1, 1).all()
    table = store.read_csv(results / "tables/metasmoothness.csv")
    assert table["metasmoothness_mean"].tolist() == pytest.approx([measured["metasmoothness"].mean()], rel=1e-12)
    history = store.read_csv(results / "canaries/digits/variant/history.csv")
    reduction = history["objective"].iloc[0] - history["objective"].iloc[-1]
    assert table["objective_reduction"].tolist() == pytest.approx([reduction], rel=1e-12)
    for name in ("tables/metasmoothness.md", "tables/metasmoothness.tex", "figures/metasmoothness.pdf"):
        assert (results / name).stat().st_size > 0


TAN = {
    "training": "dpsgd",
    "batch_size": 10,
    "num_runs": 2,
    "num_validation": 100,
    "learning_rates": [0.5, 1.0],
    "batch_sizes": [5, 10],
    "noise_factors": [1.0],
}


def tan_stages(path="seed", value=1):
    """The stages of the tiny config with a search of settings, and one value changed."""
    config = read("tests/tiny.yaml") | {"tan": dict(TAN)}
    *parents, last = path.split(".")
    functools.reduce(operator.getitem, parents, config)[last] = value
    return _stages.Stages(complete(config))


TRIALS = ["search0", "search1", "scaling0", "scaling1", "scaling2", "prediction", "full"]


def test_tan_has_a_trial_for_each_setting():
    """The grid has the full batch too; seeds of the search are no others', the last two share theirs."""
    assert [trial["trial"] for trial in tan_stages().trials()] == TRIALS
    assert _stages.Stages(complete(read("tests/tiny.yaml"))).trials() == []
    found = {trial: tan_stages().settings("tan", dataset="digits", trial=trial) for trial in TRIALS}
    assert [found[f"scaling{i}"]["batch_size"] for i in range(3)] == [5, 10, None]
    assert [found[f"search{i}"]["candidate"]["learning_rate"] for i in range(2)] == [0.5, 1.0]
    assert found["search0"]["candidate"]["num_steps"] == 3  # the reference's
    assert all(settings["epsilon"] == 8.0 for settings in found.values())
    assert found["search0"]["seeds"] == found["search1"]["seeds"]
    assert found["prediction"]["seeds"] == found["full"]["seeds"]
    assert len({seed for trial in ("search0", "scaling0", "full") for seed in found[trial]["seeds"]}) == 3 * 2
    assert [trial for trial in TRIALS if "num_validation" in found[trial]] == ["search0", "search1"]
    searched = [tan_stages().digest("tan", dataset="digits", trial=name) for name in ("search0", "search1")]
    assert found["full"]["inputs"] == found["prediction"]["inputs"] == {"searched": searched}


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("seed", 2, {*TRIALS}),
        ("delta", 1e-6, {*TRIALS}),
        ("tan.epsilon", 4, {*TRIALS}),
        ("tan.num_runs", 3, {*TRIALS}),
        ("trainings.dpsgd.options.momentum", 0.5, {*TRIALS}),
        ("tan.num_validation", 200, {"search0", "search1", "prediction", "full"}),
        ("tan.batch_size", 8, {"search0", "search1", "prediction", "full"}),
        ("tan.learning_rates", [0.5, 2.0], {"search1", "prediction", "full"}),
        ("tan.noise_factors", [2.0], {"scaling0", "scaling1", "scaling2"}),
        ("tan.batch_sizes", [5, 20], {"scaling1"}),
        ("trainings.dpsgd.num_runs", 9, set()),
    ],
)
def test_settings_of_tan_hold_what_a_trial_depends_on_and_no_more(path, value, changed):
    first, other = tan_stages(), tan_stages(path, value)
    digests = [{t: s.digest("tan", dataset="digits", trial=t) for t in TRIALS} for s in (first, other)]
    assert {trial for trial in TRIALS if digests[0][trial] != digests[1][trial]} == changed
    for stage in ("tan_table", "tan_figure"):
        assert (first.digest(stage) != other.digest(stage)) == bool(changed)


def test_recipes_of_tan_are_simulations_but_for_the_full_run():
    """All but it have the noise of their batch and no target; it has what the accountant asks for."""
    stages = tan_stages()
    options = stages.settings("tan", dataset="digits", trial="full")["options"]
    reference = _build.recipe("dpsgd", options | {"noise_multiplier": 1.25})
    searched = [pd.DataFrame({"accuracy": [a], "num_gradients": [1.0]}) for a in (0.6, 0.9)]

    def recipe(trial, num_trained=1437):
        settings = stages.settings("tan", dataset="digits", trial=trial)
        return train_tan.recipe(settings, reference, searched, 1437, num_trained)

    full_batch = 0.02 * 1437
    for trial, batch, rate, trained in [
        ("search0", 10, 0.5, 1337),
        ("search1", 10, 1.0, 1337),
        ("prediction", 10, 1.0, 1437),
        ("scaling0", 5, 1.0, 1437),
        ("scaling2", full_batch, 1.0, 1437),
    ]:
        found = recipe(trial, trained)
        assert (found.target, found.learning_rate) == (None, rate), trial
        assert found.sampling_prob * trained == pytest.approx(batch, rel=1e-12)
        assert found.noise_multiplier == pytest.approx(1.25 * batch / full_batch, rel=1e-12)
    full = recipe("full")
    assert (full.target.epsilon, full.sampling_prob, full.learning_rate) == (8.0, 0.02, 1.0)


DIRAC_CELL = {"dataset": "digits", "training": "dpsgd", "epsilon": "8"}
LEDGER = {"dirac": DIRAC_CELL, "dirac_audits": DIRAC_CELL, "ledger": {}, "ledger_figure": {}}
LEDGER_TINY = {"trainings.dpsgd.game": "independent", "ledger": {"trainings": ["dpsgd"]}}


def ledger_stages(path=None, value=None):
    """The stages of the tiny config with a ledger, and one value changed."""
    config = read("tests/tiny.yaml")
    for key, new in (LEDGER_TINY | ({path: value} if path else {})).items():
        *parents, last = key.split(".")
        functools.reduce(operator.getitem, parents, config)[last] = new
    return _stages.Stages(complete(config))


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("seed", 2, {*LEDGER}),
        ("canaries.num_canaries", 12, {*LEDGER}),
        ("delta", 1e-6, {*LEDGER}),
        ("audit.accountant", "rdp", {*LEDGER}),
        ("trainings.dpsgd.options.num_steps", 4, {*LEDGER}),
        ("trainings.dpsgd.num_surrogate_runs", 2, {*LEDGER}),
        ("audit.guess_fraction", 1.0, {*LEDGER} - {"dirac"}),
        ("significance", 0.01, {*LEDGER} - {"dirac"}),
        ("tables.protocol", "fixed", {*LEDGER} - {"dirac"}),
        ("ledger.auditor", "steinke", {*LEDGER} - {"dirac"}),
        ("canaries.kinds.metagradient.num_metasteps", 3, {"ledger", "ledger_figure"}),  # they share the summary
        ("trainings.dpsgd.options.learning_rate", 2.0, {"ledger", "ledger_figure"}),
        ("figures.figure1_num_shown", 4, set()),
    ],
)
def test_settings_of_the_ledger_hold_what_it_depends_on_and_no_more(path, value, changed):
    stages = ledger_stages(), ledger_stages(path, value)
    first, other = ({name: s.digest(name, **cell) for name, cell in LEDGER.items()} for s in stages)
    assert {name for name in LEDGER if first[name] != other[name]} == changed


def test_dirac_canaries_are_in_the_runs_that_are_audited():
    stages = ledger_stages()
    blocks = [stages.settings("models", **CELL, block=str(block)) for block in stages.blocks("dpsgd")]
    found = stages.settings("dirac", **DIRAC_CELL)
    for name in ("runs", "roles", "seeds"):
        assert found[name] == [value for block in blocks for value in block[name]]
    assert found["num_canaries"] + found["num_others"] == 1437


@pytest.mark.slow
def test_target_ledger_audits_dirac_canaries_beside_the_others(tmp_path):
    """In the runs of all roles, with their coins; then nothing is left to do."""
    chosen = {path.replace(".", "__"): value for path, value in LEDGER_TINY.items()}
    config = changed(tmp_path, **chosen, trainings__sgd__canaries=["random"])
    planned = counts(snakemake(tmp_path, "--dry-run", "--", "ledger", config=config).text)
    assert [planned[name] for name in ("score_dirac", "audit_dirac", "make_ledger", "plot_ledger")] == [1, 1, 1, 1]
    assert "optimize_canaries" not in planned
    run = snakemake(tmp_path, "--", "ledger", config=config)
    assert run.status == 0, run.text
    results = tmp_path / "results/tiny"
    table = pd.read_csv(results / "tables/ledger.csv")
    assert table["claim"].tolist()[:5] == [
        *("accounted, RDP", "accounted, PLD", "last iterate, heuristic", "Dirac, all iterates", "Dirac, last iterate")
    ]
    assert table["num_runs"].dropna().eq(3).all()
    assert (results / "figures/ledger.png").stat().st_size > 10_000
    scores = pd.read_csv(results / "dirac/digits/dpsgd/eps8/scores.csv")
    models = pd.concat(pd.read_csv(path) for path in (results / "scores/digits/random/dpsgd/eps8").glob("block*.csv"))
    coins = [
        rows.drop_duplicates(["run", "canary_id"]).set_index(["run", "canary_id"])["included"].sort_index()
        for rows in (scores, models)
    ]
    pd.testing.assert_series_equal(*coins)
    assert "Nothing to be done" in snakemake(tmp_path, "--dry-run", "--", "ledger", config=config).text


COMPARISONS = {
    "starts": {"canaries": ["random", "metagradient"], "by": "start"},
    "expense": {"canaries": ["random", "metagradient"], "by": "cost"},
    "transfer": {"canaries": ["random"], "by": "model"},
}


def compared_stages(path="seed", value=1):
    """The stages of the tiny config with comparisons, and one value changed."""
    config = read("tests/tiny.yaml") | {"comparisons": json.loads(json.dumps(COMPARISONS))}
    *parents, last = path.split(".")
    functools.reduce(operator.getitem, parents, config)[last] = value
    return _stages.Stages(complete(config))


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("seed", 2, {*COMPARISONS}),
        ("audit.guess_fraction", 1.0, {*COMPARISONS}),
        ("trainings.dpsgd.num_runs", 4, {*COMPARISONS}),  # they share the summary
        ("tables.protocol", "fixed", {*COMPARISONS}),
        ("comparisons.starts.auditor", "fdp_gaussian", {"starts"}),
        ("comparisons.starts.canaries", ["metagradient", "random"], {"starts"}),
        ("comparisons.transfer.trainings", ["dpsgd"], {"transfer"}),
        ("figures.figure1_num_shown", 4, set()),
    ],
)
def test_settings_of_comparisons_hold_what_they_depend_on_and_no_more(path, value, changed):
    first, other = compared_stages(), compared_stages(path, value)
    for stage in ("comparison", "comparison_figure"):
        digests = [{n: s.digest(stage, comparison=n) for n in COMPARISONS} for s in (first, other)]
        assert {name for name in COMPARISONS if digests[0][name] != digests[1][name]} == changed


def test_costs_are_of_the_jobs_that_are_compared():
    """Of the cells of trainings that are audited with all of the kinds: sgd alone, of which five runs are a block."""
    jobs = compared_stages().costs()
    cells = [
        {"dataset": "digits", "canary": kind, "training": "sgd", "epsilon": "inf"}
        for kind in ("random", "metagradient")
    ]
    assert jobs["optimize_canaries"] == [{"dataset": "digits", "canary": "metagradient"}]
    assert jobs["compute_epsilon"] == cells
    assert jobs["train_audit_models"] == jobs["score_membership"] == [cell | {"block": "0"} for cell in cells]
    settings = compared_stages().settings("cost")
    assert {name: len(paths) for name, paths in settings["inputs"].items()} == {name: len(jobs[name]) for name in jobs}
    assert not any(_stages.Stages(complete(read("tests/tiny.yaml"))).costs().values())


STYLED = {
    **{name: {} for name in ("figure1", "figure2", "metasmoothness_figure", "report_page")},
    **{name: {} for name in ("tan_figure", "accuracy_figure", "ledger_figure")},
    "comparison_figure": {"comparison": "starts"},
}
UNSTYLED = {
    **{name: {} for name in ("table1", "tan_table", "accuracy", "ledger")},
    "comparison": {"comparison": "starts"},
}


def style_digests():
    """Digests of all figures and of the tables that they are drawn from."""
    config = read("tests/tiny.yaml") | {"tan": TAN, "comparisons": COMPARISONS, "ledger": {"trainings": ["dpsgd"]}}
    config["trainings"]["dpsgd"]["game"] = "independent"
    config["accuracy"] = {"trainings": ["dpsgd"], "canary": "random"}
    found = _stages.Stages(complete(config))
    return {name: found.digest(name, **wildcards) for name, wildcards in (STYLED | UNSTYLED).items()}


def test_figures_depend_on_the_style_sheet(monkeypatch):
    before = style_digests()
    monkeypatch.setattr(_stages, "figure_style", lambda: "other")
    after = style_digests()
    assert {name for name in before if after[name] != before[name]} == {*STYLED}


@pytest.mark.parametrize("name", ["description", "url", "licence", "class_names"])
def test_bundle_depends_on_what_it_says_of_data_sets(stages, monkeypatch, name):
    """The registry is no part of the digest of code."""
    sources = data.SOURCES | {"digits": dataclasses.replace(data.SOURCES["digits"], **{name: "other"})}
    before = stages.digest("bundle")
    monkeypatch.setattr(data, "SOURCES", sources)
    other = _stages.Stages(complete(read("tests/tiny.yaml")))
    assert other.digest("bundle") != before
    assert other.digest("report_page") == stages.digest("report_page")


def test_target_of_a_comparison_makes_it_alone(tmp_path):
    config = changed(tmp_path, comparisons=COMPARISONS)
    planned = snakemake(tmp_path, "--dry-run", "--", "comparison_starts", config=config)
    assert planned.status == 0, planned.text
    jobs = counts(planned.text)
    assert {name: jobs.get(name) for name in ("make_comparison", "plot_comparison", "collect_cost", "make_table1")} == {
        "make_comparison": 1,
        "plot_comparison": 1,
        "collect_cost": None,
        "make_table1": None,
    }
    every = counts(snakemake(tmp_path, "--dry-run", "--", "comparisons", config=config).text)
    assert (every["make_comparison"], every["plot_comparison"], every["collect_cost"]) == (3, 3, 1)


@pytest.mark.slow
def test_comparisons_of_a_finished_run_train_nothing(copied):
    """Each has a table and a figure; costs are those that the jobs say, and then nothing is left to do."""
    config = changed(copied, comparisons=COMPARISONS)
    run = snakemake(copied, "--", "comparisons", config=config)
    assert run.status == 0, run.text
    assert not {"train_audit_models", "optimize_canaries", "compute_epsilon"} & counts(run.text).keys()
    results = copied / "results/tiny"
    for name in COMPARISONS:
        for path in (
            *(f"tables/comparison_{name}.{s}" for s in ("csv", "md", "tex")),
            f"figures/comparison_{name}.pdf",
        ):
            assert (results / path).stat().st_size > 0
    costs = store.read_csv(results / "summary/cost.csv").set_index(["stage", "canary"])["seconds"]
    made = store.read_provenance(results / "canaries/digits/metagradient/history.csv")
    history = store.read_csv(results / "canaries/digits/metagradient/history.csv")["seconds"].sum()
    assert costs["optimize_canaries", "metagradient"] == pytest.approx(max(made["wall_seconds"], history), rel=1e-12)
    table = store.read_csv(results / "tables/comparison_expense.csv").set_index("canary")
    assert table["audit_seconds"]["random"] == pytest.approx(costs[:, "random"].sum(), rel=1e-12)
    assert table["num_trainings"]["metagradient"] == 20
    assert "Nothing to be done" in snakemake(copied, "--dry-run", "--", "comparisons", config=config).text


def test_target_tan_trains_its_trials_alone(tmp_path):
    planned = snakemake(tmp_path, "--dry-run", "--", "tan", config=changed(tmp_path, tan=TAN))
    assert planned.status == 0, planned.text
    assert counts(planned.text) == {"download": 1, "train_tan": 7, "make_tan": 1, "plot_tan": 1, "tan": 1}


@pytest.mark.slow
def test_target_tan_makes_a_table_and_a_figure_from_its_runs(tmp_path):
    """The smallest: what was chosen on validation images is trained at full size; then nothing is left to do."""
    config = changed(tmp_path, tan=TAN | {"batch_sizes": [10]})
    run = snakemake(tmp_path, "--", "tan", config=config)
    assert run.status == 0, run.text
    results = tmp_path / "results/tiny"
    table = store.read_csv(results / "tables/tan.csv")
    assert table["stage"].tolist() == ["search"] * 2 + ["scaling"] * 2 + ["prediction", "full"]
    chosen = table[table["chosen"]].iloc[0]
    assert chosen["accuracy_mean"] == table.loc[table["stage"] == "search", "accuracy_mean"].max()
    full, predicted = (table[table["stage"] == stage].iloc[0] for stage in ("full", "prediction"))
    assert full["learning_rate"] == predicted["learning_rate"] == chosen["learning_rate"]
    assert 8 - 0.01 <= full["epsilon_full"] <= 8
    assert full["epsilon_spent"] == pytest.approx(full["epsilon_full"], rel=0.5)  # RDP's of the same run
    made = store.read_provenance(results / "tan/digits/full.csv")
    assert made["config_digest"] == store.digest(made["settings"])
    assert made["seed"] == store.read_csv(results / "tan/digits/full.csv")["seed"].tolist()
    for name in ("tables/tan.md", "tables/tan.tex", "figures/tan.pdf", "figures/tan.png"):
        assert (results / name).stat().st_size > 0
    assert "Nothing to be done" in snakemake(tmp_path, "--dry-run", "--", "tan", config=config).text
    assert not list((results / "checkpoints").rglob("*.json"))


def test_target_metasmoothness_trains_no_audited_model(tmp_path):
    planned = snakemake(
        tmp_path, "--dry-run", "--", "metasmoothness", config=ROOT / "config" / "digits_metasmoothness.yaml"
    )
    assert planned.status == 0, planned.text
    assert counts(planned.text) == {
        "download": 1,
        "measure_metasmoothness": 11,
        "optimize_canaries": 11,
        "make_metasmoothness": 1,
        "plot_metasmoothness": 1,
        "metasmoothness": 1,
    }


def test_tiny_run_says_how_each_result_was_made(tiny, stages):
    results = tiny / "results" / "tiny"
    tables = [path for path in results.rglob("*.csv") if path.parent.name != "benchmarks"]
    for path in [*tables, *results.rglob("*.npz"), *results.rglob("*.pdf")]:
        made = store.read_provenance(path)
        assert made["config_digest"] == store.digest(made["settings"]), path
        assert made["wall_seconds"] > 0
        assert made["device"]["platform"] == "cpu"
    models = store.read_provenance(results / "models/digits/random/dpsgd/eps8/block1.npz")
    assert models["config_digest"] == stages.digest("models", **{**CELL, "block": "1"})


def test_tiny_run_flips_the_coins_of_its_game(tiny):
    models = tiny / "results" / "tiny" / "models" / "digits"
    random, _ = store.read_npz(models / "random/sgd/epsinf/block0.npz")
    optimized, _ = store.read_npz(models / "metagradient/sgd/epsinf/block0.npz")
    np.testing.assert_array_equal(random["included"], optimized["included"])
    assert not np.array_equal(random["included"][0], random["included"][1])
    paired, _ = store.read_npz(models / "random/dpsgd/eps8/block0.npz")
    np.testing.assert_array_equal(paired["included"][:, ::2], ~paired["included"][:, 1::2])


@pytest.mark.parametrize(
    ("cell", "num_blocks", "roles"),
    [("sgd/epsinf", 1, ["audited"] * 2 + ["surrogate"]), ("dpsgd/eps8", 2, ["audited"] * 3 + ["surrogate"])],
)
def test_tiny_run_has_runs_of_every_role(tiny, cell, num_blocks, roles):
    """Numbered through; each audited and surrogate run on coins of its own, reference runs on no canary."""
    results = tiny / "results/tiny"
    blocks = [store.read_npz(results / f"models/digits/random/{cell}/block{b}.npz")[0] for b in range(num_blocks)]
    role, run, included = (np.concatenate([block[name] for block in blocks]) for name in ("role", "run", "included"))
    assert role.tolist() == [*roles, "reference", "reference"]
    assert run.tolist() == list(range(len(role)))
    assert len({coins.tobytes() for coins in included[:-2]}) == len(roles)
    assert included[:-2].any(axis=1).all()
    assert not included[-2:].any()
    listed = pd.concat(
        [store.read_csv(results / f"scores/digits/random/{cell}/runs{b}.csv") for b in range(num_blocks)]
    )
    assert dict(zip(listed["run"], listed["role"], strict=True)) == dict(zip(run, role, strict=True))


def test_tiny_run_audits_every_score_of_audited_runs(tiny):
    """Those of a block stand in its file, all others in the summary alone; the population is that of the config."""
    table = store.read_csv(tiny / "results/tiny/summary/epsilon.csv")
    names = complete(read("tests/tiny.yaml"))["audit"]["scores"]
    assert set(table["score"]) == set(names)
    assert set(table.loc[table["training"] == "sgd", "run"]) == {"0", "1", "pooled"}
    for score, rows in table[(table["run"] == "0") & (table["protocol"] == "fixed")].groupby("score"):
        assert rows["auroc"].notna().all(), score
    folder = tiny / "results/tiny/scores/digits/random/sgd/epsinf"
    assert set(store.read_csv(folder / "block0.csv")["score"]) == {*names} - {*reference_scores.MIN_REFERENCES}
    population, _ = store.read_npz(folder / "population0.npz")
    assert population["log_probability"].shape == (5, 2, 20)


def test_reference_runs_see_no_canary_and_runs_know_their_start(tiny, stages):
    """An epoch, so that all that is included is seen: with other pixels a reference run ends in the same bits."""
    dataset = data.load("digits", tiny / "results/data")
    arrays, _ = store.read_npz(tiny / "results/tiny/canaries/digits/random/canaries.npz")
    plain = canaries.Canaries.from_arrays(arrays)
    inverted = canaries.Canaries.from_arrays(arrays | {"images": 1 - arrays["images"]})
    settings = stages.settings("models", **{**CELL, "training": "sgd", "epsilon": "inf", "block": "0"})
    settings |= {"snapshots": [10], "game": "paired"}
    settings["options"] |= {"num_steps": 10, "batch_size": 143}
    model = _build.model(settings["model"], len(dataset.class_names))
    chosen = train_audit_models.recipe(settings)

    def run(role, inserted):
        return train_audit_models.train_runs(settings, chosen, model, dataset, inserted, [role], seeds=[7])[0]

    for role, is_blind in (("reference", True), ("surrogate", False), ("audited", False)):
        one, other = run(role, plain), run(role, inverted)
        parameters = [name for name in one if name.startswith("params/")]
        assert is_blind == all(np.array_equal(one[name], other[name]) for name in parameters), role
        assert one["included"].sum() == (0 if is_blind else 5)
    pool = _build.pool(settings, dataset, plain)
    start = train_audit_models.training.initial_state(chosen, model, pool, one["included"], seed=7)["params"]
    for path, leaf in flatten_dict(start, sep="/").items():
        np.testing.assert_array_equal(one[f"initial/{path}"], leaf)


def test_tiny_run_draws_the_noise_of_its_target(tiny, stages):
    arrays, _ = store.read_npz(tiny / "results/tiny/models/digits/random/dpsgd/eps8/block0.npz")
    settings = stages.settings("models", **{**CELL, "block": "0"})
    (noise,) = set(arrays["noise_multiplier"].tolist())
    mechanism = {name: settings["options"][name] for name in ("sampling_prob", "num_steps")}
    found = accounting.epsilon(noise_multiplier=noise, delta=settings["delta"], **mechanism)
    assert 8 - 0.01 <= found <= 8  # no more noise than the calibration's tolerance asks for


def test_tiny_run_shows_progress_in_log_and_terminal(tiny):
    bar = re.compile(r"metagradient: 100%.* 80/80 \[.*(step/s|s/step)")
    log = tiny / "results/tiny/logs/optimize_canaries/digits/metagradient.log"
    assert bar.search(log.read_text(encoding="utf-8"))
    assert bar.search((tiny / "log").read_text(encoding="utf-8"))


def test_finished_run_has_nothing_to_do(tiny):
    assert "Nothing to be done" in snakemake(tiny, "--dry-run").text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"figures__figure2_auditor": "fdp_gaussian"}, {"plot_figure2": 1, "make_report_page": 1}),
        (
            {"audit__guess_fraction": 1.0},
            {
                "compute_epsilon": 3,
                "collect_epsilon": 1,
                "make_table1": 1,
                "make_table2": 1,
                "make_bounds": 1,
                "make_reproduction": 1,
                "plot_figure2": 1,
                "make_report_page": 1,
            },
        ),
    ],
)
def test_changed_option_reruns_what_depends_on_it(tiny, tmp_path, changes, expected):
    planned = snakemake(tiny, "--dry-run", config=changed(tmp_path, **changes))
    assert counts(planned.text) == {**expected, "all": 1}, planned.text


def test_results_of_another_config_are_refused(copied, tmp_path):
    """Where Snakemake is told not to look at params."""
    only = ["--rerun-triggers", "mtime", "--allowed-rules", "collect_epsilon", "--force", "--"]
    config = changed(tmp_path, audit__guess_fraction=1.0)
    refused = snakemake(copied, *only, "results/tiny/summary/epsilon.csv", config=config)
    assert refused.status == 1
    assert re.search(
        r"^error: path='.*/epsilon.csv' was made with another config \(digest ", refused.text, re.MULTILINE
    )
    assert "Traceback" not in refused.text
    log = (copied / "results/tiny/logs/collect_epsilon.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "ValueError: path=" in log


def test_data_fetched_again_reruns_nothing_and_hides_no_missing_figure(copied):
    """The arrays are the same: an input marked `ancient` would have let Snakemake end without the figure."""
    again = snakemake(copied, "--force", "--", "results/data/digits/provenance.json")
    assert again.status == 0, again.text
    assert counts(again.text) == {"download": 1}
    assert "Nothing to be done" in snakemake(copied, "--dry-run").text
    figure = copied / "results/tiny/figures/figure1.png"
    figure.unlink()
    drawn = snakemake(copied, "--forcerun", "download")
    assert drawn.status == 0, drawn.text
    assert figure.exists()


def demo_commands():
    """The calls of Snakemake that `make demo` makes, one after the other: their arguments."""
    variables = {"DEMO": TINY, "CORES": 2, "BIN": Path(sys.executable).parent}
    call = ["make", "--dry-run", "--no-print-directory", "--assume-old=setup", "demo"]
    done = subprocess.run(
        [*call, *(f"{k}={v}" for k, v in variables.items())], cwd=ROOT, capture_output=True, text=True, check=True
    )
    script = re.search(r"sh -ec '(.*?)'", done.stdout, re.DOTALL).group(1)
    commands = [shlex.split(part.replace("\\\n", " ").strip().removeprefix("exec ")) for part in script.split(";")]
    assert all(words[1:3] == ["-m", "snakemake"] for words in commands)
    return [words[3:] for words in commands]


def kill_after_checkpoint(folder, checkpoint, *arguments):
    """Starts Snakemake and kills it, with its jobs, when a file of that name appears under the results."""
    run = subprocess.Popen(
        command(folder, *arguments), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=-3
    )
    try:
        deadline = time.monotonic() + 200
        while not list((folder / "results/tiny/checkpoints").rglob(checkpoint)):
            assert run.poll() is None, "ended before there was a checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def test_killed_optimization_goes_on_to_the_same_canaries(tiny, tmp_path):
    """SIGKILL after some metasteps; then what `make demo` does: it unlocks the folder, and goes on to the same bits."""
    canaries = Path("results/tiny/canaries/digits/metagradient/canaries.npz")
    shutil.copytree(tiny / "results/data", tmp_path / "results/data")
    kill_after_checkpoint(tmp_path, "state.npz", "--", canaries)
    (checkpoint,) = (tmp_path / "results/tiny/checkpoints").rglob("state.npz")
    step = int(store.read_npz(checkpoint)[0]["leaf['step']"])
    assert 1 <= step < 20
    assert not (tmp_path / canaries).exists()
    assert "LockException" in snakemake(tmp_path, "--", canaries).text
    unlock, go_on = demo_commands()
    assert ("--unlock" in unlock, "--unlock" in go_on) == (True, False)
    assert snakemake(tmp_path, *unlock, config=None).status == 0
    resumed = snakemake(tmp_path, *go_on, "--", canaries, config=None)
    assert resumed.status == 0, resumed.text
    assert re.search(rf"goes on from .*state.npz, after metastep {step}\n", resumed.text)
    expected, found = store.read_npz(tiny / canaries)[0], store.read_npz(tmp_path / canaries)[0]
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert not checkpoint.exists()


class Interrupted(Exception):
    """What ends a block in its middle."""


class Bar:
    """A progress bar that ends the block at a step, and counts those that are trained."""

    def __init__(self, total, unit, description, *, initial=0, stop=None):
        self.n = self.initial = initial
        self.total, self.stop, self.trained = total, stop, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, steps):
        self.n += steps
        self.trained += 1
        if self.n == self.stop:
            raise Interrupted

    def set_postfix(self, **shown):
        pass


def test_interrupted_block_goes_on_to_the_same_models(tiny, stages, tmp_path, monkeypatch):
    """An error in the middle of the second run; the first is not trained again, and all is as in a block in one go.

    The first is a surrogate run, the second a reference run.
    """
    dataset = data.load("digits", tiny / "results/data")
    inserted = canaries.Canaries.from_arrays(
        store.read_npz(tiny / "results/tiny/canaries/digits/random/canaries.npz")[0]
    )
    cell = {"dataset": "digits", "canary": "random", "training": "sgd", "epsilon": "inf", "block": "0"}
    settings = stages.settings("models", **cell)
    settings |= {name: settings[name][2:4] for name in ("runs", "roles", "seeds")}
    assert settings["roles"] == ["surrogate", "reference"]
    train, bars = train_audit_models.training.train, []
    checkpointing = functools.partial(train, checkpoint_seconds=-1.0)  # after every step
    monkeypatch.setattr(train_audit_models.training, "train", checkpointing)

    def block(folder, stop=None):
        bars.append(None)
        monkeypatch.setattr(
            train_audit_models, "progress", lambda *a, **k: bars.__setitem__(-1, Bar(*a, stop=stop, **k)) or bars[-1]
        )
        return train_audit_models.train_block(settings, dataset, inserted, tmp_path / folder)

    undisturbed = block("undisturbed")
    with pytest.raises(Interrupted):
        block("killed", stop=6)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        "run2.npz",
        "run2-training.npz",
        "run3-training.npz",
    }
    resumed = block("killed")
    assert [bar.trained for bar in bars] == [8, 6, 2]
    assert (bars[-1].n, bars[-1].total, bars[-1].initial) == (8, 8, 6)
    assert resumed.keys() == undisturbed.keys()
    for name, array in undisturbed.items():
        np.testing.assert_array_equal(resumed[name], array)


PUBLIC = {"pretraining": "public"}
FINE_TUNED = {"dataset": "digits-train1000", "canary": "random", "training": "dpsgd", "epsilon": "8", "block": "0"}
SCRATCH = FINE_TUNED | {"training": "sgd", "epsilon": "inf"}


def fine_tuning_stages(path=None, value=None):
    """The stages of the tiny config whose private models are fine-tuned, with one value changed."""
    return _stages.Stages(complete(fine_tuning(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("pretrainings.public.options.learning_rate", 0.2, {"pretrained", "fine-tuned"}),
        ("pretrainings.public.num_train", 100, {"pretrained", "fine-tuned"}),
        ("image_size", 16, {"pretrained", "fine-tuned", "scratch"}),
        ("channels", 3, {"pretrained", "fine-tuned", "scratch"}),
        ("seed", 2, {"pretrained", "fine-tuned", "scratch"}),
        ("trainings.dpsgd.pretraining", None, {"fine-tuned"}),
        ("trainings.sgd.pretraining", "public", {"scratch"}),
        ("trainings.dpsgd.options.trainable", "last", {"fine-tuned"}),
        ("canaries.num_canaries", 12, {"fine-tuned", "scratch"}),
        ("trainings.dpsgd.num_runs", 4, set()),
    ],
)
def test_pretraining_is_part_of_what_is_fine_tuned_alone(path, value, changed):
    def digests(stages):
        models = {"fine-tuned": FINE_TUNED, "scratch": SCRATCH}
        return {name: stages.digest("models", **cell) for name, cell in models.items()} | {
            "pretrained": stages.digest("pretrained", **PUBLIC)
        }

    before, after = digests(fine_tuning_stages()), digests(fine_tuning_stages(path, value))
    assert {name for name in before if before[name] != after[name]} == changed


def test_training_from_scratch_has_the_settings_of_before(stages):
    """Whatever pretrainings a config has."""
    settings = [
        s.settings("models", **{**SCRATCH, "dataset": d})
        for s, d in ((stages, "digits"), (fine_tuning_stages(), SCRATCH["dataset"]))
    ]
    for found in settings:
        assert "pretrained" not in found["inputs"]
    assert settings[0].keys() | {"num_train"} == settings[1].keys()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """The marker of a data_dir that holds the digits."""
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", folder)
    return folder / "digits/provenance.json"


def test_pretraining_sees_no_image_that_is_audited(digits_dir):
    """Nor a test image: the images of both stages, as their scripts load them, all of which differ."""
    chosen = fine_tuning_stages()
    public = _build.dataset(chosen.settings("pretrained", **PUBLIC), digits_dir)
    private = _build.dataset(chosen.settings("models", **FINE_TUNED), digits_dir)
    made = _family.canaries_of(
        "random", chosen.settings("canaries", dataset="digits-train1000", canary="random"), private
    )
    known = {image.tobytes() for image in public.train_images}
    assert (len(known), len(private.train_images)) == (437, 1000)
    for image in (*private.train_images, *private.test_images, *np.rint(made.source_images * 255).astype(np.uint8)):
        assert image.tobytes() not in known


def test_pretraining_on_a_whole_audited_data_set_fails_unchecked_too(digits_dir):
    """Settings ask for what is left of it, so that a gap in the config's checks would give an error and no model."""
    settings = fine_tuning_stages("num_train", None).settings("pretrained", **PUBLIC)
    with pytest.raises(ValueError, match="without=1437: leaves no image of 'digits'"):
        _build.dataset(settings, digits_dir)


def test_pretraining_on_another_data_set_leaves_nothing_out():
    chosen = fine_tuning_stages("pretrainings.public.dataset", "mnist")
    assert "without" not in chosen.settings("pretrained", **PUBLIC)


def test_seed_of_a_pretraining_is_its_own():
    config = fine_tuning()
    config["pretrainings"]["other"] = config["pretrainings"]["public"]
    stages = _stages.Stages(complete(config))
    seeds = [stages.settings("pretrained", pretraining=name)["seed"] for name in ("public", "other")]
    seeds += stages.settings("models", **FINE_TUNED)["seeds"]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture(scope="session")
def pretrained(digits_dir, tmp_path_factory):
    """The arrays of the model of the tiny pretraining."""
    settings = fine_tuning_stages().settings("pretrained", **PUBLIC)
    return pretrain_model.pretrain(settings, _build.dataset(settings, digits_dir), tmp_path_factory.mktemp("pretrain"))


def test_pretrained_model_says_how_good_it_is(pretrained, digits_dir):
    settings = fine_tuning_stages().settings("pretrained", **PUBLIC)
    dataset = _build.dataset(settings, digits_dir)
    read = pretrain_model.pretraining.Pretrained.from_arrays(pretrained)
    assert read.class_names == dataset.class_names
    assert pretrained["num_images"] == 437
    model = _build.model(settings["model"], 10)
    logits = np.asarray(model.apply({"params": read.params}, dataset.test_images / np.float32(255)))
    assert pretrained["test_accuracy"] == np.mean(logits.argmax(axis=1) == dataset.test_labels)


def test_interrupted_pretraining_goes_on_to_the_same_model(pretrained, digits_dir, tmp_path, monkeypatch):
    settings = fine_tuning_stages().settings("pretrained", **PUBLIC)
    dataset, bars = _build.dataset(settings, digits_dir), []
    train = functools.partial(pretrain_model.training.train, checkpoint_seconds=-1.0)
    monkeypatch.setattr(pretrain_model.training, "train", train)

    def pretrain(stop):
        monkeypatch.setattr(
            pretrain_model, "progress", lambda *a, **k: bars.append(Bar(*a, stop=stop, **k)) or bars[-1]
        )
        return pretrain_model.pretrain(settings, dataset, tmp_path)

    with pytest.raises(Interrupted):
        pretrain(2)
    resumed = pretrain(None)
    assert [bar.trained for bar in bars] == [2, 1]
    assert resumed.keys() == pretrained.keys()
    for name, array in pretrained.items():
        np.testing.assert_array_equal(resumed[name], array)


@pytest.mark.parametrize("role", ["audited", "surrogate", "reference"])
def test_runs_of_every_role_start_from_the_pretrained_model(pretrained, digits_dir, role):
    """What they say of their start is the start: layers that are not trained end with the same bits."""
    settings = fine_tuning_stages("trainings.dpsgd.options.trainable", "last").settings("models", **FINE_TUNED)
    dataset = _build.dataset(settings, digits_dir)
    inserted = _family.canaries_of("random", settings | {"num_canaries": 10, "seed": 1}, dataset)
    (arrays,) = train_audit_models.train_runs(
        settings,
        train_audit_models.recipe(settings),
        _build.model(settings["model"], 10),
        dataset,
        inserted,
        [role],
        pretrain_model.pretraining.Pretrained.from_arrays(pretrained),
        seeds=settings["seeds"][:1],
    )
    starts = {name: leaf for name, leaf in arrays.items() if name.startswith("initial/")}
    assert starts.keys() == {name.replace("params/", "initial/") for name in pretrained if name.startswith("params/")}
    for name, leaf in starts.items():
        np.testing.assert_array_equal(leaf, pretrained[name.replace("initial/", "params/")])
        end = arrays[name.replace("initial/", "params/")][-1]
        assert np.array_equal(end, leaf) == ("Dense" not in name), name


def test_fine_tuned_models_alone_wait_for_the_pretrained_one(tmp_path):
    """Which is trained once for all cells and blocks."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(fine_tuning()), encoding="utf-8")
    planned = snakemake(tmp_path, "--dry-run", "all", config=file)
    assert planned.status == 0, planned.text
    assert counts(planned.text)["pretrain_model"] == 1
    job = r"^Job \d+: Training models with .*: (\w+), epsilon .*\nReason: .*Input files updated by another job: (.*)$"
    waiting = re.findall(job, planned.text, re.MULTILINE)
    assert len(waiting) == counts(planned.text)["train_audit_models"] == 4
    for training, inputs in waiting:
        assert ("results/tiny/pretrained/public/model.npz" in inputs) == (training == "dpsgd")


@pytest.mark.slow
def test_fine_tuning_runs_and_another_pretraining_reruns_it_alone(tmp_path):
    def call(*arguments, **changes):
        config = fine_tuning()
        for training in config["trainings"].values():
            training |= {"num_runs": 1, "num_surrogate_runs": 0, "num_reference_runs": 0, "canaries": ["random"]}
        config["audit"]["scores"] = ["negative_loss"]
        config["pretrainings"]["public"]["options"] |= changes
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        run = snakemake(tmp_path, *arguments, "--", "models", config=file)
        assert run.status == 0, run.text
        return run.text

    call()
    results = tmp_path / "results/tiny"
    model, made = store.read_npz(results / "pretrained/public/model.npz")
    block, trained = store.read_npz(results / "models/digits-train1000/random/dpsgd/eps8/block0.npz")
    assert trained["settings"]["inputs"]["pretrained"] == made["config_digest"]
    assert set(trained["code_digests"]) >= {"pretrain_model", "make_canaries", "train_audit_models"}
    np.testing.assert_array_equal(block["initial/Conv3x3_0/kernel"][0], model["params/Conv3x3_0/kernel"])
    scratch, _ = store.read_npz(results / "models/digits-train1000/random/sgd/epsinf/block0.npz")
    assert not np.array_equal(scratch["initial/Conv3x3_0/kernel"][0], model["params/Conv3x3_0/kernel"])
    assert not list((results / "checkpoints").rglob("*.npz"))
    assert "Nothing to be done" in call("--dry-run")
    again = counts(call("--dry-run", learning_rate=0.2))
    assert again == {"pretrain_model": 1, "train_audit_models": 1, "models": 1}


def test_report_is_written_offline(copied):
    written = snakemake(copied, "--report", "report.html")
    assert written.status == 0, written.text
    assert "Lower bounds" in (copied / "report.html").read_text(encoding="utf-8")


def test_figure_is_redrawn_to_the_same_bytes_alone(copied):
    """As the README says; nothing that it is made of is made again."""
    files = [copied / f"results/tiny/figures/figure2.{kind}" for kind in ("pdf", "png")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    run = snakemake(copied, "--allowed-rules", "plot_figure2", "--force", "--", "results/tiny/figures/figure2.pdf")
    assert run.status == 0, run.text
    assert counts(run.text) == {"plot_figure2": 1}
    assert [file.read_bytes() for file in files] == before


def test_costs_of_the_page_are_those_of_its_own_jobs(copied, stages):
    """Jobs of an older config leave their benchmarks in the same folder."""
    results = copied / "results" / "tiny"
    for name in ("removed/sgd/epsinf/block0", "random/sgd/epsinf/block7"):
        stale = results / f"benchmarks/train_audit_models/digits/{name}.tsv"
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.write_text("s\tmax_rss\n1000000\t5\n", encoding="utf-8")
    run = snakemake(copied, "--allowed-rules", "make_report_page", "--force", "--", "results/tiny/audits.html")
    assert run.status == 0, run.text
    page = (results / "audits.html").read_text(encoding="utf-8")
    jobs = re.findall(r'<th scope="row"><code>(\w+)</code></th><td class="number">(\d+)</td>', page)
    num_blocks = len(stages.bundled()["scores"])
    assert {name: int(number) for name, number in jobs} == {
        "make_canaries": 1,
        "optimize_canaries": 1,
        "train_audit_models": num_blocks,
        "score_membership": num_blocks,
        "compute_epsilon": len(stages.cells()),
        "collect_epsilon": 1,
    }


def test_bundle_holds_what_its_rule_lists(stages):
    """The wildcards of each input fit its stage, in the order of its digests."""
    inputs = stages.settings("bundle")["inputs"]
    listed = stages.bundled()
    assert {name: len(digests) for name, digests in inputs.items()} == {name: len(listed[name]) for name in listed}
    assert inputs["audits"][2] == stages.digest("audits", **CELL)
    assert inputs["histories"] == [
        stages.digest("canaries", dataset="digits", canary=k) for k in ("metagradient", "variant")
    ]
    assert inputs["cost"] == inputs["trials"] == []


def test_bundle_keeps_the_order_of_cells(stages):
    """Or the config in it would be another one than that of the results."""
    config = json.loads(stages.settings("bundle")["config"])
    assert _stages.Stages(config).digest("summary") == stages.digest("summary")


def test_received_bundle_gives_tables_and_figures_back_and_trains_nothing(copied, tmp_path):
    """In an empty folder, with no file but the bundle, as docs/bundle.md says."""
    run = snakemake(copied, "--", "bundle")
    assert run.status == 0, run.text
    assert counts(run.text) == {"make_bundle": 1, "bundle": 1}
    received = Path(shutil.move(copied / "results/tiny/bundle", tmp_path / "received"))
    folder = tmp_path / "clone"
    bundle.restore(received, folder / "results/tiny")
    run = snakemake(folder, "--", "table2", "figure2", config=received / "config.json")
    assert run.status == 0, run.text
    assert counts(run.text) == {"make_table2": 1, "table2": 1, "plot_figure2": 1, "figure2": 1}
    for name in (
        "tables/table2.csv",
        "tables/table2.md",
        "tables/table2.tex",
        "figures/figure2.pdf",
        "figures/figure2.png",
    ):
        assert (folder / "results/tiny" / name).read_bytes() == (copied / "results/tiny" / name).read_bytes()
    planned = counts(snakemake(folder, "--dry-run", "--", "all", "bundle", config=received / "config.json").text)
    assert planned["make_bundle"] == planned["make_metasmoothness"] == 1
    assert not planned.keys() & {*RULES[: RULES.index("collect_epsilon") + 1], "measure_metasmoothness"}
