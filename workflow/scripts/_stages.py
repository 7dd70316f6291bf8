"""What each stage of the workflow depends on: its part of the config, its seeds, its inputs by digest, its code.

The settings of a stage are all that its script is given, so that no key can change a result unnoticed; and no more
than that, so that a key of a later stage reruns no earlier one.
"""

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacanary import store

Config = Mapping[str, Any]
Settings = dict[str, Any]

# How results are stored, jobs run and data sets fetched (and verified) has no part in what results hold; if it counted,
# each change there would retrain.
PLUMBING = {"store", "data", "backend", "_job"}


def sources(script: Path, package: Path) -> list[Path]:
    """Lists a script and all that it imports, directly or not, from its folder and from the package.

    Args:
      script: A Python file.
      package: The folder of the package.

    Returns:
      Paths, the script first; what `PLUMBING` names is left out, and so is what only it imports.
    """
    found, waiting = [script], [script]
    while waiting:
        for name in sorted(_imported(waiting.pop(), package.name) - PLUMBING):
            module = (script.parent if name.startswith("_") else package) / f"{name}.py"
            if module.is_file() and module not in found:
                found.append(module)
                waiting.append(module)
    return found


def _imported(source: Path, package: str) -> set[str]:
    """Names the modules of the package, and the helpers of scripts, that a file imports anywhere but for its types."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.removeprefix(f"{package}."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix(f"{package}.") for alias in node.names}
    return names


def name_epsilon(epsilon: float | str) -> str:
    """Writes a target epsilon as paths have it: "8", "0.5", "inf"."""
    return f"{float(epsilon):g}"


class Stages:
    """The settings of every stage under one config.

    Args:
      config: A checked config.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def seed(self, *names: str | int) -> int:
        """Derives a seed from the config's seed and from names; other names, another seed."""
        return int(store.digest([self._config["seed"], *names]), 16) % 2**31

    def cells(self) -> list[dict[str, str]]:
        """Lists what is audited: dataset, canary, training, epsilon."""
        return [
            {"dataset": dataset, "canary": canary, "training": training, "epsilon": name_epsilon(epsilon)}
            for dataset in self._config["datasets"]
            for training, recipe in self._config["trainings"].items()
            for epsilon in recipe["epsilons"]
            for canary in recipe["canaries"]
        ]

    def blocks(self, training: str) -> list[int]:
        """Numbers the blocks of runs of a training; a job trains one block."""
        recipe = self._config["trainings"][training]
        return list(range(math.ceil(recipe["num_runs"] / recipe["block_size"])))

    def variants(self) -> list[dict[str, str]]:
        """Lists what metasmoothness is measured of: dataset, canary."""
        return [
            {"dataset": dataset, "canary": canary}
            for dataset in self._config["datasets"]
            for canary in self._config["metasmoothness"]["canaries"]
        ]

    def settings(self, stage: str, **wildcards: str) -> Settings:
        """All settings that a stage's result depends on.

        Args:
          stage: dataset, canaries, metasmoothness, models, scores, audits, summary, table1, table2, figure1, figure2,
            metasmoothness_table or metasmoothness_figure.
          **wildcards: Those of its rule.

        Returns:
          Plain data; "inputs" holds the digests of the settings of input files, by their name in the rule.
        """
        settings = getattr(self, f"_{stage}")(**wildcards)
        # Snakemake compares params as they are printed: the order of keys in the config must not show.
        return json.loads(json.dumps(settings, sort_keys=True))

    def digest(self, stage: str, **wildcards: str) -> str:
        """The digest of `settings`."""
        return store.digest(self.settings(stage, **wildcards))

    def _dataset(self, dataset: str) -> Settings:
        return {"dataset": dataset}

    def _canaries(self, dataset: str, canary: str) -> Settings:
        kind = self._config["canaries"]["kinds"][canary]
        settings = {
            **self._images(dataset),
            "num_canaries": self._config["canaries"]["num_canaries"],
            "kind": kind,
            "seed": self.seed("canaries", dataset),  # of the source images, which all kinds share
        }
        if kind["family"] == "metagradient":
            settings["optimization_seed"] = self.seed("optimize", dataset, canary)
        return settings

    def _metasmoothness(self, dataset: str, canary: str) -> Settings:
        kind, chosen = self._config["canaries"]["kinds"][canary], self._config["metasmoothness"]
        return {
            **self._images(dataset),
            "num_canaries": self._config["canaries"]["num_canaries"],
            "kind": {name: kind[name] for name in ("start", "game", "model", "algorithm", "training")},
            "seed": self.seed("canaries", dataset),
            # The canary kind is no part of these: variants are compared on the same directions, coins and orders.
            "seeds": [self.seed("metasmoothness", dataset, number) for number in range(chosen["num_directions"])],
            "step": chosen["step"],
        }

    def _models(self, dataset: str, canary: str, training: str, epsilon: str, block: str) -> Settings:
        recipe = self._config["trainings"][training]
        first = int(block) * recipe["block_size"]
        runs = range(first, min(first + recipe["block_size"], recipe["num_runs"]))
        settings = {
            "inputs": {"canaries": self.digest("canaries", dataset=dataset, canary=canary)},
            **self._images(dataset),
            **{name: recipe[name] for name in ("algorithm", "game", "model", "options", "snapshots")},
            "runs": list(runs),
            # The canary kind is no part of the seed: kinds are compared on the same coins, orders and initial models.
            "seeds": [self.seed("run", dataset, training, epsilon, run) for run in runs],
        }
        if recipe["algorithm"] == "dpsgd":
            settings |= {"epsilon": epsilon, "delta": self._config["delta"]}
            settings["accountant"] = self._config["audit"]["accountant"]
        return settings

    def _scores(self, dataset: str, canary: str, **cell: str) -> Settings:
        inputs = {
            "canaries": self.digest("canaries", dataset=dataset, canary=canary),
            "models": self.digest("models", dataset=dataset, canary=canary, **cell),
        }
        return {"inputs": inputs, "model": self._config["trainings"][cell["training"]]["model"]}

    def _audits(self, training: str, **cell: str) -> Settings:
        recipe, audit = self._config["trainings"][training], self._config["audit"]
        scores = [self.digest("scores", training=training, **cell, block=str(b)) for b in self.blocks(training)]
        chosen = {name: audit[name] for name in ("scores", "guess_fraction", "grid", "accountant")}
        return {
            "inputs": {"scores": scores, "runs": scores},
            "cell": {**cell, "training": training},
            "audit": {
                **chosen,
                "game": recipe["game"],
                "delta": self._config["delta"],
                "significance": self._config["significance"],
                "sampling_prob": recipe["options"].get("sampling_prob"),
            },
        }

    def _summary(self) -> Settings:
        return {"inputs": {"audits": [self.digest("audits", **cell) for cell in self.cells()]}}

    def _table1(self) -> Settings:
        kinds = self._config["canaries"]["kinds"].items()
        objectives = {name: kind["objective"]["name"] for name, kind in kinds if "objective" in kind}
        return {"inputs": {"summary": self.digest("summary")}, "objectives": objectives, **self._config["tables"]}

    _table2 = _table1

    def _figure1(self) -> Settings:
        figures = self._config["figures"]
        shown = {"dataset": figures["figure1_dataset"], "canary": figures["figure1_canary"]}
        inputs = {"canaries": self.digest("canaries", **shown)}
        return {"inputs": inputs, "num_shown": figures["figure1_num_shown"]}

    def _figure2(self) -> Settings:
        names = ("dataset", "training", "epsilon", "score", "auditor", "protocol")
        figure = {name: self._config["figures"][f"figure2_{name}"] for name in names}
        figure["significance"] = self._config["significance"]
        return {"inputs": {"summary": self.digest("summary")}, "figure": figure}

    def _metasmoothness_table(self) -> Settings:
        kinds, variants = self._config["canaries"]["kinds"], self.variants()
        names = ("model", "algorithm", "training", "objective")
        stages = {"measured": "metasmoothness", "histories": "canaries"}
        return {
            "inputs": {name: [self.digest(stage, **v) for v in variants] for name, stage in stages.items()},
            "variants": [v | {name: kinds[v["canary"]][name] for name in names} for v in variants],
            "num_averaged": self._config["metasmoothness"]["num_averaged"],
        }

    def _metasmoothness_figure(self) -> Settings:
        return {"inputs": {"table": self.digest("metasmoothness_table")}}

    def _images(self, dataset: str) -> Settings:
        """Which images are trained on."""
        return {"dataset": dataset, "image_size": self._config["image_size"]}
