"""What each stage of the workflow depends on: its part of the config, its seeds, its inputs by digest.

The settings of a stage are all that its script is given, so that no key can change a result unnoticed; and no more
than that, so that a key of a later stage reruns no earlier one. Here are the stages that show what `_computed`'s made.
"""

import functools
import json
from pathlib import Path

import _config
from _computed import Computed, Settings

from metacanary import data, store

# The numbers of papers, which `make_reproduction` puts beside ours.
PUBLISHED = Path(__file__).resolve().parents[2] / "config" / "published.csv"

# What figures look like.
STYLE = Path(__file__).resolve().parents[2] / "metacanary" / "paper.mplstyle"

# The rules whose jobs' cost is compared.
COSTS = ("optimize_canaries", "train_audit_models", "score_membership", "compute_epsilon")


@functools.cache
def figure_style() -> str:
    """The digest of the style sheet of figures, which is no code."""
    return store.digest(STYLE.read_text(encoding="utf-8"))


def _unique(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leaves out what comes a second time."""
    return [item for number, item in enumerate(items) if item not in items[:number]]


class Stages(Computed):
    """The settings of every stage under one config; `Computed` says what it is made from."""

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

    def _table1(self) -> Settings:
        kinds = self._config["canaries"]["kinds"].items()
        objectives = {name: _config.objective_of(kind) for name, kind in kinds if kind["family"] in _config.OPTIMIZED}
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
        names, named = ("model", "algorithm", "training"), {}
        for kind in {v["canary"] for v in variants}:
            of = kinds[kind]["objective"] | {"name": _config.objective_of(kinds[kind])}
            named[kind] = {name: kinds[kind][name] for name in names} | {"objective": of}
        stages = {"measured": "metasmoothness", "histories": "canaries"}
        return {
            "inputs": {name: [self.digest(stage, **v) for v in variants] for name, stage in stages.items()},
            "variants": [v | named[v["canary"]] for v in variants],
            "num_averaged": self._config["metasmoothness"]["num_averaged"],
        }

    def _metasmoothness_figure(self) -> Settings:
        return {"inputs": {"table": self.digest("metasmoothness_table")}, "style": figure_style()}

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
            "trainings": {
                name: {key: trainings[name][key] for key in ("model", "algorithm", "pretraining")} for name in names
            },
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
            "objective": _config.objective_of(kind) if "objective" in kind else None,
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
