"""Checks that what tables, figures, comparisons and the ledger show is computed."""

import re
from collections.abc import Mapping
from typing import Any

import _config
from _config_error import require

from metacanary import comparisons

Config = Mapping[str, Any]


def check(config: Config) -> None:
    """Checks what keys of tables and figures say of others; as `_check.check`, which calls it."""
    _check_figures(config)
    _check_comparisons(config)
    _check_accuracy(config)
    _check_ledger(config)


def _check_figures(config: Config) -> None:
    """Checks that what figures and tables show is there."""
    figures, scores, trainings = config["figures"], config["audit"]["scores"], config["trainings"]
    for key, known in (
        ("figure1_dataset", config["datasets"]),
        ("figure1_canary", config["canaries"]["kinds"]),
        ("figure2_dataset", config["datasets"]),
        ("figure2_score", scores),
    ):
        require(figures[key] in known, f"figures.{key}", figures[key], f"one of {', '.join(known)}")
    score = config["tables"]["score"]
    require(score in scores, "tables.score", score, f"one of {', '.join(scores)}")
    auditors, auditor = config["audit"]["auditors"], figures["figure2_auditor"]
    require(auditor in auditors, "figures.figure2_auditor", auditor, f"one of audit.auditors: {', '.join(auditors)}")
    missing = [name for name in ("steinke", "fdp_gaussian") if name not in auditors]
    require(not missing, "audit.auditors", auditors, f"also {' and '.join(missing)}, for tables 1 and 2")
    _check_protocols(config)
    for training in _config.figure2_trainings(config):
        require(training in trainings, "figures.figure2_training", training, f"one of {', '.join(trainings)}")
        epsilons, shown = trainings[training]["epsilons"], figures["figure2_epsilon"]
        require(float(shown) in map(float, epsilons), "figures.figure2_epsilon", shown, f"one of {epsilons}")


def _check_protocols(config: Config) -> None:
    """Checks that the protocols that are shown are there."""
    protocols = config["audit"]["protocols"]
    without = [name for name, training in config["trainings"].items() if not training["num_surrogate_runs"]]
    for section, key in (("tables", "protocol"), ("figures", "figure2_protocol")):
        shown, where = config[section][key], f"{section}.{key}"
        able = ", ".join(name for name in protocols if not (name == "surrogate" and without))
        require(shown is None or shown in protocols, where, shown, f"null or one of audit.protocols: {able}")
        expected = f"another one, since {', '.join(without)} has no surrogate runs"
        require(shown != "surrogate" or not without, where, shown, expected)
        fallback = "corrected" if without or "surrogate" not in protocols else "surrogate"
        expected = f"one of audit.protocols ({able}), since {fallback} is not among them"
        require(shown is not None or fallback in protocols, where, shown, expected)


def _check_comparisons(config: Config) -> None:
    """Checks that what is compared is audited, and that each canary kind has a place of its own."""
    kinds, trainings, auditors = config["canaries"]["kinds"], config["trainings"], config["audit"]["auditors"]
    for name, chosen in config["comparisons"].items():
        where = f"comparisons.{name}"
        require(re.fullmatch(r"[a-z0-9_]+", name) is not None, "comparisons", name, "letters, digits and _ only")
        for kind in chosen["canaries"]:
            require(kind in kinds, f"{where}.canaries", kind, f"one of {', '.join(kinds)} (canaries.kinds)")
        for training in chosen["trainings"] or []:
            require(training in trainings, f"{where}.trainings", training, f"one of {', '.join(trainings)}")
            missing = [kind for kind in chosen["canaries"] if kind not in trainings[training]["canaries"]]
            expected = f"one that is audited with {', '.join(missing)} too (trainings.{training}.canaries)"
            require(not missing, f"{where}.trainings", training, expected)
        expected = "kinds that a training is audited with all of (trainings.*.canaries)"
        require(bool(_config.compared_trainings(config, name)), f"{where}.canaries", chosen["canaries"], expected)
        expected = f"one of audit.auditors: {', '.join(auditors)}"
        require(chosen["auditor"] in auditors, f"{where}.auditor", chosen["auditor"], expected)
        try:
            comparisons.points(_config.compared_kinds(config, name), chosen["by"])
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error


def _check_accuracy(config: Config) -> None:
    """Checks that the trainings whose accuracy is shown are audited with the canary kind."""
    kind, trainings = config["accuracy"]["canary"], config["trainings"]
    for name in config["accuracy"]["trainings"]:
        require(name in trainings, "accuracy.trainings", name, f"one of {', '.join(trainings)}")
        expected = f"one of trainings.{name}.canaries: {', '.join(trainings[name]['canaries'])}"
        require(kind in trainings[name]["canaries"], "accuracy.canary", kind, expected)


def _check_ledger(config: Config) -> None:
    """Checks that the ledger's trainings have what Dirac canaries stand for, and kinds of as many canaries."""
    chosen, trainings, number = config["ledger"], config["trainings"], config["canaries"]["num_canaries"]
    for name in chosen["trainings"]:
        require(name in trainings, "ledger.trainings", name, f"one of {', '.join(trainings)}")
        training = trainings[name]
        able = training["algorithm"] == "dpsgd" and training["game"] == "independent"
        able = able and training["options"]["clipping"]["name"] == "flat"
        expected = "trainings of algorithm dpsgd with clipping flat, in the independent game"
        require(able, "ledger.trainings", name, expected)
        audited = training["canaries"]
        for kind in chosen["canaries"] or []:
            expected = f"one of trainings.{name}.canaries: {', '.join(audited)}"
            require(kind in audited, "ledger.canaries", kind, expected)
            expected = f"kinds of canaries.num_canaries = {number} canaries, since Dirac canaries are as many"
            require(_config.num_canaries(config, kind) == number, "ledger.canaries", kind, expected)
        expected = f"a training with a kind of canaries.num_canaries = {number} canaries"
        require(bool(_config.ledger_kinds(config, name)), "ledger.trainings", name, expected)
        auditors, auditor = config["audit"]["auditors"], chosen["auditor"]
        require(auditor in auditors, "ledger.auditor", auditor, f"one of audit.auditors: {', '.join(auditors)}")
