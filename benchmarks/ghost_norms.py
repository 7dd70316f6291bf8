"""Norms of examples' gradients by each convolution: from the gradients, or from two Gram matrices (the ghost norm).

    python -m benchmarks.ghost_norms

For each distinct convolution of a network: seconds of both ways for one microbatch, compiled, in turns; and which of
them `layer_forms.Convolution` takes, by counting multiplications. Both ways must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.markdown import markdown
from benchmarks.measure import processor
from benchmarks.step_vjp import fastest
from metacanary import backend, layer_forms, layer_gradients, models, store

RESULTS = Path(__file__).resolve().parent / "results" / "ghost_norms.csv"
SEED = 0
BATCH = 16
# name, options, image shape
SETTINGS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("convnet", {"widths": (8, 16), "mean": (0.5,), "std": (0.5,)}, (16, 16, 1)),
    ("resnet9", {"width": 0.5}, (32, 32, 3)),
]


@dataclass(frozen=True)
class Forced(layer_forms.Convolution):
    """A convolution whose norms are made in one way, whatever is cheaper."""

    ghost: bool = False

    def is_ghost_cheaper(self, x: Sequence[int], d: Sequence[int]) -> bool:
        """The way that is forced."""
        return self.ghost


def convolutions(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """The convolutions of a network: path, layer, and parameters, inputs and derivatives by the outputs of a batch."""
    model = models.build(name, num_classes=10, **options)
    params = models.init(model, jax.random.key(SEED), shape)
    rng = np.random.default_rng(SEED)
    images = jnp.asarray(rng.random((BATCH, 1, *shape)), jnp.float32)
    taken = layer_gradients.take_apart(model, params, images, lambda logits: jax.nn.logsumexp(logits, axis=-1).sum())
    return [
        (path, layer, (taken.params[path], taken.inputs[path], taken.derivatives[path]))
        for path, layer in taken.layers.items()
        if type(layer) is layer_forms.Convolution
    ]


def ways(layer: layer_forms.Convolution, arguments: tuple[Any, ...]) -> list[Callable[[], jax.Array]]:
    """Both ways to the squared norms, compiled, from the gradients first."""
    built = []
    for ghost in (False, True):
        forced = Forced(layer.module, size=layer.size, stride=layer.stride, ghost=ghost)
        compiled = jax.jit(forced.squared_norms).lower(*arguments).compile()
        built.append(lambda compiled=compiled: compiled(*arguments))
    return built


def measure(
    turns: int, settings: Sequence[tuple[str, dict[str, Any], tuple[int, int, int]]] = SETTINGS
) -> pd.DataFrame:
    """A row for each distinct convolution of each network.

    Raises:
      ValueError: if the two ways do not agree to 1e-3.
    """
    rows = []
    for name, options, shape in tqdm(settings, unit="network"):
        seen = set()
        for path, layer, arguments in convolutions(name, options, shape):
            x, d = arguments[1].shape, arguments[2].shape
            if (x, d) in seen:
                continue
            seen.add((x, d))
            plain, ghost = calls = ways(layer, arguments)
            if not np.allclose(plain(), ghost(), rtol=1e-3):
                raise ValueError(f"{name}, layer {path}: the norms differ: {plain()} and {ghost()}")
            seconds = fastest(calls, turns)
            rows.append(
                {
                    "network": name if "width" not in options else f"{name} width {options['width']}",
                    "layer": path,
                    "pixels": int(np.prod(d[2:-1])),
                    "channels": f"{x[-1]} to {d[-1]}",
                    "gradient_us": 1e6 * seconds[0] / BATCH,
                    "ghost_us": 1e6 * seconds[1] / BATCH,
                    "chosen": "ghost" if layer.is_ghost_cheaper(x, d) else "gradient",
                    "faster": "ghost" if seconds[1] < seconds[0] else "gradient",
                }
            )
    return pd.DataFrame(rows)


def table(measured: pd.DataFrame) -> str:
    """The section of the README."""
    first, right = measured.iloc[0], int((measured["chosen"] == measured["faster"]).sum())
    cells = measured[["network", "layer", "pixels", "channels", "gradient_us", "ghost_us", "chosen", "faster"]].copy()
    cells[["gradient_us", "ghost_us"]] = cells[["gradient_us", "ghost_us"]].map("{:.4g}".format)
    cells = cells.rename(columns={"gradient_us": "gradient, µs", "ghost_us": "ghost, µs"})
    return (
        f"{first['processor']}, one thread, jax {first['jax']}, batch {BATCH}, least of {first['turns']} turns, "
        f"{first['date']}; µs per example. The rule chose the faster way for {right} of {len(measured)} "
        f"convolutions.\n\n"
        f"{markdown(cells)}"
    )


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    backend.configure(threads=1)
    measured = measure(args.turns)
    measured = measured.assign(turns=args.turns, processor=processor(), jax=jax.__version__, date=date.today())
    store.write_text(args.output, measured.to_csv(index=False))


if __name__ == "__main__":
    main()
