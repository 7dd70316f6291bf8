"""Audit runs one after the other and R at once (`training_together`): milliseconds per step of a run, and memory.

    python -m benchmarks.runs_together                                          # on this machine's CPU, one thread
    python -m benchmarks.runs_together --device gpu --output /tmp/gpu.csv

The demo's network, images and recipes, of SGD and of DP-SGD (`config/digits.yaml`). All contenders of an algorithm are
compiled first, then they take `--num-steps` steps each in turns, every other time in the opposite order; the first run
of each must be that of the series.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.markdown import markdown
from benchmarks.measure import processor
from metacanary import backend, data, families, images, models, runs, store, training, training_together
from metacanary.recipes import DPSGD, SGD

RESULTS = Path(__file__).resolve().parent / "results" / "runs_together.csv"
TOGETHER = (1, 4, 8, 16)
NUM_CANARIES = 100
RECIPES: dict[str, training.Recipe] = {
    "sgd": SGD(num_steps=200, batch_size=100, learning_rate=0.3),
    "dpsgd": DPSGD(num_steps=200, sampling_prob=0.2, clip_norm=1.0, noise_multiplier=1.0, learning_rate=4.0),
}
"""The demo's; how much noise is drawn changes no step's cost."""
FIRST_SEED = 1
UNTIMED = 5
"""Steps at the beginning of each turn that are not timed: the contender before left its own arrays in the caches."""


@dataclass(kw_only=True)
class Contender:
    """Runs that are trained in one way.

    Attributes:
      algorithm: sgd or dpsgd.
      together: R, or 0 for one run after the other, of which one is measured.
      start: the state before the first step.
      step: (state, pixels, t) -> what changes, compiled.
      memory_mib: what XLA says that a step needs, arguments and results included; NaN if it does not.
      seconds, cpu_seconds: of each turn.
      end: the parameters of the first run after the steps of a turn.
    """

    algorithm: str
    together: int
    start: dict[str, Any]
    step: Callable[..., dict[str, Any]]
    memory_mib: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    end: Any = None

    def turn(self, pixels: jax.Array, num_steps: int) -> None:
        """Takes the first steps of the runs and notes how long `num_steps` of them took."""
        state = self._steps(self.start, pixels, range(UNTIMED))
        began, cpu_began = time.perf_counter(), time.process_time()
        state = self._steps(state, pixels, range(UNTIMED, UNTIMED + num_steps))
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        self.end = jax.tree.map(lambda x: x[0], state["params"]) if self.together else state["params"]

    def _steps(self, state: dict[str, Any], pixels: jax.Array, steps: Iterable[int]) -> dict[str, Any]:
        """The state after some steps, when the device is done with them."""
        for t in steps:
            state = state | self.step(state, pixels, np.int32(t))
        return jax.block_until_ready(state)


def problem(data_dir: Path) -> tuple[nn.Module, runs.Pool, jax.Array]:
    """The demo's network, training images and mislabelled canaries."""
    dataset = data.load("digits", data_dir)
    pixels, labels = images.resize(dataset.train_images, 16), dataset.train_labels
    chosen = families.make("mislabeled", pixels, labels, num_canaries=NUM_CANARIES, num_classes=10, seed=FIRST_SEED)
    model = models.build("convnet", num_classes=10, widths=(8, 16), logit_scale=0.3)
    return model, runs.Pool.make(pixels, labels, chosen.source_index, chosen.label), jnp.asarray(chosen.images)


def contender(
    algorithm: str, together: int, model: nn.Module, pool: runs.Pool, pixels: jax.Array, num_steps: int
) -> Contender:
    """Runs before their first step, and their step compiled, for turns of so many steps that are timed."""
    recipe, count = replace(RECIPES[algorithm], num_steps=UNTIMED + num_steps), together or 1
    seeds = [FIRST_SEED + i for i in range(count)]
    included = np.stack([runs.coins(seed, NUM_CANARIES, "independent") for seed in seeds])
    if together:
        starts = [None] * count
        start = training_together.initial_state(recipe, model, pool, included, seeds=seeds, initial=starts)
        step: Any = training_together.compiled_step(recipe, model)
    else:
        start = training.initial_state(recipe, model, pool, included[0], seed=seeds[0])
        step = training.compiled_step(recipe, model)
    compiled = step.lower(start, pixels, np.int32(0)).compile()
    memory = compiled.memory_analysis()
    sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
    return Contender(
        algorithm=algorithm, together=together, start=start, step=compiled, memory_mib=float(sum(sizes)) / 2**20
    )


def measure(
    data_dir: Path,
    *,
    num_steps: int,
    repeats: int,
    together: Sequence[int] = TOGETHER,
    algorithms: Sequence[str] = tuple(RECIPES),
) -> pd.DataFrame:
    """A row for each algorithm and number of runs; 0 is one after the other.

    Raises:
      ValueError: if a run that is trained with others is not the one that is trained alone.
    """
    (model, pool, pixels), rows = problem(data_dir), []
    for algorithm in algorithms:
        chosen = [contender(algorithm, count, model, pool, pixels, num_steps) for count in (0, *together)]
        for number in tqdm(range(repeats + 1), desc=algorithm, unit="turn"):
            for one in chosen[:: -1 if number % 2 else 1]:
                one.turn(pixels, num_steps)
                if number == 0:  # it warms up
                    one.seconds, one.cpu_seconds = [], []
        series = chosen[0]
        for one in chosen:
            error = _relative_error(one.end, series.end)
            if not error < 1e-3:
                raise ValueError(f"{algorithm}, {one.together} at once: a run's parameters differ by {error:.2g}")
            per_run = 1e3 / num_steps / (one.together or 1)
            rows.append(
                {
                    "algorithm": algorithm,
                    "together": one.together,
                    "ms": per_run * statistics.median(one.seconds),
                    "ms_min": per_run * min(one.seconds),
                    "ms_max": per_run * max(one.seconds),
                    "cpu_ms": per_run * statistics.median(one.cpu_seconds),
                    "memory_mib": one.memory_mib,
                    "relative_error": error,
                    "num_steps": num_steps,
                    "repeats": repeats,
                }
            )
    return pd.DataFrame(rows)


def _relative_error(found: Any, expected: Any) -> float:
    """Of parameters, over their norm."""
    first, second = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected))
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def table(measured: pd.DataFrame) -> str:
    """The section of the README; on a CPU by the process's own seconds, which other jobs lengthen less."""
    parts = []
    for device, part in measured.groupby("device", sort=False):
        column = "cpu_ms" if device == "cpu" else "ms"
        cells = part[["algorithm"]].copy()
        cells["runs"] = part["together"].map(lambda count: f"{count} at once" if count else "one after the other")
        cells["ms per step of a run"] = part[column].map("{:.2f}".format)
        series = part[part["together"] == 0].set_index("algorithm")[column]
        cells["times series"] = (part[column] / part["algorithm"].map(series)).map("{:.2f}".format)
        cells["MiB"] = part["memory_mib"].map("{:.0f}".format)
        first = part.iloc[0]
        clock = "CPU time of the process" if device == "cpu" else "wall time"
        machine = f"{first['processor']}, {'one thread, ' if device == 'cpu' else ''}jax {first['jax']}"
        described = (
            f"{machine}, {clock}, median of {first['repeats']} turns of {first['num_steps']} steps, {first['date']}. "
            f"A run's parameters were those of series to {part['relative_error'].max():.0e} of their norm."
        )
        parts.append(f"{described}\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--together", type=int, nargs="+", default=TOGETHER)
    parser.add_argument("--algorithms", nargs="+", choices=RECIPES, default=tuple(RECIPES))
    parser.add_argument("--data-dir", type=Path, default=RESULTS.parents[2] / "results" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.device])
    backend.configure(threads=1)
    chosen = {name: getattr(args, name) for name in ("num_steps", "repeats", "together", "algorithms")}
    measured = measure(args.data_dir, **chosen)
    described = {"device": args.device, "processor": processor(), "jax": jax.__version__, "date": date.today()}
    store.write_text(args.output, measured.assign(**described).to_csv(index=False))


if __name__ == "__main__":
    main()
