"""Tests of the config's checks, and that config files, schema, their table and the conda environment agree."""

import copy
import dataclasses
import functools
import inspect
import json
import operator
import re
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators
from packaging.requirements import Requirement

from metacanary import (
    accounting,
    auditors,
    audits,
    block_scores,
    gradient_max,
    model_layers,
    models,
    objectives,
    optimization,
    recipes,
    reference_scores,
    soft_labels,
    summary,
    updates,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import _check  # noqa: E402
import _config  # noqa: E402
import _config_error  # noqa: E402

CONFIGS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("config/*.yaml"), ROOT / "tests/tiny.yaml"])
CHOICES = ("algorithm", "family", "name")  # the keys that choose which other keys there are
PRIVATE_KIND = {
    "family": "metagradient",
    "model": {"name": "convnet"},
    "objective": {"name": "loss_gap"},
    "update": {"name": "signed", "step_size": 0.1},
    "num_metasteps": 6,
    "algorithm": "dpsgd",
    "training": {"num_steps": 3, "sampling_prob": 0.1, "clip_norm": 1.0, "learning_rate": 1.0},
}
NORM_KIND = {
    "family": "gradient_max",
    "model": {"name": "convnet"},
    "update": {"name": "adam", "learning_rate": 0.1},
    "num_steps": 5,
    "training": {"num_steps": 4, "batch_size": 20, "learning_rate": 0.1},
}
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))


def read(path):
    """Reads a config file; what YAML's anchors share is copied."""
    return json.loads(json.dumps(yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))))


def complete(config):
    """Validates a config and fills in defaults, as `snakemake.utils.validate` does; raises its first error."""

    def fill(validator, properties, instance, schema):
        for name, subschema in properties.items():
            if "default" in subschema:
                instance.setdefault(name, copy.deepcopy(subschema["default"]))
        yield from Draft202012Validator.VALIDATORS["properties"](validator, properties, instance, schema)

    config = copy.deepcopy(config)
    validators.extend(Draft202012Validator, {"properties": fill})(SCHEMA).validate(config)
    return config


def changed(path, value):
    """The tiny config with one value changed."""
    config = read("tests/tiny.yaml")
    *parents, last = path.split(".")
    functools.reduce(operator.getitem, parents, config)[last] = value
    return config


def message(config):
    """The line that is printed for a wrong config."""
    try:
        _check.check(complete(config))
    except (ValidationError, ValueError) as error:
        return _config_error.one_line(error)
    return None


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_files_are_valid(path):
    assert message(read(path)) is None


def with_comparison(trainings=None, auditor="steinke", kinds=None, **chosen):
    """The tiny config with a comparison, and kinds added to it that both trainings are audited with."""
    config, kinds = read("tests/tiny.yaml"), kinds or {}
    config["canaries"]["kinds"] |= kinds
    for training in config["trainings"].values():
        training["canaries"] += kinds
    config["comparisons"] = {"mine": {"trainings": trainings, "auditor": auditor, **chosen}}
    return config


def test_config_without_comparisons_compares_nothing():
    config = read("tests/tiny.yaml")
    config.pop("comparisons", None)
    assert complete(config)["comparisons"] == {}


@pytest.mark.parametrize(
    ("by", "kinds", "trainings", "found"),
    [
        ("start", ["random", "metagradient"], None, ["sgd"]),  # dpsgd is audited with random alone
        ("model", ["random"], None, ["sgd", "dpsgd"]),
        ("model", ["random"], ["dpsgd"], ["dpsgd"]),
        ("cost", ["random", "metagradient"], None, ["sgd"]),
        ("num_canaries", ["random", "fewer"], None, ["sgd", "dpsgd"]),
    ],
)
def test_check_takes_comparisons(by, kinds, trainings, found):
    added = {"fewer": {"family": "random", "num_canaries": 6}}
    config = with_comparison(kinds=added, canaries=kinds, by=by, trainings=trainings)
    assert message(config) is None
    assert _config.compared_trainings(complete(config), "mine") == found
    settings = _config.compared_kinds(complete(config), "mine")
    assert [*settings] == kinds
    assert settings["random"] == {"family": "random", "num_canaries": 10}
    if "fewer" in kinds:
        assert settings["fewer"]["num_canaries"] == 6
    if "metagradient" in kinds:
        assert settings["metagradient"]["start"] == "random"
        assert settings["metagradient"]["model"]["options"]["widths"] == [4]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            {"canaries": ["clean"], "by": "start"},
            "comparisons.mine.canaries: got 'clean', expected one of random, metagradient, variant (canaries.kinds)",
        ),
        (
            {"canaries": ["random"], "by": "width"},
            "comparisons.mine.by: got 'width', expected one of start or num_canaries or model or cost",
        ),
        (
            {"canaries": ["random"], "by": "start", "trainings": ["sdg"]},
            "comparisons.mine.trainings: got 'sdg', expected one of sgd, dpsgd",
        ),
        (
            {"canaries": ["random", "metagradient"], "by": "start", "trainings": ["dpsgd"]},
            "comparisons.mine.trainings: got 'dpsgd', expected one that is audited with metagradient too",
        ),
        (
            {"canaries": ["variant"], "by": "start"},
            "comparisons.mine.canaries: got ['variant'], expected kinds that a training is audited with all of",
        ),
        (
            {"canaries": ["random"], "by": "start", "auditor": "gaussian_rates"},
            "comparisons.mine.auditor: got 'gaussian_rates', expected one of audit.auditors: steinke, fdp_gaussian",
        ),
        (
            {"canaries": ["random"], "by": "cost"},
            "comparisons.mine.canaries: got ['random'], expected at least one kind that is optimised",
        ),
        (
            {"canaries": ["random", "again"], "by": "start", "kinds": {"again": {"family": "random"}}},
            "comparisons.mine.canaries: got random and again, both not optimised with start random",
        ),
        (
            {
                "canaries": ["random", "more"],
                "by": "model",
                "kinds": {"more": {"family": "mislabeled", "num_canaries": 12}},
            },
            "comparisons.mine.canaries: got kinds of num_canaries [10, 12], expected the same number of each",
        ),
        ({"canaries": ["random"]}, "comparisons.mine: expected a key 'by'"),
        ({"canaries": [], "by": "start"}, "comparisons.mine.canaries: got [], expected at least 1 item(s)"),
    ],
)
def test_check_names_the_wrong_key_of_a_comparison(chosen, expected):
    assert message(with_comparison(**chosen)).startswith(expected)


@pytest.mark.parametrize("name", ["Start", "a-b", "a\n"])
def test_check_refuses_names_of_comparisons_that_are_no_targets(name):
    config = with_comparison(canaries=["random"], by="start")
    config["comparisons"][name] = config["comparisons"].pop("mine")
    assert message(config).startswith("comparisons: got ")


def test_check_takes_several_trainings_in_figure_2():
    config = read("tests/tiny.yaml")
    config["trainings"]["other"] = copy.deepcopy(config["trainings"]["sgd"])
    config["figures"]["figure2_training"] = ["sgd", "other"]
    assert message(config) is None
    assert _config.figure2_trainings(config) == ["sgd", "other"]
    assert _config.figure2_trainings(read("tests/tiny.yaml")) == ["sgd"]
    for wrong, expected in (
        (["sgd", "third"], "figures.figure2_training: got 'third', expected one of sgd, dpsgd, other"),
        (["sgd", "dpsgd"], "figures.figure2_epsilon: got 'inf', expected one of [8]"),
        ([], "figures.figure2_training: got [], expected at least 1 item(s)"),
        (["sgd", "sgd"], "figures.figure2_training: got ['sgd', 'sgd'], expected no item twice"),
    ):
        config["figures"]["figure2_training"] = wrong
        assert message(config) == expected


TAN = {"training": "dpsgd", "batch_size": 10, "num_validation": 100}


def with_tan(path, value):
    """The tiny config with a search of settings, and one value changed."""
    config = read("tests/tiny.yaml") | {"tan": copy.deepcopy(TAN)}
    *parents, last = path.split(".")
    functools.reduce(operator.getitem, parents, config)[last] = value
    return config


LEDGER = {"trainings": ["dpsgd"]}


def with_ledger(path=None, value=None, **chosen):
    """The tiny config with a ledger of its private training in the independent game, and one value changed."""
    config = read("tests/tiny.yaml") | {"ledger": LEDGER | chosen}
    config["trainings"]["dpsgd"]["game"] = "independent"
    if path:
        *parents, last = path.split(".")
        functools.reduce(operator.getitem, parents, config)[last] = value
    return config


def test_config_without_a_ledger_makes_none():
    assert complete(read("tests/tiny.yaml"))["ledger"]["trainings"] == []


def test_ledger_takes_the_kinds_of_as_many_canaries():
    both = with_ledger("trainings.dpsgd.canaries", ["random", "metagradient"])
    assert message(both) is None
    assert _config.ledger_kinds(complete(both), "dpsgd") == ["random", "metagradient"]
    both["canaries"]["kinds"]["metagradient"]["num_canaries"] = 4
    assert message(both) is None
    assert _config.ledger_kinds(complete(both), "dpsgd") == ["random"]
    both["ledger"]["canaries"] = ["random"]
    assert _config.ledger_kinds(complete(both), "dpsgd") == ["random"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (with_ledger(trainings=["dp"]), "ledger.trainings: got 'dp', expected one of sgd, dpsgd"),
        (with_ledger(trainings=["sgd"]), "ledger.trainings: got 'sgd', expected trainings of algorithm dpsgd with"),
        (with_ledger("trainings.dpsgd.game", "paired"), "ledger.trainings: got 'dpsgd', expected trainings of algor"),
        (
            with_ledger("trainings.dpsgd.options.clipping", {"name": "per_layer"}),
            "ledger.trainings: got 'dpsgd', expected trainings of algorithm dpsgd with clipping flat",
        ),
        (
            with_ledger(canaries=["metagradient"]),
            "ledger.canaries: got 'metagradient', expected one of trainings.dpsgd.canaries: random",
        ),
        (
            with_ledger("canaries.kinds.random.num_canaries", 4),
            "ledger.trainings: got 'dpsgd', expected a training with a kind of canaries.num_canaries = 10 canaries",
        ),
        (
            with_ledger("canaries.kinds.random.num_canaries", 4, canaries=["random"]),
            "ledger.canaries: got 'random', expected kinds of canaries.num_canaries = 10 canaries",
        ),
        (with_ledger(auditor="order_statistic"), "ledger.auditor: got 'order_statistic', expected one of audit.audit"),
        (with_ledger(canaries=[]), "ledger.canaries: got [], expected at least 1 item(s)"),
    ],
)
def test_check_names_what_is_wrong_in_the_ledger(config, expected):
    found = message(config)
    assert found is not None
    assert found.startswith(expected)


def test_config_without_tan_searches_nothing():
    config = read("tests/tiny.yaml")
    config.pop("tan", None)
    assert complete(config)["tan"]["training"] is None
    assert message(config) is None
    assert message(with_tan("seed", 1)) is None


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "tan.training",
            "sgd",
            "tan.training: got 'sgd', expected null or one of the trainings of algorithm dpsgd: dpsgd",
        ),
        (
            "tan.training",
            "other",
            "tan.training: got 'other', expected null or one of the trainings of algorithm dpsgd",
        ),
        ("tan.epsilon", 0, "tan.epsilon: got 0, expected a number > 0"),
        (
            "tan.batch_size",
            29,
            "tan.batch_size: got 29, expected less than the full batch, 28.74 on digits, and at most",
        ),
        (
            "tan.batch_sizes",
            [4, 1438],
            "tan.batch_sizes: got 1438, expected at most the 1437 training images of digits",
        ),
        ("tan.batch_sizes", [4, 4], "tan.batch_sizes: got [4, 4], expected no item twice"),
        ("tan.num_validation", 9, "tan.num_validation: got 9, expected from 10 to 718, half of the training images of"),
        (
            "tan.num_validation",
            719,
            "tan.num_validation: got 719, expected from 10 to 718, half of the training images",
        ),
        ("tan.learning_rates", [], "tan.learning_rates: got [], expected at least 1 item(s)"),
        ("tan.learning_rates", [0], "tan.learning_rates: got 0, expected a number > 0"),
        (
            "tan.multiplicities",
            [1, 4],
            "tan.multiplicities: got 4, expected 1 without flip and crop_padding, since all",
        ),
        ("tan.noise_factors", [], "tan.noise_factors: got [], expected at least 1 item(s)"),
        ("tan.epsilons", [1], "tan: unknown key 'epsilons', did you mean 'epsilon'?"),
    ],
)
def test_check_names_what_is_wrong_in_tan(path, value, expected):
    found = message(with_tan(path, value))
    assert found is not None
    assert found.startswith(expected)


def test_check_refuses_a_search_from_pretrained_parameters():
    config = complete(with_tan("seed", 1))
    config["trainings"]["dpsgd"]["pretraining"] = "public"
    with pytest.raises(ValueError, match=r"tan\.training: got 'dpsgd', expected a training without a pretraining"):
        _check._check_tan(config)


DE_ET_AL = {0.90: (10, 875), 1.84: (6, 1125), 2.75: (5, 1593), 3.69: (4, 1687), 6.53: (3, 2468)}


def noise_of(training, config):
    """The noise multiplier that a training gets for its one epsilon."""
    options, (epsilon,) = training["options"], training["epsilons"]
    mechanism = {name: options[name] for name in ("sampling_prob", "num_steps")}
    return accounting.noise_multiplier(epsilon=epsilon, delta=config["delta"], **mechanism)


def test_de_et_al_have_their_noise_and_steps():
    """(noise, steps) at batch 4,096 of 50,000; to 2%, since epsilons are rounded to two digits."""
    config = complete(read("config/de_et_al.yaml"))
    models = {}
    for name, training in config["trainings"].items():
        noise, steps = DE_ET_AL[training["epsilons"][0]]
        assert (training["options"]["num_steps"], training["snapshots"]) == (steps, [steps])
        models.setdefault(training["model"]["name"], []).append(training["epsilons"][0])
        if name.startswith("wrn16_4"):  # the others have the same
            assert noise_of(training, config) == pytest.approx(noise, rel=0.02)
    assert models == {"wrn16_4": list(DE_ET_AL), "wrn40_4": list(DE_ET_AL)}


def test_tan_reference_is_the_published_one():
    """WRN-16-4, batch 4,096, noise 3, 2,500 steps, 16 copies, learning rate 4, moving average; 256 in the search."""
    config = complete(read("config/tan_reference.yaml"))
    reference = config["trainings"][config["tan"]["training"]]
    options = reference["options"]
    assert noise_of(reference, config) == pytest.approx(3, rel=0.02)
    assert options["sampling_prob"] * 50_000 == pytest.approx(4096)
    assert (options["num_steps"], options["augmentation"]["multiplicity"], options["learning_rate"]) == (2500, 16, 4)
    assert options["ema"] == {"decay": 0.9999, "warm_up": True}
    assert (reference["model"]["name"], config["tan"]["batch_size"]) == ("wrn16_4", 256)


def test_config_without_metasmoothness_measures_none():
    config = read("tests/tiny.yaml")
    del config["metasmoothness"]
    assert complete(config)["metasmoothness"]["canaries"] == []
    assert message(config) is None


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("datasets", ["mnits"], "datasets: got 'mnits', expected one of digits, "),
        ("delta", "1e-5", "delta: got '1e-5', expected number (YAML takes 1e-5 for text: write 1.0e-05)"),
        ("significance", 0.7, "significance: got 0.7, expected a number < 0.5"),
        ("seed", -1, "seed: got -1, expected a number >= 0"),
        ("sede", 1, "top level: unknown key 'sede', did you mean 'seed'?"),
        ("image_size", 5, "image_size: got 5, expected null, at least the 8 pixels stored in digits, or a divisor of"),
        ("channels", 2, "channels: got 2, expected null, 1 or 3"),
        ("num_train", 9, "num_train: got 9, expected null, or from 10 to 1436 of the 1437 images of digits"),
        ("num_train", 1437, "num_train: got 1437, expected null, or from 10 to 1436 of the 1437 images of digits"),
        ("num_train", 300, "canaries.kinds.variant.training.batch_size: got 300, expected at most the 290 images of"),
        ("trainings.dpsgd.epsilons", [-1], "trainings.dpsgd.epsilons: got -1, expected a number > 0"),
        ("trainings.dpsgd.epsilons", ["inf"], "trainings.dpsgd.epsilons: got inf, expected a finite number for dpsgd"),
        ("trainings.sgd.epsilons", [8], "trainings.sgd.epsilons: got 8.0, expected inf for sgd, which is not private"),
        ("trainings.sgd.num_runs", 0, "trainings.sgd.num_runs: got 0, expected a number >= 1"),
        ("trainings.sgd.num_surrogate_runs", -1, "trainings.sgd.num_surrogate_runs: got -1, expected a number >= 0"),
        (
            "trainings.sgd.num_reference_runs",
            0,
            "trainings.sgd.num_reference_runs: got 0, expected at least 1, since audit.scores has relative_to_",
        ),
        (
            "trainings.dpsgd.num_reference_runs",
            1,
            "trainings.dpsgd.num_reference_runs: got 1, expected at least 2, since audit.scores has offline_lira",
        ),
        ("trainings.sgd.runs_together", 0, "trainings.sgd.runs_together: got 0, expected a number >= 1"),
        (
            "trainings.dpsgd.runs_together",
            4,
            "trainings.dpsgd.runs_together: got 4, expected at most block_size = 3, the models that a job trains",
        ),
        ("trainings.sgd.algorithm", "adam", "trainings.sgd.algorithm: got 'adam', expected one of sgd or dpsgd"),
        ("trainings.sgd.game", "even", "trainings.sgd.game: got 'even', expected one of independent or paired"),
        ("trainings.sgd.canaries", ["clipbkd"], "trainings.sgd.canaries: got 'clipbkd', expected one of random, "),
        ("trainings.sgd.snapshots", [2, 5], "trainings.sgd.snapshots: got [2, 5], expected ascending steps of which"),
        ("trainings.sgd.snapshots", [4, 2], "trainings.sgd.snapshots: got [4, 2], expected ascending steps of which"),
        ("trainings.sgd.model.name", "vgg", "trainings.sgd.model.name: got 'vgg', expected one of convnet or "),
        ("trainings.sgd.model.options", {"groups": 2}, "trainings.sgd.model.options: unknown key 'groups', did you"),
        ("trainings.sgd.options.batch_size", 1430, "trainings.sgd.options.batch_size: got 1430, expected at most the"),
        ("trainings.dpsgd.options.sampling_prob", 1.5, "trainings.dpsgd.options.sampling_prob: got 1.5, expected a"),
        (
            "trainings.sgd.options.microbatch",
            3,
            "trainings.sgd.options.microbatch: got 3, expected null or a divisor of batch_size = 20",
        ),
        (
            "canaries.kinds.metagradient.training.microbatch",
            40,
            "canaries.kinds.metagradient.training.microbatch: got 40, expected null or a divisor of batch_size = 20",
        ),
        (
            "canaries.kinds.metagradient.algorithm",
            "dpsgd",
            "canaries.kinds.metagradient.training: unknown key 'batch_size', expected [",
        ),
        (
            "canaries.kinds.metagradient",
            PRIVATE_KIND,
            "canaries.kinds.metagradient.training.noise_multiplier: got None, expected a number, since no",
        ),
        (
            "trainings.dpsgd.options.noise_multiplier",
            1.0,
            "trainings.dpsgd.options.noise_multiplier: got 1.0, expected null, since the noise follows from epsilons",
        ),
        (
            "trainings.dpsgd.options.augmentation",
            {"multiplicity": 4},
            "trainings.dpsgd.options.augmentation.multiplicity: got 4, expected 1 without flip and crop_padding",
        ),
        (
            "trainings.dpsgd.options.augmentation",
            {"pad": 4},
            "trainings.dpsgd.options.augmentation: unknown key 'pad',",
        ),
        ("trainings.dpsgd.options.batch_size", 9, "trainings.dpsgd.options: unknown key 'batch_size', expected ["),
        ("canaries.num_canaries", 1438, "canaries.num_canaries: got 1438, expected at most the 1437 training images"),
        ("canaries.num_canaries", 9, "canaries.num_canaries: got 9, expected an even number, since trainings.dpsgd"),
        (
            "canaries.kinds.random.family",
            "noisy",
            "canaries.kinds.random.family: got 'noisy', expected one of clipbkd, mislabeled, noise, random, "
            "metagradient, gradient_max",
        ),
        (
            "canaries.kinds.random",
            {"family": "random", "num_canaries": 1438},
            "canaries.kinds.random.num_canaries: got 1438, expected at most the 1437 training images",
        ),
        (
            "canaries.kinds.random",
            {"family": "random", "num_canaries": 9},
            "canaries.kinds.random.num_canaries: got 9, expected an even number, since trainings.dpsgd.game is paired",
        ),
        (
            "canaries.kinds.random",
            {"family": "random", "num_canaries": 1420},
            "trainings.sgd.options.batch_size: got 20, expected at most the 17 images of digits",
        ),
        (
            "canaries.kinds.metagradient.num_canaries",
            1420,
            "canaries.kinds.metagradient.training.batch_size: got 20, expected at most the 17 images of digits",
        ),
        (
            "canaries.kinds.random",
            {"family": "random", "start": "noise"},
            "canaries.kinds.random: unknown key 'start', expected ['family', 'num_canaries']",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"start": "gradient_max"},
            "canaries.kinds.norm.start: got 'gradient_max', expected one of clipbkd, mislabeled, noise, random",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"proxy_steps": [2, 5]},
            "canaries.kinds.norm.proxy_steps: got [2, 5], expected steps of the training, at most num_steps = 4",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"proxy_steps": [2, 2]},
            "canaries.kinds.norm.proxy_steps: got [2, 2], expected no item twice",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"num_metasteps": 5},
            "canaries.kinds.norm: unknown key 'num_metasteps', did you mean 'num_steps'?",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"training": {"num_steps": 4, "batch_size": 1430, "learning_rate": 0.1}},
            "canaries.kinds.norm.training.batch_size: got 1430, expected at most the 1427 images of digits",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"algorithm": "dpsgd", "training": PRIVATE_KIND["training"]},
            "canaries.kinds.norm.training.noise_multiplier: got None, expected a number, since no target epsilon",
        ),
        ("canaries.kinds.metagradient.objective", {"name": "loss"}, "canaries.kinds.metagradient.objective.name: got"),
        (
            "canaries.kinds.metagradient.objective",
            {"temperature": 1.0},
            "canaries.kinds.metagradient.objective: expected a key 'name'",
        ),
        (
            "canaries.kinds.metagradient.objective",
            {"name": "logit_gap", "temperature": 1.0},
            "canaries.kinds.metagradient.objective: unknown key 'temperature', expected ['name']",
        ),
        (
            "canaries.kinds.metagradient.objective",
            {"name": "separation", "winsorized": 0.5},
            "canaries.kinds.metagradient.objective.winsorized: got 0.5, expected a number < 0.5",
        ),
        (
            "canaries.kinds.metagradient.objective",
            {"name": "soft_guesses", "share": 0},
            "canaries.kinds.metagradient.objective.share: got 0, expected a number > 0",
        ),
        (
            "canaries.kinds.metagradient.interference",
            -1,
            "canaries.kinds.metagradient.interference: got -1, expected a number >= 0",
        ),
        (
            "canaries.kinds.metagradient.objective",
            {"name": "gradient_norm", "microbatch": 0},
            "canaries.kinds.metagradient.objective.microbatch: got 0, expected a number >= 1",
        ),
        *(
            (
                "canaries.kinds.metagradient.objective_steps",
                steps,
                f"canaries.kinds.metagradient.objective_steps: got {got}, expected {expected}",
            )
            for steps, got, expected in (
                ([3, 2], [3, 2], "ascending steps, at most num_steps = 4"),
                ([2, 5], [2, 5], "ascending steps, at most num_steps = 4"),
                ([2, 2], [2, 2], "no item twice"),
                ([0, 4], 0, "a number >= 1"),
                (4, 4, "array"),
            )
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"objective_steps": [2]},
            "canaries.kinds.norm: unknown key 'objective_steps'",
        ),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0.1, "harden_after": 21},
            "canaries.kinds.metagradient.labels.harden_after: got 21, expected at most num_metasteps = 20",
        ),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0.1},
            "canaries.kinds.metagradient.labels: expected a key 'harden_after'",
        ),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0, "harden_after": 1},
            "canaries.kinds.metagradient.labels.learning_rate: got 0, expected a number > 0",
        ),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0.1, "harden_after": 1, "scale": -1},
            "canaries.kinds.metagradient.labels.scale: got -1, expected a number > 0",
        ),
        (
            "canaries.kinds.metagradient.labels",
            {"learning_rate": 0.1, "harden_after": 1, "scales": 1},
            "canaries.kinds.metagradient.labels: unknown key 'scales', did you mean 'scale'?",
        ),
        (
            "canaries.kinds.metagradient.labels",
            True,
            "canaries.kinds.metagradient.labels: got True, expected object or null",
        ),
        (
            "canaries.kinds.norm",
            NORM_KIND | {"labels": {"learning_rate": 0.1, "harden_after": 1}},
            "canaries.kinds.norm: unknown key 'labels'",
        ),
        ("canaries.kinds.metagradient.update", {"name": "sgd"}, "canaries.kinds.metagradient.update.name: got 'sgd'"),
        ("canaries.kinds.metagradient.update", {"name": "adam"}, "canaries.kinds.metagradient.update: expected a key"),
        ("canaries.kinds", {"My kind": {}}, "canaries.kinds: got the name 'My kind', expected one that matches ^[a-z]"),
        (
            "metasmoothness.canaries",
            ["random"],
            "metasmoothness.canaries: got 'random', expected one of metagradient, ",
        ),
        (
            "metasmoothness.num_averaged",
            2,
            "metasmoothness.num_averaged: got 2, expected at most 1, half of the num_",
        ),
        ("metasmoothness.step", 0, "metasmoothness.step: got 0, expected a number > 0"),
        ("audit.guess_fraction", 1.5, "audit.guess_fraction: got 1.5, expected a number <= 1"),
        ("audit.scores", ["lira"], "audit.scores: got 'lira', expected one of negative_loss or logit_margin or "),
        (
            "audit.score_augmentation",
            {"shift": 9},
            "audit.score_augmentation.shift: got 9, expected at most the 8 pixels",
        ),
        ("audit.score_augmentation", {"crop": 1}, "audit.score_augmentation: unknown key 'crop', expected ['flip', "),
        ("audit.num_population", 361, "audit.num_population: got 361, expected at most the 360 test images of digits"),
        ("audit.rmia_gamma", 0, "audit.rmia_gamma: got 0, expected a number > 0"),
        ("audit.rmia_offline_a", 1.5, "audit.rmia_offline_a: got 1.5, expected a number <= 1"),
        ("audit.accountant", "rdp", "audit.accountant: got 'rdp', expected pld, since trainings.dpsgd is dpsgd in the"),
        ("audit.grid", [0.5, 0.5], "audit.grid: got [0.5, 0.5], expected no item twice"),
        ("figures.figure1_canary", "mislabeled", "figures.figure1_canary: got 'mislabeled', expected one of random, "),
        ("figures.figure2_epsilon", 8, "figures.figure2_epsilon: got 8, expected one of ['inf']"),
        ("tables.score", "lira", "tables.score: got 'lira', expected one of negative_loss, logit_margin"),
        ("tables.protocol", "paper", "tables.protocol: got 'paper', expected one of fixed or corrected"),
    ],
)
def test_check_names_key_value_and_expectation(path, value, expected):
    found = message(changed(path, value))
    assert found is not None
    assert found.startswith(expected)
    assert "\n" not in found


PUBLIC = {
    "dataset": "digits",
    "model": {"name": "convnet", "options": {"widths": [4]}},
    "options": {"num_steps": 3, "batch_size": 20, "learning_rate": 0.1},
}


def fine_tuning(path=None, value=None):
    """The tiny config on 1,000 images, whose private models start from one of the others; with one value changed."""
    config = read("tests/tiny.yaml") | {"num_train": 1000, "pretrainings": {"public": copy.deepcopy(PUBLIC)}}
    config["trainings"]["dpsgd"]["pretraining"] = "public"
    config.pop("tan", None)  # a search starts from scratch
    if path is not None:
        *parents, last = path.split(".")
        functools.reduce(operator.getitem, parents, config)[last] = value
    return config


def test_check_takes_fine_tuning():
    assert message(fine_tuning()) is None
    assert complete(fine_tuning())["trainings"]["sgd"]["pretraining"] is None
    assert complete(read("tests/tiny.yaml"))["pretrainings"] == {}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "num_train",
            None,
            "pretrainings.public.dataset: got 'digits', expected another data set than digits, whose images are",
        ),
        ("pretrainings.public.dataset", "mnits", "pretrainings.public.dataset: got 'mnits', expected one of digits, "),
        (
            "pretrainings.public.dataset",
            "cinic10",
            "pretrainings.public.dataset: got 'cinic10', expected one with images of 8x8x1 (height, width, channels)",
        ),
        (
            "pretrainings.public.num_train",
            438,
            "pretrainings.public.num_train: got 438, expected null, or from 10 to the 437 images of digits",
        ),
        ("pretrainings.public.num_train", 9, "pretrainings.public.num_train: got 9, expected null, or from 10 to the"),
        (
            "pretrainings.public.options.batch_size",
            438,
            "pretrainings.public.options.batch_size: got 438, expected at most the 437 images of digits",
        ),
        (
            "pretrainings.public.options.microbatch",
            3,
            "pretrainings.public.options.microbatch: got 3, expected null or a divisor of batch_size = 20",
        ),
        ("pretrainings.public.options.sampling_prob", 0.1, "pretrainings.public.options: unknown key 'sampling_prob'"),
        ("pretrainings.public.snapshots", [3], "pretrainings.public: unknown key 'snapshots', expected ["),
        ("pretrainings", {"My name": PUBLIC}, "pretrainings: got the name 'My name', expected one that matches ^[a-z]"),
        (
            "trainings.dpsgd.pretraining",
            "cinic10",
            "trainings.dpsgd.pretraining: got 'cinic10', expected null or one of public (pretrainings)",
        ),
        (
            "pretrainings",
            {},
            "trainings.dpsgd.pretraining: got 'public', expected null, since there are no pretrainings",
        ),
        (
            "trainings.dpsgd.model.options.widths",
            [8],
            "trainings.dpsgd.model: got {'name': 'convnet', 'options': {'widths': [8], ",
        ),
    ],
)
def test_check_of_pretrainings_names_key_value_and_expectation(path, value, expected):
    found = message(fine_tuning(path, value))
    assert found is not None
    assert found.startswith(expected)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("audited", "public", "refused"),
    [
        ("cifar10", "cinic10", False),
        ("cifar10", "cifar100", False),
        ("cifar10", "cifar10_jpeg75", True),
        ("cifar10_jpeg75", "cifar10", True),
        ("cifar10", "cifar10", True),
    ],
)
def test_check_refuses_to_pretrain_on_private_images(audited, public, refused):
    """Nor on an altered copy of them."""
    config = fine_tuning("num_train", None) | {"datasets": [audited]}
    config["pretrainings"]["public"]["dataset"] = public
    config["figures"] |= {"figure1_dataset": audited, "figure2_dataset": audited}
    expected = (
        f"pretrainings.public.dataset: got {public!r}, expected another data set than {audited}, whose images are"
    )
    assert (message(config) or "").startswith(expected) if refused else message(config) is None


def test_check_takes_an_optimization_through_dpsgd():
    """With its noise; the defaults of DP-SGD are filled in, and the noise of the others stays open."""
    training = PRIVATE_KIND["training"] | {"noise_multiplier": 0.0}
    config = complete(changed("canaries.kinds.metagradient", PRIVATE_KIND | {"training": training}))
    _check.check(config)
    filled = config["canaries"]["kinds"]["metagradient"]["training"]
    assert (filled["microbatch"], filled["augmentation"]) == (64, {"multiplicity": 1, "flip": False, "crop_padding": 0})
    assert config["trainings"]["dpsgd"]["options"]["noise_multiplier"] is None


def test_check_takes_numbers_of_canaries_by_kind():
    """Nothing is asked of the number of all kinds where each has its own; an odd one where no game is paired."""
    config = changed("canaries.num_canaries", 9)
    config["canaries"]["kinds"]["random"]["num_canaries"] = 12
    config["canaries"]["kinds"]["norm"] = NORM_KIND | {"num_canaries": 7}
    config["trainings"]["sgd"]["canaries"] = ["random", "metagradient", "norm"]
    assert message(config) is None
    filled = complete(config)
    assert [_config.num_canaries(filled, kind) for kind in ("random", "metagradient", "norm")] == [12, 9, 7]


@pytest.mark.parametrize("names", [["a", "a.b"], []])
def test_either_matches_the_names_only(names):
    pattern = _config.either(names)
    assert [text for text in ("", "a", "b", "ab", "a.b", "axb") if re.fullmatch(pattern, text)] == names


def test_one_line_finds_the_schema_error_behind_an_error():
    def validate():
        try:
            complete(changed("seed", -1))
        except ValidationError as error:
            raise RuntimeError("Error validating config file.", error)  # noqa: B904, as Snakemake raises it

    with pytest.raises(RuntimeError) as raised:
        validate()
    assert _config_error.one_line(raised.value) == "seed: got -1, expected a number >= 0"


def objects(schema):
    """All parts of a schema that are objects with keys of their own."""
    if isinstance(schema, dict):
        if "properties" in schema and "type" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def test_schema_is_valid_and_describes_every_key():
    Draft202012Validator.check_schema(SCHEMA)
    for part in objects(SCHEMA):
        assert part.get("additionalProperties") is False or {"if", "allOf"} & part.keys() or part.get("default") == {}
        for name, key in part["properties"].items():
            assert {"description", "$ref"} & key.keys(), name
            assert "default" in key or name in (*part.get("required", ()), *CHOICES), name


PARTS = ("augmentation", "ema", "optimizer")


def fields(cls, *left_out):
    """Names and defaults of the fields of a dataclass or a Flax module."""
    own = [f for f in dataclasses.fields(cls) if f.name not in ("parent", "name", *left_out)]
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in own}


def plain(value):
    """A default as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("name", "cls", "left_out"),
    [
        ("convnet", models.ConvNet, ["num_classes"]),
        ("resnet9", models.ResNet9, ["num_classes"]),
        ("wide_resnet", models.WideResNet, ["num_classes", "depth", "width"]),
        ("sgd_options", recipes.SGD, [*PARTS, "schedule"]),
        ("dpsgd_options", recipes.DPSGD, [*PARTS, "clipping", "noise_multiplier", "schedule", "target"]),
        ("augmentation", recipes.Augmentation, []),
        ("clipping", recipes.Clipping, ["thresholds"]),
        ("ema", recipes.EMA, []),
        ("optimizer", recipes.Optimizer, ["options"]),
        ("signed", updates.SignedUpdate, []),
        ("adam", updates.AdamUpdate, []),
        ("labels", soft_labels.LabelUpdate, []),
        *((name, cls, []) for name, cls in objectives.OBJECTIVES.items()),
        ("metagradient_kind", optimization.Optimization, ["objective", "update", "recipe"]),
        ("gradient_max_kind", gradient_max.GradientMax, ["update", "recipe"]),
    ],
)
def test_schema_has_the_options_of_the_package(name, cls, left_out):
    others = {"name", "schedule", "family", "game", "model", "start", "objective", "update", "training"}
    others |= {
        *PARTS,
        "algorithm",
        "clipping",
        "memory_mb",
        "noise_multiplier",
        "num_canaries",
        "options",
        "thresholds",
    }
    keys = {key: part.get("default") for key, part in SCHEMA["$defs"][name]["properties"].items() if key not in others}
    assert keys == {key: plain(default) for key, default in fields(cls, *left_out).items()}


def test_schema_has_the_options_of_scores():
    keys = SCHEMA["properties"]["audit"]["properties"]
    copies = inspect.getfullargspec(block_scores.augmented_copies).kwonlydefaults
    assert {name: key["default"] for name, key in keys["score_augmentation"]["properties"].items()} == copies
    in_audits = {name: key["default"] for name, key in keys.items() if name.startswith("rmia_")}
    assert in_audits == {name: default for name, default in fields(summary.Settings).items() if name in in_audits}


def test_schema_has_the_schedule_of_the_package():
    keys = {key: part["default"] for key, part in SCHEMA["$defs"]["schedule"]["properties"].items()}
    assert keys == dataclasses.asdict(recipes.Schedule())


def test_schema_has_the_names_of_the_package():
    defs, keys = SCHEMA["$defs"], SCHEMA["properties"]
    for name in ("convnet", "resnet9"):
        assert defs[name]["properties"]["pool"]["enum"] == sorted(model_layers.POOLS)
        assert defs[name]["properties"]["activation"]["enum"] == sorted(model_layers.ACTIVATIONS)
    assert tuple(defs["resnet9"]["properties"]["final_pool"]["enum"]) == models.FINAL_POOLS
    assert defs["model"]["properties"]["name"]["enum"] == models.names()
    assert defs["objective"]["properties"]["name"]["enum"] == sorted(objectives.OBJECTIVES)
    assert set(defs["update"]["properties"]["name"]["enum"]) == set(updates.UPDATES)
    known = [*block_scores.SCORES, *reference_scores.MIN_REFERENCES]
    assert keys["audit"]["properties"]["scores"]["items"]["enum"] == known
    assert tuple(keys["audit"]["properties"]["accountant"]["enum"]) == accounting.ACCOUNTANTS
    audit = keys["audit"]["properties"]
    assert tuple(defs["auditor"]["enum"]) == tuple(audit["auditors"]["default"]) == auditors.NAMES
    assert tuple(audit["protocols"]["items"]["enum"]) == audits.PROTOCOLS
    assert tuple(audit["protocols"]["default"]) == fields(summary.Settings)["protocols"]
    assert keys["figures"]["properties"]["figure2_protocol"]["enum"] == [*audits.PROTOCOLS, None]
    valid = [name for name in audits.PROTOCOLS if name != "paper"]
    assert keys["tables"]["properties"]["protocol"]["enum"] == [*valid, None]
    assert set(inspect.signature(audits.audit).parameters) >= {"delta", "significance"}


@pytest.mark.parametrize("name", ["config", "de_et_al", "tan_reference"])
def test_paper_config_marks_every_value(name):
    text = (ROOT / f"config/{name}.yaml").read_text(encoding="utf-8")
    lines = text.split("canaries:\n", 1)[1].split("\nfigures:")[0]
    values = [line for line in lines.splitlines() if re.search(r": [\d\[]", line) and "canaries: [" not in line]
    unmarked = [line for line in values if not re.search(r"# .*\[[PSIUO]\]", line) and "epsilons: [inf]" not in line]
    assert unmarked == []


def values(key):
    """What a key may hold, in words."""
    if "$ref" in key:
        name = key["$ref"].rsplit("/", 1)[1]
        return ", ".join(SCHEMA["$defs"][name].get("enum", [f"see {name}"]))
    if "enum" in key:
        return ", ".join("null" if value is None else value for value in key["enum"])
    kinds = [key["type"]] if isinstance(key["type"], str) else key["type"]
    words = " or ".join("list" if kind == "array" else kind for kind in kinds)
    if "items" in key:
        words += f" of {values(key['items'])}"
    bounds = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
    return " ".join([words, *(text.format(key[bound]) for bound, text in bounds.items() if bound in key)])


def rows(part, prefix=""):
    """Rows of config/README.md: one for each key of a part of the schema."""
    for name, key in part["properties"].items():
        shown = (
            "required" if "default" not in key else yaml.safe_dump(key["default"], default_flow_style=True, width=999)
        )
        shown = shown.removesuffix("\n...\n").strip()
        description = key.get("description") or SCHEMA["$defs"][key["$ref"].rsplit("/", 1)[1]]["description"]
        if (
            name in CHOICES
            and "enum" not in key
            and part not in (SCHEMA["$defs"]["kind"], SCHEMA["$defs"]["optimizer"])
        ):
            continue  # the other keys of this part are those of one choice
        if "properties" in key:
            yield from rows(key, f"{prefix}{name}.")
        elif "patternProperties" in key:
            (inner,) = key["patternProperties"].values()
            yield f"| `{prefix}{name}.*` | {values(inner)} | {shown} | {description} |"
        else:
            yield f"| `{prefix}{name}` | {values(key)} | {shown} | {description} |"


def test_readme_has_a_row_for_every_key():
    """A row that is missing is printed as it should stand."""
    text = (ROOT / "config/README.md").read_text(encoding="utf-8").split("## All keys")[1].splitlines()
    parts = [SCHEMA, *(part for part in SCHEMA["$defs"].values() if "properties" in part)]
    wanted = [row for part in parts for row in rows(part)]
    assert [row for row in wanted if row not in text] == []
    assert len([line for line in text if line.startswith("| `")]) == len(wanted)


def test_conda_environment_has_the_locked_versions():
    environment = yaml.safe_load((ROOT / "envs/metacanary.yaml").read_text(encoding="utf-8"))["dependencies"]
    assert "python=3.11" in environment
    pins = dict(pin.split("==") for pin in environment[-1]["pip"])
    locked = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate({"python_full_version": "3.11.9"}):
                locked[requirement.name] = next(iter(requirement.specifier)).version
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("dependencies = [")[1].split("\n]")[0]
    direct = re.findall(r'^    "([A-Za-z0-9_-]+)', project, re.MULTILINE)
    assert pins == {name: locked[name] for name in direct}


@pytest.mark.parametrize("key", ["results_dir", "data_dir"])
@pytest.mark.parametrize(
    "folder",
    ["../results", "results/../../x", "x/..", "results/$(touch x)", "a;b", "a`b`", "a\nb", "-rf", "a'b", 'a"b', "a|b"],
)
def test_check_refuses_folders_that_lead_elsewhere_or_speak_to_a_shell(key, folder):
    config = complete(read("tests/tiny.yaml")) | {key: folder}
    with pytest.raises(ValueError, match=f"{key}: got .*, expected a folder of letters"):
        _check.check(config)


@pytest.mark.parametrize("folder", ["results/tiny", "/scratch/me/results v2", "results/größer", "~me/x_1-2.3"])
def test_check_takes_plain_folders(folder):
    _check.check(complete(read("tests/tiny.yaml")) | {"results_dir": folder, "data_dir": folder})


@pytest.mark.parametrize("name", ["sgd\n", "../sgd", "a/b", "$x", "a b", "A"])
def test_names_cannot_leave_the_results_folder(name):
    config = read("tests/tiny.yaml")
    for section in (config["trainings"], config["canaries"]["kinds"]):
        for_name = copy.deepcopy(config)
        place = for_name["trainings"] if section is config["trainings"] else for_name["canaries"]["kinds"]
        place[name] = next(iter(place.values()))
        with pytest.raises((ValueError, ValidationError)):
            _check.check(complete(for_name))


def smk():
    """The texts of the rule files."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "workflow/rules").glob("*.smk")))


def test_profiles_agree_and_do_not_clash():
    default, slurm = read("profiles/default/profile.yaml"), read("slurm/profile.yaml")
    for key, value in default.items():
        assert slurm[key] == value  # also where the workflow's own profile is not read
    assert "code" not in default["rerun-triggers"]
    assert not {"default-resources", "set-resources", "resources"} & default.keys()  # they would replace slurm's
    assert [path.name for path in (ROOT / "slurm").iterdir()] == ["profile.yaml"]  # "slurm" there would be a path
    rules = set(re.findall(r"^rule (\w+):\n(?:(?!\nrule ).)*?gpu=1", smk(), re.MULTILINE | re.DOTALL))
    assert set(slurm["set-resources"]) == rules


def test_every_script_has_a_rule_of_its_name():
    names = set(re.findall(r"^rule (\w+):", smk(), re.MULTILINE))
    assert names == {path.stem for path in (ROOT / "workflow/scripts").glob("[a-z]*.py")}
    assert names == set(re.findall(r"scripts/(\w+)\.py", smk()))
    # What download fetches is verified by digest; an edit of its code is no reason to run all that follows again.
    assert names - {"download"} == set(re.findall(r'sources\("(\w+)\.py"\)', smk()))
