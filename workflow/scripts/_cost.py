"""What a config costs: jobs, hours and disk by rule, from steps that are measured now, before anything is submitted.

    make cost CONFIG=config/digits.yaml
    srun --partition=gpu --gpus=1 make cost    # on the GPU that the jobs will have

A job that is finished in the config's results_dir counts with the wall time of its last attempt instead. Hours are
those of the rules that ask for a GPU; the others take minutes each and are only counted. Not in the hours: waiting in
the queue, the seconds in which Snakemake starts, and the test of a trained model.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _build
import _check
import _config
import _config_error
import _family
import _stages
import jax
import numpy as np
import optimize_canaries
import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from metacanary import backend, data, gradient_max, models, optimization, runs, store, training, training_together

SCHEMA = Path(__file__).resolve().parent.parent / "schemas" / "config.schema.yaml"
Recipe = training.Recipe


@dataclasses.dataclass(kw_only=True)
class Cost:
    """Of the jobs of a rule.

    Attributes:
      jobs: How many.
      seconds: Of all of them together; None if they are only counted.
      longest: Seconds of the longest.
      bytes: On disk when all is done.
      source: Where the seconds are from.
    """

    jobs: int = 0
    seconds: float | None = None
    longest: float = 0.0
    bytes: int = 0
    source: set[str] = dataclasses.field(default_factory=set)

    def add(self, seconds: float, num_bytes: int, source: str) -> None:
        """Counts one more job."""
        self.jobs += 1
        self.seconds = (self.seconds or 0.0) + seconds
        self.longest = max(self.longest, seconds)
        self.bytes += num_bytes
        self.source.add(source)


class Measure:
    """Seconds of a job, by its settings, each kind measured once.

    Args:
      steps: Steps to take the median of, after one that compiles.
      rows: Rows of a batch to measure with, where the whole takes too long; what they take is scaled up.
    """

    def __init__(self, *, steps: int, rows: int | None) -> None:
        self._steps, self._rows = steps, rows
        self._known: dict[str, Any] = {}

    def training(self, settings: dict[str, Any], chosen: Recipe) -> tuple[float, float]:
        """Seconds to compile a step of a training, and seconds of a step, of all runs that are trained at once."""
        together = settings.get("runs_together", 1)
        key = store.digest(
            [repr(dataclasses.replace(chosen, num_steps=1)), settings["model"], shape(settings), together]
        )
        if key not in self._known:
            self._known[key] = self._step(settings, chosen)
        return self._known[key]

    def optimization(self, settings: dict[str, Any]) -> float:
        """Seconds of the optimisation of a canary kind, as its replay is planned from measured steps."""
        key = store.digest(settings["kind"] | {"images": shape(settings), "num_canaries": settings["num_canaries"]})
        if key not in self._known and settings["kind"]["family"] == _config.GRADIENT_MAX:
            self._known[key] = self._norms(settings)
        if key not in self._known:
            kind, dataset = settings["kind"], pictures(settings)
            chosen = optimize_canaries.settings_of(kind)
            fewer, scale = self._fewer_rows(chosen.recipe, shape(settings)[0])
            start = _family.canaries_of(kind["start"], settings, dataset)
            model, pool = _build.model(kind["model"], len(dataset.class_names)), _build.pool(settings, dataset, start)
            budget = {"device": kind["memory_mb"]["device"] * 2**20}
            measured = dataclasses.replace(chosen, recipe=fewer)
            plan, _ = optimization.plan_replay(measured, model, pool, start, budget=budget)
            self._known[key] = plan.seconds * scale * chosen.num_trainings * chosen.num_metasteps
        return self._known[key]

    def _norms(self, settings: dict[str, Any]) -> float:
        """Seconds of an optimisation of gradients' norms: its proxies, and its steps, which proxies alike share."""
        kind, dataset = settings["kind"], pictures(settings)
        chosen, model = optimize_canaries.norm_settings_of(kind), _build.model(kind["model"], len(dataset.class_names))
        compiling, step = self.training(settings | {"model": kind["model"]}, chosen.recipe)
        start = _family.canaries_of(kind["start"], settings, dataset)
        proxy = models.init(model, runs.stream(0, "init"), shape(settings)[1:])
        measured = dataclasses.replace(chosen, num_steps=self._steps + 1)
        seconds = [row["seconds"] for _, row in gradient_max.maximize(measured, model, start, [proxy])]
        proxies = chosen.num_proxies * len(chosen.proxy_steps)
        trained = compiling + chosen.num_proxies * chosen.recipe.num_steps * step
        return trained + seconds[0] + chosen.num_steps * proxies * statistics.median(seconds[1:])

    def _step(self, settings: dict[str, Any], chosen: Recipe) -> tuple[float, float]:
        """Compiles a step and takes some."""
        dataset, (chosen, scale) = pictures(settings), self._fewer_rows(chosen, shape(settings)[0])
        chosen = dataclasses.replace(chosen, num_steps=self._steps + 1)
        inserted = _family.canaries_of("random", settings | {"num_canaries": 2, "seed": 0}, dataset)
        model = _build.model(settings["model"], len(dataset.class_names))
        pool = _build.pool(settings, dataset, inserted)
        coins, together = np.array([True, False]), settings.get("runs_together", 1)
        if together > 1:
            seeds, starts = range(together), [None] * together
            included = np.stack([coins] * together)
            state = training_together.initial_state(chosen, model, pool, included, seeds=seeds, initial=starts)
            step = training_together.compiled_step(chosen, model)
        else:
            state = training.initial_state(chosen, model, pool, coins, seed=0)
            step = training.compiled_step(chosen, model)
        seconds = []
        for t in range(self._steps + 1):
            began = time.perf_counter()
            state |= jax.block_until_ready(step(state, inserted.images, np.int32(t)))
            seconds.append(time.perf_counter() - began)
        return seconds[0], statistics.median(seconds[1:]) * scale

    def _fewer_rows(self, chosen: Recipe, num_train: int) -> tuple[Recipe, float]:
        """The recipe with smaller batches, if it is to be measured so, and by how much they are smaller."""
        sgd = hasattr(chosen, "batch_size")
        rows = chosen.batch_size if sgd else chosen.sampling_prob * num_train
        if self._rows is None or self._rows >= rows:
            return chosen, 1.0
        smaller = {"batch_size": self._rows, "microbatch": None} if sgd else {"sampling_prob": self._rows / num_train}
        return dataclasses.replace(chosen, **smaller), rows / self._rows


def shape(settings: dict[str, Any]) -> tuple[int, ...]:
    """Number, height, width and channels of the training images."""
    source, size = data.SOURCES[settings["dataset"]], settings["image_size"]
    height, width, channels = source.image_shape
    num_train, channels = settings.get("num_train") or source.num_train, settings.get("channels", channels)
    return (num_train, size or height, size or width, channels)


def pictures(settings: dict[str, Any]) -> data.Dataset:
    """Noise in the shape of a data set, which need not be there."""
    source, num_train = data.SOURCES[settings["dataset"]], shape(settings)[0]
    names = source.class_names

    def split(name: str, count: int) -> dict[str, np.ndarray]:
        images = np.random.default_rng(0).integers(0, 256, (count, *source.image_shape), dtype=np.uint8)
        return {f"{name}_images": images, f"{name}_labels": np.arange(count, dtype=np.int32) % len(names)}

    return data.Dataset(name=source.name, **split("train", num_train), **split("test", 1), class_names=names)


def parameter_bytes(settings: dict[str, Any]) -> int:
    """Bytes of the parameters of a model."""
    model = _build.model(settings["model"], len(data.SOURCES[settings["dataset"]].class_names))
    params = jax.eval_shape(lambda: models.init(model, runs.stream(0, "init"), shape(settings)[1:]))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def finished_seconds(path: Path) -> float | None:
    """The wall time of a finished job, if it is there."""
    try:
        return store.read_provenance(path)["wall_seconds"]
    except (OSError, KeyError, ValueError):
        return None


def costs(config: dict[str, Any], measure: Measure, results: Path) -> dict[str, Cost]:
    """The costs of a config by rule.

    Args:
      config: A checked config, defaults filled in.
      measure: How jobs are measured that are not finished.
      results: The folder in which finished jobs are looked for.
    """
    stages, kinds = _stages.Stages(config), config["canaries"]["kinds"]
    found = {name: Cost() for name in ("download", "make_canaries", "optimize_canaries", "measure_metasmoothness")}
    found |= {name: Cost() for name in ("train_audit_models", "score_membership", "compute_epsilon")}
    for name in config["datasets"]:
        source = data.SOURCES[name]
        found["download"].jobs += 1
        found["download"].bytes += (source.num_train + source.num_test) * int(np.prod(source.image_shape))
    pairs = {(cell["dataset"], cell["canary"]) for cell in stages.cells()}
    pairs |= {(variant["dataset"], variant["canary"]) for variant in stages.variants()}
    for dataset, canary in sorted(pairs):
        settings = stages.settings("canaries", dataset=dataset, canary=canary)
        num_bytes = 2 * 4 * settings["num_canaries"] * int(np.prod(shape(settings)[1:]))
        if kinds[canary]["family"] not in _config.OPTIMIZED:
            found["make_canaries"].jobs += 1
            found["make_canaries"].bytes += num_bytes
            continue
        known = finished_seconds(results / "canaries" / dataset / canary / "canaries.npz")
        seconds = measure.optimization(settings) if known is None else known
        found["optimize_canaries"].add(seconds, num_bytes, "steps" if known is None else "finished jobs")
    for variant in stages.variants():
        settings = stages.settings("metasmoothness", **variant)
        kind = settings["kind"]
        chosen = _build.recipe(kind["algorithm"], kind["training"])
        compiling, step = measure.training(settings | {"model": kind["model"]}, chosen)
        seconds = compiling + 3 * len(settings["seeds"]) * chosen.num_steps * step
        found["measure_metasmoothness"].add(seconds, 0, "steps")
    for cell in stages.cells():
        found["compute_epsilon"].jobs += 1
        folder = Path(results, "models", cell["dataset"], cell["canary"], cell["training"], f"eps{cell['epsilon']}")
        for block in stages.blocks(cell["training"]):
            settings = stages.settings("models", **cell, block=str(block))
            num_bytes = parameter_bytes(settings) * len(settings["runs"]) * (len(settings["snapshots"]) + 1)
            known = finished_seconds(folder / f"block{block}.npz")
            seconds = block_seconds(settings, measure) if known is None else known
            found["train_audit_models"].add(seconds, num_bytes, "steps" if known is None else "finished jobs")
            found["score_membership"].jobs += 1
    if dirac := stages.ledger_cells():
        found |= {name: Cost(jobs=len(dirac)) for name in ("score_dirac", "audit_dirac")}
    # Beside what every config has: tables that each have a figure, and what jobs cost, if any of them shows it.
    drawn = [stages.variants(), config["accuracy"]["trainings"], config["ledger"]["trainings"]]
    num_drawn = len(config["comparisons"]) + sum(map(bool, drawn))
    found["tables, figures"] = Cost(jobs=8 + 2 * num_drawn + any(stages.costs().values()))
    return {name: cost for name, cost in found.items() if cost.jobs}


def block_seconds(settings: dict[str, Any], measure: Measure) -> float:
    """Seconds of a block of runs, from measured steps; the noise has no part in them.

    Of runs that are trained at once: what is left over of a block counts as a whole group, and compiles once more.
    """
    options = settings["options"]
    noise = {"noise_multiplier": 1.0} if settings["algorithm"] == "dpsgd" else {}
    chosen = _build.recipe(settings["algorithm"], options | noise)
    compiling, step = measure.training(settings, chosen)
    whole, rest = divmod(len(settings["runs"]), settings.get("runs_together", 1))
    groups, programs = whole + (rest > 0), 1 + (whole > 0 and rest > 0)
    return programs * compiling + groups * chosen.num_steps * step


def table(found: dict[str, Cost]) -> str:
    """Lines to read."""
    total = Cost(jobs=sum(cost.jobs for cost in found.values()), bytes=sum(cost.bytes for cost in found.values()))
    total.seconds = sum(cost.seconds or 0.0 for cost in found.values())
    total.longest = max(cost.longest for cost in found.values())
    lines = [f"{'rule':24}{'jobs':>7}{'hours':>10}{'longest job':>14}{'disk':>11}  hours from"]
    for name, cost in [*found.items(), ("total", total)]:
        hours, longest = f"{(cost.seconds or 0) / 3600:.2f}", f"{cost.longest / 3600:.2f} h"
        timed = ["", ""] if cost.seconds is None else [hours, longest]
        disk = f"{cost.bytes / 1e6:.1f} MB" if cost.bytes else ""
        source = ", ".join(sorted(cost.source))
        lines.append(f"{name:24}{cost.jobs:>7}{timed[0]:>10}{timed[1]:>14}{disk:>11}  {source}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prints jobs, hours and disk of a config, from measured steps.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=5, help="steps to measure of each training (default: 5)")
    parser.add_argument("--rows", type=int, help="measure with batches of so many rows, and scale up")
    options = parser.parse_args(arguments)
    backend.configure(threads=1)
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    validate(config, SCHEMA)
    _check.check(config)
    device = store.device()
    print(f"{options.config}, at the speed of one {device['kind']} ({device['cpu']})")
    if options.rows:
        print(f"measured with batches of {options.rows} rows, scaled up in proportion: a coarse estimate")
    print(table(costs(config, Measure(steps=options.steps, rows=options.rows), Path(config["results_dir"]))))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, WorkflowError) as error:
        sys.exit(f"error: {_config_error.one_line(error)}")
