"""What a comparison of canary kinds varies: the value and the line of each kind, from the kind's own settings.

It needs neither pandas nor JAX, so that a config is checked with it before anything is computed.
"""

from collections.abc import Mapping
from typing import Any

BY = ("start", "num_canaries", "model", "cost")
NOT_OPTIMIZED = "not optimised"
BASELINE = "random"  # the family that costs are counted from
HOW = ("as_matmul",)  # options that say how a model is computed, not what it is

Kind = Mapping[str, Any]
"""Settings of a canary kind: family, num_canaries and, if it is optimised, start, model and algorithm."""


def points(kinds: Mapping[str, Kind], by: str) -> dict[str, tuple[str, str | int]]:
    """Places canary kinds in a comparison.

    Args:
      kinds: Settings by the kind's name.
      by: One of `BY`.

    Returns:
      Of each kind its line and its value. By start: the family that the pixels are, or start from; the line is the
      kind's family, or `NOT_OPTIMIZED`. By num_canaries: their number; the line is the kind's family. By model
      and cost: the kind itself; the line is as by start.

    Raises:
      ValueError: For an unknown `by`, if two kinds would be one point, if numbers of canaries differ though they are
        not what is compared, or for costs if not exactly one kind is of family `BASELINE` or none is optimised.
    """
    if by not in BY:
        raise ValueError(f"by: got {by!r}, expected one of {', '.join(BY)}")
    if by == "cost":
        _check_cost(kinds)
    if by != "num_canaries":
        _check_numbers(kinds)
    found: dict[str, tuple[str, str | int]] = {}
    for name, kind in kinds.items():
        line = kind["family"] if "model" in kind else NOT_OPTIMIZED
        point: tuple[str, str | int] = (line, name)
        if by == "start":
            point = (line, kind.get("start", kind["family"]))
        elif by == "num_canaries":
            point = (kind["family"], kind["num_canaries"])
        same = [other for other, taken in found.items() if taken == point]
        if same:
            raise ValueError(
                f"canaries: got {same[0]} and {name}, both {point[0]} with {by} {point[1]}, expected one of each"
            )
        found[name] = point
    return found


def same_model(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Tells whether two models, name and options, are the same function of weights and pixels, but for rounding."""
    if first is None or second is None or first["name"] != second["name"]:
        return False
    names = {*first["options"], *second["options"]} - {*HOW}
    return all(first["options"].get(name) == second["options"].get(name) for name in names)


def model_texts(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names models by what tells them apart.

    Args:
      models: Name and options of each, by any key.

    Returns:
      Of each key the model's name and those options but `HOW` in which models of that name differ, as
      "convnet widths 8-16".
    """
    texts = {}
    for key, model in models.items():
        options = [other["options"] for other in models.values() if other["name"] == model["name"]]
        names = sorted({name for found in options for name in found} - {*HOW})
        varying = [name for name in names if any(found.get(name) != options[0].get(name) for found in options)]
        words = [f"{name.replace('_', ' ')} {_text(model['options'].get(name))}" for name in varying]
        texts[key] = " ".join([model["name"], *words])
    return texts


def recipe_text(settings: Mapping[str, Any]) -> str:
    """Names the recipe of a kind's or training's settings: its algorithm, and whether it starts from public images."""
    return settings["algorithm"] + (", pretrained" if settings.get("pretraining") is not None else "")


def _text(value: Any) -> str:
    """Writes an option."""
    if isinstance(value, list | tuple):
        return "-".join(map(_text, value))
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _check_cost(kinds: Mapping[str, Kind]) -> None:
    """Checks that what optimisation costs can be held against what it gains."""
    baselines = [name for name, kind in kinds.items() if kind["family"] == BASELINE]
    if len(baselines) != 1:
        raise ValueError(f"canaries: got {baselines} of family {BASELINE}, expected one, from which gains are counted")
    if not any("model" in kind for kind in kinds.values()):
        raise ValueError(f"canaries: got {list(kinds)}, expected at least one kind that is optimised")


def _check_numbers(kinds: Mapping[str, Kind]) -> None:
    """Checks that all kinds have one number of canaries: with more, a bound is higher though they leak no more."""
    numbers = sorted({kind["num_canaries"] for kind in kinds.values()})
    if len(numbers) != 1:
        raise ValueError(f"canaries: got kinds of num_canaries {numbers}, expected the same number of each")
