"""What each stage of the workflow depends on: its part of the config, its seeds, its inputs by digest, its code.

The settings of a stage are all that its script is given, so that no key can change a result unnoticed; and no more
than that, so that a key of a later stage reruns no earlier one.
"""

import ast
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _config

from metacanary import data, ledger, reference_scores, scores, store

Config = Mapping[str, Any]
Settings = dict[str, Any]

# How results are stored, jobs run and data sets fetched (and verified) has no part in what results hold; if it counted,
# each change there would retrain.
PLUMBING = {"store", "data", "backend", "interruption", "_job", "_stop", "_checkpoints"}

# The numbers of papers, which `make_reproduction` puts beside ours.
PUBLISHED = Path(__file__).resolve().parents[2] / "config" / "published.csv"

# What figures look like.
STYLE = Path(__file__).resolve().parents[2] / "metacanary" / "paper.mplstyle"

# The rules whose jobs' cost is compared.
COSTS = ("optimize_canaries", "train_audit_models", "score_membership", "compute_epsilon")

# The roles of runs, and the key of a training that says how many it has; their runs are numbered in this order.
ROLES = {"audited": "num_runs", "surrogate": "num_surrogate_runs", "reference": "num_reference_runs"}


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
        source = waiting.pop().read_text(encoding="utf-8")
        for name in sorted(_imported(source, package.name) - PLUMBING):
            module = (script.parent if name.startswith("_") else package) / f"{name}.py"
            if module.is_file() and module not in found:
                found.append(module)
                waiting.append(module)
    return found


@functools.cache
def _imported(source: str, package: str) -> frozenset[str]:
    """Names what a source imports of the package and of the scripts' helpers anywhere but for its types."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
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
    return frozenset(names)


@functools.cache
def figure_style() -> str:
    """The digest of the style sheet of figures, which is no code."""
    return store.digest(STYLE.read_text(encoding="utf-8"))


def name_epsilon(epsilon: float | str) -> str:
    """Writes a target epsilon as paths have it: "8", "0.5", "inf"."""
    return f"{float(epsilon):g}"


def _unique(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leaves out what comes a second time."""
    return [item for number, item in enumerate(items) if item not in items[:number]]


class Stages:
    """The settings of every stage under one config.

    Args:
      config: A checked config.

    Attributes:
      datasets: By the name that paths and tables have, which names a subset too, the data set that is stored.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._digests: dict[tuple[Any, ...], str] = {}
        self.datasets = {self.name_dataset(name): name for name in config["datasets"]}

    def seed(self, *names: str | int) -> int:
        """Derives a seed from the config's seed and from names; other names, another seed."""
        return int(store.digest([self._config["seed"], *names]), 16) % 2**31

    def name_dataset(self, name: str) -> str:
        """Writes a data set as paths and tables have it: with the size of the subset, if it is one."""
        return data.subset_name(name, self._config["num_train"])

    def cells(self) -> list[dict[str, str]]:
        """Lists what is audited: dataset, canary, training, epsilon."""
        return [
            {"dataset": dataset, "canary": canary, "training": training, "epsilon": name_epsilon(epsilon)}
            for dataset in self.datasets
            for training, recipe in self._config["trainings"].items()
            for epsilon in recipe["epsilons"]
            for canary in recipe["canaries"]
        ]

    def blocks(self, training: str) -> list[int]:
        """Numbers the blocks of runs of a training; a job trains one block."""
        return list(range(math.ceil(len(self._roles(training)) / self._config["trainings"][training]["block_size"])))

    def num_canaries(self, canary: str) -> int:
        """The number of canaries of a kind: its own, or that of all kinds."""
        return _config.num_canaries(self._config, canary)

    def protocol(self, section: str, key: str) -> str:
        """Names the protocol that a table or figure shows; null stands for the best that all trainings have."""
        everywhere = all(training["num_surrogate_runs"] for training in self._config["trainings"].values())
        best = "surrogate" if everywhere and "surrogate" in self._config["audit"]["protocols"] else "corrected"
        return self._config[section][key] or best

    def variants(self) -> list[dict[str, str]]:
        """Lists what metasmoothness is measured of: dataset, canary."""
        return [
            {"dataset": dataset, "canary": canary}
            for dataset in self.datasets
            for canary in self._config["metasmoothness"]["canaries"]
        ]

    def trials(self) -> list[dict[str, str]]:
        """Lists what is trained for the search of settings, if there is one: dataset, trial."""
        return [{"dataset": dataset, "trial": trial} for dataset in self.datasets for trial in self._trials()]

    def searched(self) -> list[str]:
        """Lists the trials that settings are chosen by."""
        return [name for name, trial in self._trials().items() if trial["stage"] == "search"]

    def ledger_cells(self) -> list[dict[str, str]]:
        """Lists what Dirac canaries are scored in: dataset, training, epsilon."""
        return [
            {"dataset": dataset, "training": training, "epsilon": name_epsilon(epsilon)}
            for dataset in self.datasets
            for training in self._config["ledger"]["trainings"]
            for epsilon in self._config["trainings"][training]["epsilons"]
        ]

    def bundled(self) -> dict[str, list[dict[str, str]]]:
        """Lists the results that a bundle holds: by the name of its rule's input, the wildcards of each file."""
        cells, figures = self.cells(), self._config["figures"]
        blocks = [cell | {"block": str(block)} for cell in cells for block in self.blocks(cell["training"])]
        shown = {"dataset": self.name_dataset(figures["figure1_dataset"]), "canary": figures["figure1_canary"]}
        kinds = _unique([*({name: cell[name] for name in shown} for cell in cells), shown])
        families = {name: kind["family"] for name, kind in self._config["canaries"]["kinds"].items()}
        optimized = [kind for kind in kinds if families[kind["canary"]] in _config.OPTIMIZED]
        return {
            "summary": [{}],
            "audits": cells,
            **dict.fromkeys(("scores", "runs", "population"), blocks),
            "canaries": kinds,
            "histories": _unique([*optimized, *self.variants()]),
            "metasmoothness": self.variants(),
            "trials": self.trials(),
            "cost": [{}] if any(self.costs().values()) else [],
        }

    def costs(self) -> dict[str, list[dict[str, str]]]:
        """Lists the jobs whose cost is compared, by their rule; all cells of a training and kind of any comparison."""
        found = {
            (training, kind)
            for name, chosen in self._config["comparisons"].items()
            for training in _config.compared_trainings(self._config, name)
            for kind in chosen["canaries"]
            if chosen["by"] == "cost"
        }
        accuracy = self._config["accuracy"]
        found |= {(training, accuracy["canary"]) for training in accuracy["trainings"]}
        cells = [cell for cell in self.cells() if (cell["training"], cell["canary"]) in found]
        kinds = self._config["canaries"]["kinds"]
        optimized = [
            {name: cell[name] for name in ("dataset", "canary")}
            for cell in cells
            if kinds[cell["canary"]]["family"] in _config.OPTIMIZED
        ]
        blocks = [cell | {"block": str(block)} for cell in cells for block in self.blocks(cell["training"])]
        return dict(zip(COSTS, (_unique(optimized), blocks, blocks, cells), strict=True))

    def settings(self, stage: str, **wildcards: str) -> Settings:
        """All settings that a stage's result depends on.

        Args:
          stage: dataset, canaries, metasmoothness, pretrained, models, scores, audits, summary, table1, table2,
            reproduction, figure1, figure2, metasmoothness_table, metasmoothness_figure, tan, tan_table,
            tan_figure, cost, comparison, comparison_figure, accuracy, accuracy_figure, dirac, dirac_audits, ledger,
            ledger_figure, bundle or report_page.
          **wildcards: Those of its rule.

        Returns:
          Plain data; "inputs" holds the digests of the settings of input files, by their name in the rule.
        """
        settings = getattr(self, f"_{stage}")(**wildcards)
        # Snakemake compares params as they are printed: the order of keys in the config must not show.
        return json.loads(json.dumps(settings, sort_keys=True))

    def digest(self, stage: str, **wildcards: str) -> str:
        """The digest of `settings`, computed once: the stages are chained, and a matrix has thousands of jobs."""
        key = (stage, *sorted(wildcards.items()))
        if key not in self._digests:
            self._digests[key] = store.digest(self.settings(stage, **wildcards))
        return self._digests[key]

    def _dataset(self, dataset: str) -> Settings:
        return {"dataset": dataset}

    def _canaries(self, dataset: str, canary: str) -> Settings:
        kind = self._config["canaries"]["kinds"][canary]
        settings = {
            **self._images(dataset),
            "num_canaries": self.num_canaries(canary),
            # Without what is off: canaries of configs that know no interference are the same ones.
            "kind": {k: v for k, v in kind.items() if k != "num_canaries" and (k, v) != ("interference", 0)},
            "seed": self.seed("canaries", dataset),  # of the source images, which kinds of one number share
        }
        if kind["family"] in _config.OPTIMIZED:
            settings["optimization_seed"] = self.seed("optimize", dataset, canary)
        return settings

    def _metasmoothness(self, dataset: str, canary: str) -> Settings:
        kind, chosen = self._config["canaries"]["kinds"][canary], self._config["metasmoothness"]
        return {
            **self._images(dataset),
            "num_canaries": self.num_canaries(canary),
            "kind": {name: kind[name] for name in ("start", "game", "model", "algorithm", "training")},
            "seed": self.seed("canaries", dataset),
            # The canary kind is no part of these: variants are compared on the same directions, coins and orders.
            "seeds": [self.seed("metasmoothness", dataset, number) for number in range(chosen["num_directions"])],
            "step": chosen["step"],
        }

    def _pretrained(self, pretraining: str) -> Settings:
        chosen = self._config["pretrainings"][pretraining]
        images = {"dataset": chosen["dataset"], **self._shape()}
        if chosen["num_train"] is not None:
            images["num_train"] = chosen["num_train"]
        if data.origin(chosen["dataset"]) in map(data.origin, self._config["datasets"]):
            # What is audited is private: images are those that the audited subset leaves, and there is no way to ask
            # for others. Of a whole data set it leaves none, which `data.load` refuses.
            images["without"] = self._config["num_train"] or data.SOURCES[chosen["dataset"]].num_train
        parts = {name: chosen[name] for name in ("model", "options")}
        return {**images, **parts, "seed": self.seed("pretraining", pretraining)}

    def _models(self, dataset: str, canary: str, training: str, epsilon: str, block: str) -> Settings:
        recipe = self._config["trainings"][training]
        roles, first = self._roles(training), int(block) * recipe["block_size"]
        runs = range(first, min(first + recipe["block_size"], len(roles)))
        settings = {
            "inputs": {"canaries": self.digest("canaries", dataset=dataset, canary=canary)},
            **self._images(dataset),
            **{name: recipe[name] for name in ("algorithm", "game", "model", "options", "snapshots")},
            "runs": list(runs),
            "roles": [roles[run][0] for run in runs],
            # The canary kind is no part of the seed: kinds are compared on the same coins, orders and initial models.
            "seeds": [self._run_seed(dataset, training, epsilon, *roles[run]) for run in runs],
        }
        if recipe["algorithm"] == "dpsgd":
            settings |= {"epsilon": epsilon, "delta": self._config["delta"]}
            settings["accountant"] = self._config["audit"]["accountant"]
        if recipe["pretraining"] is not None:
            settings["inputs"]["pretrained"] = self.digest("pretrained", pretraining=recipe["pretraining"])
        return settings

    def _scores(self, dataset: str, canary: str, **cell: str) -> Settings:
        audit = self._config["audit"]
        own = [name for name in audit["scores"] if name not in reference_scores.MIN_REFERENCES]
        names = sorted({*scores.SCORES, *own})  # those of SCORES are what the others are made of
        settings = {
            "inputs": {
                "canaries": self.digest("canaries", dataset=dataset, canary=canary),
                "models": self.digest("models", dataset=dataset, canary=canary, **cell),
            },
            **self._images(dataset),
            "model": self._config["trainings"][cell["training"]]["model"],
            "scores": names,
            "num_population": audit["num_population"],
        }
        if any(name.startswith("augmented_") for name in names):
            settings["augmentation"] = audit["score_augmentation"]
        return settings

    def _audits(self, training: str, **cell: str) -> Settings:
        recipe, audit = self._config["trainings"][training], self._config["audit"]
        scored = [self.digest("scores", training=training, **cell, block=str(b)) for b in self.blocks(training)]
        options = ("rmia_gamma", "rmia_offline_a") if "rmia" in audit["scores"] else ()
        names = ("scores", "auditors", "protocols", "guess_fraction", "grid", "accountant", *options)
        chosen = {name: audit[name] for name in names}
        return {
            "inputs": {"scores": scored, "runs": scored, "population": scored},
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
        objectives |= {name: "gradient_norm" for name, kind in kinds if kind["family"] == _config.GRADIENT_MAX}
        return self._bounds() | {"objectives": objectives}

    _table2 = _table1

    def _bounds(self) -> Settings:
        shown = {"score": self._config["tables"]["score"], "protocol": self.protocol("tables", "protocol")}
        return {"inputs": {"summary": self.digest("summary")}, **shown}

    def _reproduction(self) -> Settings:
        cells = {(cell["dataset"], cell["training"], cell["canary"]) for cell in self.cells()}
        return self._bounds() | {
            "published": store.digest(PUBLISHED.read_text(encoding="utf-8")),
            "setup": [self._described(*cell) for cell in sorted(cells)],
        }

    def _figure1(self) -> Settings:
        figures = self._config["figures"]
        shown = {"dataset": self.name_dataset(figures["figure1_dataset"]), "canary": figures["figure1_canary"]}
        inputs = {"canaries": self.digest("canaries", **shown)}
        return {"inputs": inputs, "num_shown": figures["figure1_num_shown"], "style": figure_style()}

    def _figure2(self) -> Settings:
        names = ("dataset", "epsilon", "score", "auditor", "protocol")
        figure = {name: self._config["figures"][f"figure2_{name}"] for name in names}
        figure |= {
            "training": _config.figure2_trainings(self._config),
            "dataset": self.name_dataset(figure["dataset"]),
            "significance": self._config["significance"],
            "protocol": self.protocol("figures", "figure2_protocol"),
        }
        return {"inputs": {"summary": self.digest("summary")}, "figure": figure, "style": figure_style()}

    def _bundle(self) -> Settings:
        stages = {"runs": "scores", "population": "scores", "histories": "canaries", "trials": "tan"}
        listed = self.bundled().items()
        inputs = {name: [self.digest(stages.get(name, name), **names) for names in all_] for name, all_ in listed}
        names = ("description", "url", "licence", "class_names")  # what a bundle says of a data set
        described = {
            dataset: {name: getattr(data.SOURCES[dataset], name) for name in names}
            for dataset in self._config["datasets"]
        }
        # As text, since the order of its keys is that of cells, and settings are sorted.
        return {"inputs": inputs, "sources": described, "config": json.dumps(self._config)}

    def _report_page(self) -> Settings:
        audit, listed = self._config["audit"], self.bundled()
        stages = {
            "summary": "summary",
            **dict.fromkeys(("scores", "runs", "population"), "scores"),
            "canaries": "canaries",
        }
        score = self._config["tables"]["score"]
        shown = {
            **{name: self._config[name] for name in ("experiment", "seed", "delta", "significance")},
            "score": score,
            "auditor": self._config["figures"]["figure2_auditor"],
            "protocol": self.protocol("tables", "protocol"),
        }
        return {
            "inputs": {name: [self.digest(stages[name], **each) for each in listed[name]] for name in stages},
            "blocks": listed["scores"],
            "kinds": listed["canaries"],
            "page": shown,
            "population": score == "rmia",
            "options": {"gamma": audit["rmia_gamma"], "offline_a": audit["rmia_offline_a"]},
            "style": figure_style(),  # looks of kinds
        }

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
        return {"inputs": {"table": self.digest("metasmoothness_table")}, "style": figure_style()}

    def _trials(self) -> dict[str, Settings]:
        """What each trial is, by the name that its path has; a batch_size of null is the full one."""
        chosen = self._config["tan"]
        if chosen["training"] is None:
            return {}
        small = {"batch_size": chosen["batch_size"]}
        batch_sizes = [*(chosen["batch_sizes"] or [chosen["batch_size"]]), None]
        grid = [{"batch_size": b, "noise_factor": f} for b in batch_sizes for f in chosen["noise_factors"]]
        listed = {"search": [small | {"candidate": c} for c in self._candidates()], "scaling": grid}
        trials = {f"{stage}{i}": {"stage": stage, **trial} for stage in listed for i, trial in enumerate(listed[stage])}
        return trials | {"prediction": {"stage": "prediction", **small}, "full": {"stage": "full", "batch_size": None}}

    def _candidates(self) -> list[Settings]:
        """The settings that are searched."""
        chosen, options = self._config["tan"], self._config["trainings"][self._config["tan"]["training"]]["options"]
        return [
            {"learning_rate": rate, "multiplicity": copies, "num_steps": steps}
            for steps in chosen["num_steps"] or [options["num_steps"]]
            for copies in chosen["multiplicities"] or [options["augmentation"]["multiplicity"]]
            for rate in chosen["learning_rates"] or [options["learning_rate"]]
        ]

    def _tan(self, dataset: str, trial: str) -> Settings:
        chosen, described = self._config["tan"], self._trials()[trial]
        reference, stage = self._config["trainings"][chosen["training"]], described["stage"]
        settings = {
            **self._images(dataset),
            **{name: reference[name] for name in ("model", "options")},
            **described,
            "epsilon": float(chosen["epsilon"] or reference["epsilons"][0]),
            "delta": self._config["delta"],
            "accountant": self._config["audit"]["accountant"],
            # All trials of a stage share seeds, and so their initial models; the last two stages share theirs.
            "seeds": [
                self.seed("tan", "full" if stage == "prediction" else stage, dataset, number)
                for number in range(chosen["num_runs"])
            ],
        }
        if stage == "search":
            return settings | {"num_validation": chosen["num_validation"]}
        if stage == "scaling":
            return settings
        searched = [self.digest("tan", dataset=dataset, trial=name) for name in self.searched()]
        return settings | {"candidates": self._candidates(), "inputs": {"searched": searched}}

    def _tan_table(self) -> Settings:
        trials = self.trials()
        stages = [self._trials()[trial["trial"]]["stage"] for trial in trials]
        return {
            "inputs": {"trials": [self.digest("tan", **trial) for trial in trials]},
            "trials": [{"dataset": t["dataset"], "stage": stage} for t, stage in zip(trials, stages, strict=True)],
        }

    def _tan_figure(self) -> Settings:
        return {"inputs": {"table": self.digest("tan_table")}, "style": figure_style()}

    def _cost(self) -> Settings:
        stages = dict(zip(COSTS, ("canaries", "models", "scores", "audits"), strict=True))
        jobs = self.costs()
        return {
            "inputs": {rule: [self.digest(stages[rule], **job) for job in jobs[rule]] for rule in COSTS},
            "jobs": jobs,
        }

    def _comparison(self, comparison: str) -> Settings:
        chosen, trainings = self._config["comparisons"][comparison], self._config["trainings"]
        names = _config.compared_trainings(self._config, comparison)
        inputs = {"summary": self.digest("summary")} | ({"cost": self.digest("cost")} if chosen["by"] == "cost" else {})
        return {
            "inputs": inputs,
            "kinds": _config.compared_kinds(self._config, comparison),
            "order": [chosen["canaries"], names],  # of mappings it is lost
            "trainings": {name: {"model": trainings[name]["model"]} for name in names},
            "by": chosen["by"],
            "auditor": chosen["auditor"],
            "score": self._config["tables"]["score"],
            "protocol": self.protocol("tables", "protocol"),
        }

    def _accuracy(self) -> Settings:
        chosen, trainings = self._config["accuracy"], self._config["trainings"]
        return {
            "inputs": {"summary": self.digest("summary"), "cost": self.digest("cost")},
            "trainings": {
                name: {key: trainings[name][key] for key in ("model", "options")} for name in chosen["trainings"]
            },
            "order": chosen["trainings"],  # of mappings it is lost
            "canary": chosen["canary"],
        }

    def _accuracy_figure(self) -> Settings:
        return {"inputs": {"table": self.digest("accuracy")}, "style": figure_style()}

    def _dirac(self, dataset: str, training: str, epsilon: str) -> Settings:
        options, roles = self._config["trainings"][training]["options"], self._roles(training)
        num_train = self._config["num_train"] or data.SOURCES[self.datasets[dataset]].num_train
        num_canaries = self._config["canaries"]["num_canaries"]
        return {
            "num_canaries": num_canaries,
            "num_others": num_train - num_canaries,
            **{name: options[name] for name in ("sampling_prob", "num_steps")},
            "epsilon": epsilon,
            "delta": self._config["delta"],
            "accountant": self._config["audit"]["accountant"],
            "runs": list(range(len(roles))),
            "roles": [role for role, _ in roles],
            "seeds": [self._run_seed(dataset, training, epsilon, *role) for role in roles],
        }

    def _dirac_audits(self, dataset: str, training: str, epsilon: str) -> Settings:
        scored = self.digest("dirac", dataset=dataset, training=training, epsilon=epsilon)
        audit = self._config["audit"]
        return {
            "inputs": {"scores": scored, "runs": scored},
            "cell": {"dataset": dataset, "canary": ledger.DIRAC, "training": training, "epsilon": epsilon},
            "audit": {
                "scores": list(ledger.WHITE_BOX.values()),
                "auditors": [self._config["ledger"]["auditor"]],
                "protocols": [self.protocol("tables", "protocol")],
                **{name: audit[name] for name in ("guess_fraction", "grid")},
                "accountant": "pld",  # beside it RDP's epsilon is always given
                "game": self._config["trainings"][training]["game"],
                "delta": self._config["delta"],
                "significance": self._config["significance"],
                "sampling_prob": self._config["trainings"][training]["options"]["sampling_prob"],
            },
        }

    def _ledger(self) -> Settings:
        names = self._config["ledger"]["trainings"]
        inputs = {"dirac": [self.digest("dirac_audits", **cell) for cell in self.ledger_cells()]}
        return {
            "inputs": inputs | {"summary": self.digest("summary")},
            "canaries": {name: _config.ledger_kinds(self._config, name) for name in names},
            "order": names,  # of mappings it is lost
            "auditor": self._config["ledger"]["auditor"],
            "protocol": self.protocol("tables", "protocol"),
        }

    def _ledger_figure(self) -> Settings:
        return {"inputs": {"table": self.digest("ledger")}, "style": figure_style()}

    def _comparison_figure(self, comparison: str) -> Settings:
        return {"inputs": {"table": self.digest("comparison", comparison=comparison)}, "style": figure_style()}

    def _roles(self, training: str) -> list[tuple[str, int]]:
        """Lists all runs of a training: the role, and the number among the runs of that role."""
        recipe = self._config["trainings"][training]
        return [(role, number) for role, key in ROLES.items() for number in range(recipe[key])]

    def _run_seed(self, dataset: str, training: str, epsilon: str, role: str, number: int) -> int:
        """Derives the seed of a run from its number within its role: runs more or less of one role change no other."""
        return self.seed("run" if role == "audited" else f"{role}_run", dataset, training, epsilon, number)

    def _described(self, dataset: str, training: str, canary: str) -> Settings:
        """Says of a cell, at any epsilon, what `reproduction.compare` compares with published numbers."""
        recipe, kind = self._config["trainings"][training], self._config["canaries"]["kinds"][canary]
        name, size, options = self.datasets[dataset], self._config["image_size"], recipe["options"]
        num_train = self._config["num_train"] or data.SOURCES[name].num_train
        pretrained = recipe["pretraining"] is not None
        facts = {
            "dataset": name,
            "num_train": num_train,
            "image_size": size or data.SOURCES[name].image_shape[0],
            "model": recipe["model"]["name"],
            "pretraining": self._config["pretrainings"][recipe["pretraining"]]["dataset"] if pretrained else None,
            "delta": self._config["delta"],
            "clip_norm": options.get("clip_norm"),
            "multiplicity": options["augmentation"]["multiplicity"] if recipe["algorithm"] == "dpsgd" else None,
            "metamodel": kind["model"]["name"] if "model" in kind else None,
            "start": kind.get("start"),
            "objective": kind["objective"]["name"] if "objective" in kind else None,
        }
        if recipe["algorithm"] == "dpsgd":
            # Of all but the canaries that are left out, half of them on average.
            facts["batch_size"] = options["sampling_prob"] * (num_train - self.num_canaries(canary) / 2)
        else:
            facts["batch_size"] = options["batch_size"]
        return {
            "dataset": dataset,
            "training": training,
            "canary": canary,
            "facts": facts,
            "matches": {
                "dataset": data.origin(name),
                "training": f"{recipe['algorithm']}_finetune" if pretrained else recipe["algorithm"],
                "canary": kind["family"],
            },
        }

    def _images(self, dataset: str) -> Settings:
        """Which images are trained on."""
        num_train = self._config["num_train"]
        subset = {} if num_train is None else {"num_train": num_train}
        return {"dataset": self.datasets[dataset], **subset, **self._shape()}

    def _shape(self) -> Settings:
        """What images are made into; channels only where they are asked for, so that other results stay valid."""
        channels = self._config["channels"]
        return {"image_size": self._config["image_size"], **({} if channels is None else {"channels": channels})}
