"""What each stage that computes depends on: data, canaries, models, scores, audits, Dirac canaries, trials.

`_stages` adds the stages that show what was computed.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import _config

from metacanary import data, ledger, reference_scores, scores, store

Config = Mapping[str, Any]
Settings = dict[str, Any]

# The roles of runs, and the key of a training that says how many it has; their runs are numbered in this order.
ROLES = {"audited": "num_runs", "surrogate": "num_surrogate_runs", "reference": "num_reference_runs"}


def name_epsilon(epsilon: float | str) -> str:
    """Writes a target epsilon as paths have it: "8", "0.5", "inf"."""
    return f"{float(epsilon):g}"


# Keys that were added later, and the value of each that asks for nothing. Settings do without them then, so that
# results of configs that do not have them stay valid.
OFF = {
    "channels": None,
    "interference": 0,
    "labels": None,
    "num_train": None,
    "objective_steps": [],
    "runs_together": 1,
    "unit_gradients": False,
}


def _asked(settings: Settings) -> Settings:
    """Leaves out what `OFF` says is not asked for."""
    return {name: value for name, value in settings.items() if name not in OFF or value != OFF[name]}


class Computed:
    """The settings of the stages that compute, under one config.

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

    def settings(self, stage: str, **wildcards: str) -> Settings:
        """All settings that a stage's result depends on.

        Args:
          stage: The name of one of these methods, without the underscore: dataset, canaries, models, table1, ...
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
            "kind": {name: value for name, value in _asked(kind).items() if name != "num_canaries"},
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
        images = {"dataset": chosen["dataset"]} | _asked({"num_train": chosen["num_train"]}) | self._shape()
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
            **_asked({"runs_together": recipe["runs_together"]}),  # of which results are rounded otherwise
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

    def _roles(self, training: str) -> list[tuple[str, int]]:
        """Lists all runs of a training: the role, and the number among the runs of that role."""
        recipe = self._config["trainings"][training]
        return [(role, number) for role, key in ROLES.items() for number in range(recipe[key])]

    def _run_seed(self, dataset: str, training: str, epsilon: str, role: str, number: int) -> int:
        """Derives the seed of a run from its number within its role: runs more or less of one role change no other."""
        return self.seed("run" if role == "audited" else f"{role}_run", dataset, training, epsilon, number)

    def _images(self, dataset: str) -> Settings:
        """Which images are trained on."""
        return {"dataset": self.datasets[dataset]} | _asked({"num_train": self._config["num_train"]}) | self._shape()

    def _shape(self) -> Settings:
        """What images are made into."""
        return _asked({name: self._config[name] for name in ("image_size", "channels")})
