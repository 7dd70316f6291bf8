"""What several keys of a checked config say together of its kinds, trainings and tables."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]

METAGRADIENT = "metagradient"
GRADIENT_MAX = "gradient_max"
OPTIMIZED = (METAGRADIENT, GRADIENT_MAX)  # the families that are optimised; all others are in families.FAMILIES


def either(names: Iterable[str]) -> str:
    """Builds a regular expression that matches the names and nothing else, and nothing at all if there are none."""
    return "|".join(re.escape(name) for name in sorted(names)) or "(?!)"


def num_canaries(config: Config, kind: str) -> int:
    """The number of canaries of a kind: its own, or that of all kinds."""
    return config["canaries"]["kinds"][kind]["num_canaries"] or config["canaries"]["num_canaries"]


def objective_of(kind: Mapping[str, Any]) -> str | None:
    """Says what a canary kind is optimised for, as tables have it; None if it is not optimised."""
    if kind["family"] == GRADIENT_MAX:
        return "gradient_norm"
    if "objective" not in kind:
        return None
    # That of gradient_max is of models without canaries.
    name = {"gradient_norm": "gradient_norm of members"}.get(kind["objective"]["name"], kind["objective"]["name"])
    name += f" after {', '.join(map(str, kind['objective_steps']))}" if kind["objective_steps"] else ""
    name += f" + {kind['interference']:g} interference" if kind["interference"] else ""
    return name + (", labels too" if kind["labels"] is not None else "")


def compared_kinds(config: Config, comparison: str) -> dict[str, dict[str, Any]]:
    """The settings that place the canary kinds of a comparison, as `comparisons.points` takes them."""
    kinds, names = config["canaries"]["kinds"], config["comparisons"][comparison]["canaries"]
    return {
        name: {key: kinds[name][key] for key in ("family", "start", "model", "algorithm") if key in kinds[name]}
        | {"num_canaries": num_canaries(config, name)}
        for name in names
    }


def compared_trainings(config: Config, comparison: str) -> list[str]:
    """The trainings of a comparison: those that it names, or all that are audited with all of its canary kinds."""
    chosen, trainings = config["comparisons"][comparison], config["trainings"]
    able = [name for name, training in trainings.items() if {*chosen["canaries"]} <= {*training["canaries"]}]
    return able if chosen["trainings"] is None else list(chosen["trainings"])


def ledger_kinds(config: Config, training: str) -> list[str]:
    """The canary kinds of a training's ledger: those that are named, or all of as many canaries as `canaries` says."""
    named, audited = config["ledger"]["canaries"], config["trainings"][training]["canaries"]
    equal = [kind for kind in audited if num_canaries(config, kind) == config["canaries"]["num_canaries"]]
    return equal if named is None else list(named)


def figure2_trainings(config: Config) -> list[str]:
    """The trainings of figure 2."""
    chosen = config["figures"]["figure2_training"]
    return [chosen] if isinstance(chosen, str) else list(chosen)
