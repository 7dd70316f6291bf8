"""What it costs to differentiate a step's gradient again: mixed or reverse mode, forms of convolution, microbatches.

    python -m benchmarks.step_vjp

For each network, batch and microbatch: seconds of the gradient and of its pull-back (by parameters and pixels),
compiled once each, and XLA's account of the pull-back's temporaries. Alternatives are timed in turns, so that load on
the machine meets all alike; the least of all turns counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.measure import processor
from metacanary import backend, gradients, models, steps, store

RESULTS = Path(__file__).resolve().parent / "results" / "step_vjp.csv"
SEED = 0
# name, options, image shape, batches with microbatches
SETTINGS: list[tuple[str, dict[str, Any], tuple[int, int, int], list[tuple[int, int | None]]]] = [
    ("convnet", {"widths": (8, 16)}, (16, 16, 1), [(100, None), (400, None), (400, 50)]),
    ("convnet", {"widths": (16, 32)}, (16, 16, 1), [(100, None)]),
    ("convnet", {"widths": (16, 32), "group_norm": 4}, (16, 16, 1), [(100, None)]),
    ("resnet9", {"width": 0.25}, (32, 32, 3), [(20, None)]),
]


def functions(
    name: str, options: dict[str, Any], shape: tuple[int, ...], batch: int, microbatch: int | None, mode: str
) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The gradient and its pull-back, compiled, as functions of nothing, and the pull-back's temporaries in bytes."""
    grey = {"mean": (0.5,), "std": (0.5,)} if shape[-1] == 1 else {}
    model = models.build(name, num_classes=10, **options, **grey)
    rng = np.random.default_rng(SEED)
    params = models.init(model, jax.random.key(SEED), shape)
    images, labels = jnp.asarray(rng.random((batch, *shape)), jnp.float32), jnp.asarray(rng.integers(0, 10, batch))
    loss = partial(steps.cross_entropy, model)

    def gradient(p: Any, x: jax.Array) -> Any:
        return gradients.mean_gradient(loss, p, x, labels, mode=mode, microbatch=microbatch)

    once = jax.jit(gradient).lower(params, images).compile()
    again = jax.jit(lambda p, x, v: jax.vjp(gradient, p, x)[1](v)).lower(params, images, params).compile()
    v = once(params, images)
    analysis: Any = again.memory_analysis()
    return lambda: once(params, images), lambda: again(params, images, v), analysis.temp_size_in_bytes


def fastest(calls: list[Callable[[], Any]], turns: int) -> list[float]:
    """The least seconds of each call, over turns of all."""
    found = [float("inf")] * len(calls)
    for turn in range(turns + 1):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call())
            if turn > 0:  # the first warms up
                found[i] = min(found[i], time.perf_counter() - began)
    return found


def measure(turns: int) -> pd.DataFrame:
    """A row for each setting, form of convolution and mode."""
    rows = []
    for name, options, shape, batches in tqdm(SETTINGS, unit="network"):
        for batch, microbatch in batches:
            variants = [(matmul, mode) for matmul in (True, False) for mode in gradients.MODES]
            built = [
                functions(name, {**options, "as_matmul": m}, shape, batch, microbatch, mode) for m, mode in variants
            ]
            seconds = fastest([call for once, again, _ in built for call in (once, again)], turns)
            for i, (matmul, mode) in enumerate(variants):
                described = " ".join([name, *(f"{key} {value}" for key, value in options.items())])
                rows.append(
                    {
                        "network": described.replace("_", " "),
                        "batch": batch,
                        "microbatch": batch if microbatch is None else microbatch,
                        "convolution": "matrix product" if matmul else "lax.conv",
                        "mode": mode,
                        "gradient_ms": 1e3 * seconds[2 * i],
                        "pull_back_ms": 1e3 * seconds[2 * i + 1],
                        "temporaries_mib": built[i][2] / 2**20,
                    }
                )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    backend.configure(threads=1)
    table = measure(args.turns)
    table = table.assign(turns=args.turns, seed=SEED, processor=processor(), jax=jax.__version__, date=date.today())
    store.write_text(args.output, table.to_csv(index=False))


if __name__ == "__main__":
    main()
