"""Projects what the paper's canaries cost on one H100 or H200: hours and GiB, from a counted and a measured step.

    python -m benchmarks.paper_cost                 # counts; measures a few rows of the batch on this CPU
    python -m benchmarks.paper_cost --device gpu    # measures whole steps on the GPU, with and without microbatches
    python -m benchmarks.paper_cost --counts-only   # measures nothing: what the file has of a whole batch stays

The setting is read from config/config.yaml. Counted are XLA's floating-point operations of a training step and of its
VJP, and the bytes of a state and of what a VJP needs beside it, as compiled for the device at hand. On a CPU a few rows
stand for the whole batch; they tell nothing of microbatches, of which no hours are measured there.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
import yaml

from benchmarks.measure import processor
from metacanary import backend, models, recipes, replay_schedule, steps, store
from metacanary.replay_step import merge, split

PyTree = Any
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "paper_cost.csv"
GIB = 2**30
NUM_IMAGES, IMAGE_SHAPE = 50_000, (32, 32, 3)  # CIFAR-10's training set
ASSUMED_SHARE = 0.4
PEAK_TFLOPS = {"float32": 67, "TF32": 494}
"""Of H100 SXM and H200, dense, from NVIDIA's data sheets; what share of it is sustained is an assumption."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The training that is differentiated, and how often."""

    model: Any
    recipe: recipes.SGD
    num_canaries: int
    num_metagradients: int

    def with_rows(self, rows: int) -> Setting:
        """The same with so many rows in a batch."""
        return replace(self, recipe=replace(self.recipe, batch_size=rows))

    def in_microbatches(self, rows: int) -> Setting:
        """The same with a gradient that works on so many rows at a time."""
        return replace(self, recipe=replace(self.recipe, microbatch=rows))

    @property
    def microbatch(self) -> int:
        """Rows that a gradient works on at a time."""
        return self.recipe.microbatch or self.recipe.batch_size


def paper(config: Path = ROOT / "config" / "config.yaml") -> Setting:
    """The paper's setting of the kind `metagradient`."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))["canaries"]
    kind = settings["kinds"]["metagradient"]
    options = {**kind["training"], "schedule": recipes.Schedule(**kind["training"]["schedule"])}
    return Setting(
        model=models.build(kind["model"]["name"], num_classes=10, **kind["model"]["options"]),
        recipe=recipes.SGD(**options),
        num_canaries=settings["num_canaries"],
        num_metagradients=kind["num_metasteps"] * kind["num_splits"] * (2 if kind["complement"] else 1),
    )


def shapes(setting: Setting) -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """State and pixels as shapes."""
    params = jax.eval_shape(lambda: models.init(setting.model, jax.random.key(0), IMAGE_SHAPE))
    recipe = setting.recipe
    state = {"params": params, "optimizer": jax.eval_shape(recipe.build_optimizer().init, params)}
    state["order"] = jax.ShapeDtypeStruct((recipe.num_steps, recipe.batch_size), jnp.int32)
    state["images"] = jax.ShapeDtypeStruct((NUM_IMAGES - setting.num_canaries, *IMAGE_SHAPE), jnp.uint8)
    state["labels"] = jax.ShapeDtypeStruct((NUM_IMAGES,), jnp.int32)
    return state, jax.ShapeDtypeStruct((setting.num_canaries, *IMAGE_SHAPE), jnp.float32)


def compiled(setting: Setting) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """A training step, and its VJP by the state and by the pixels."""
    step = steps.sgd_step(setting.recipe, setting.model)
    state, pixels = shapes(setting)
    carried = {name: state[name] for name in ("params", "optimizer")}
    fixed = {name: state[name] for name in ("order", "images", "labels")}

    def advance(carried: PyTree, fixed: PyTree, pixels: jax.Array, t: jax.Array) -> PyTree:
        new = step({**carried, **fixed}, pixels, t)
        return {name: new[name] for name in carried}

    def pull_back(carried: PyTree, fixed: PyTree, pixels: jax.Array, t: jax.Array, adjoint: PyTree) -> PyTree:
        floats, rest = split(carried)
        return jax.vjp(lambda c, z: split(advance(merge(c, rest), fixed, z, t))[0], floats, pixels)[1](adjoint)

    t = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (carried, fixed, pixels, t)
    forwards = jax.jit(advance).lower(*arguments).compile()
    return forwards, jax.jit(pull_back).lower(*arguments, split(carried)[0]).compile()


def flops(program: jax.stages.Compiled, num_microbatches: int = 1) -> float:
    """XLA's count, of which a loop over microbatches is nearly all: it counts a loop's body once."""
    return num_microbatches * float((program.cost_analysis() or {})["flops"])


def working_bytes(program: jax.stages.Compiled) -> int:
    """What a program needs beside its arguments."""
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measured(setting: Setting, repeats: int) -> tuple[float, float]:
    """Median seconds of a step and of its VJP on the device at hand."""
    programs = compiled(setting)
    zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree) for tree in shapes(setting)]
    state, pixels = zeros
    carried = {name: state[name] for name in ("params", "optimizer")}
    carried["params"] = models.init(setting.model, jax.random.key(0), IMAGE_SHAPE)
    arguments = (carried, {name: state[name] for name in ("order", "images", "labels")}, pixels, jnp.int32(0))
    adjoint = jax.tree.map(jnp.ones_like, split(carried)[0])
    forwards = _median_seconds(lambda: programs[0](*arguments), repeats)
    return forwards, _median_seconds(lambda: programs[1](*arguments, adjoint), repeats)


def _median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """After a first call that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeats // 2]


def rows(setting: Setting, measured_rows: int, repeats: int, microbatch: int) -> Iterator[dict[str, Any]]:
    """A row for each microbatch, basis of the seconds and schedule; measured_rows 0 measures nothing."""
    state, _ = shapes(setting)
    state_bytes, data_bytes = num_bytes([state["params"], state["optimizer"]]), num_bytes(state["images"])
    num_steps, batch = setting.recipe.num_steps, setting.recipe.batch_size
    for part in (setting, setting.in_microbatches(microbatch)):
        programs = compiled(part)
        counted = [flops(program, batch // part.microbatch) for program in programs]
        temporary = max(map(working_bytes, programs))
        for basis, seconds in _seconds(part, counted, measured_rows, repeats):
            for branching in (9, math.isqrt(num_steps - 1) + 1, num_steps):
                work = replay_schedule.work(num_steps, branching)
                total = setting.num_metagradients * (work.step_calls * seconds[0] + num_steps * seconds[1])
                held = work.states_held * state_bytes
                yield {
                    "basis": basis,
                    "branching": branching,
                    "microbatch": part.microbatch,
                    "num_metagradients": setting.num_metagradients,
                    "num_steps": num_steps,
                    "step_calls": work.step_calls,
                    "states_held": work.states_held,
                    "step_tflop": counted[0] / 1e12,
                    "vjp_tflop": counted[1] / 1e12,
                    "step_seconds": seconds[0],
                    "vjp_seconds": seconds[1],
                    "hours": total / 3600,
                    "state_gib": state_bytes / GIB,
                    "held_gib": held / GIB,
                    "working_gib": temporary / GIB,
                    "total_gib": (held + temporary + data_bytes) / GIB,
                    "compiled_for": processor(),
                    "versions": f"jax {jax.__version__}",
                    "date": time.strftime("%Y-%m-%d"),
                }


def _seconds(
    setting: Setting, counted: list[float], measured_rows: int, repeats: int
) -> Iterator[tuple[str, tuple[float, float]]]:
    """(basis, seconds of a step and of its VJP)."""
    for precision, peak in PEAK_TFLOPS.items():
        rate = ASSUMED_SHARE * peak * 1e12
        basis = f"H100/H200: counted FLOPs at an assumed {ASSUMED_SHARE:.0%} of {peak} TFLOP/s {precision}"
        yield basis, (counted[0] / rate, counted[1] / rate)
    batch = setting.recipe.batch_size
    on_gpu = jax.default_backend() != "cpu"
    used = batch if on_gpu else measured_rows
    # Few rows are less than a microbatch: scaled, they would pass the whole batch's seconds off as the microbatches'.
    if used == 0 or (used < batch and setting.microbatch < batch):
        return
    step, vjp = measured(setting.with_rows(used), repeats)
    scaled = "" if used == batch else f", {used} of {batch} rows, scaled by {batch / used:g}"
    yield f"{processor()}: measured{scaled}", (step * batch / used, vjp * batch / used)


def measured_before(path: Path, setting: Setting) -> pd.DataFrame:
    """The measured rows of a file, as they are, but those of microbatches that a whole batch was scaled for."""
    table = pd.read_csv(path)
    of_whole = table["microbatch"] == setting.recipe.batch_size
    is_scaled = table["basis"].str.contains("scaled by")
    return table[table["basis"].str.contains(": measured") & (of_whole | ~is_scaled)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table and print its main columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--measured-rows", type=int, default=8, help="of a batch, on a CPU")
    parser.add_argument("--counts-only", action="store_true", help="keep what --output has measured")
    parser.add_argument("--microbatch", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.counts_only and args.device == "gpu":
        parser.error("--counts-only: got --device gpu, expected cpu, where nobody needs a GPU's time")
    backend.configure()  # a step is timed as `replay` runs it: on a GPU, with deterministic operations
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    setting = paper()
    table = pd.DataFrame(rows(setting, 0 if args.counts_only else args.measured_rows, args.repeats, args.microbatch))
    if args.counts_only:
        table = pd.concat([table, measured_before(args.output, setting)])
    table = table.sort_values("basis", key=lambda names: pd.factorize(names)[0], kind="stable")
    store.write_text(args.output, table.to_csv(index=False, float_format="%.6g"))
    print(table[["basis", "branching", "microbatch", "hours", "total_gib"]].round(1).to_string(index=False))


if __name__ == "__main__":
    main()
