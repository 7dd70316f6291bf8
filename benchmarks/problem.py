"""The one problem that all contenders solve: differentiate an objective of a trained network by pixels of canaries.

Training is the workflow's (`metacanary.training`), as is the objective: the gradient asked for is the one that a
metastep of `metacanary.optimization` takes, without the complement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanary import data, families, gradients, images, models, runs, steps, store
from metacanary.objectives import SmoothAUROC
from metacanary.recipes import SGD

PyTree = Any
SEED = 1
NUM_CANARIES = 100
TEMPERATURE = 2.0
SETTINGS = ("digits", "digits_lax", "resnet9")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be differentiated.

    Attributes:
      model: the network.
      recipe: plain SGD.
      state: s[0] of `steps.sgd_state`, with the coins.
      pixels: z, float32 [m, height, width, channels].
    """

    model: nn.Module
    recipe: SGD
    state: dict[str, PyTree]
    pixels: jax.Array

    @property
    def num_steps(self) -> int:
        """T."""
        return self.recipe.num_steps

    @property
    def step(self) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
        """The package's step function."""
        return steps.sgd_step(self.recipe, self.model)

    def reverse_step(self, state: PyTree, pixels: jax.Array, t: jax.Array) -> PyTree:
        """The same step as one writes it by hand: its VJP is reverse-over-reverse, as JAX makes it."""
        rows = state["order"][t]
        batch = runs.take(state["images"], pixels, rows)
        loss = partial(steps.cross_entropy, self.model)
        gradient = gradients.grad(loss, "reverse")(state["params"], batch, state["labels"][rows])
        updates, opt_state = self.recipe.build_optimizer().update(gradient, state["optimizer"], state["params"])
        return {**state, "params": optax.apply_updates(state["params"], updates), "optimizer": opt_state}

    def objective(self, state: PyTree, pixels: jax.Array) -> tuple[jax.Array, None]:
        """Minus the smooth AUROC of the canaries, and nothing beside it."""
        labels = state["labels"][-len(pixels) :]
        logits = models.apply(self.model, state["params"], pixels)
        return SmoothAUROC(temperature=TEMPERATURE)(logits, labels, state["included"]), None


def make(setting: str, num_steps: int, data_dir: Path) -> Problem:
    """Build the problem of a setting.

    Args:
      setting: "digits", the demo's network and data; "digits_lax", the same with convolutions as Flax has them;
        "resnet9", ResNet-9 on random images of CIFAR-10's shape, for a GPU (what the images show does not change what
        a step costs).
      num_steps: T.
      data_dir: where `metacanary.data` keeps data sets.

    Raises:
      ValueError: unknown setting.
    """
    model, recipe = design(setting, num_steps)
    pixels, labels = _random_images() if setting == "resnet9" else _digits(data_dir)
    chosen = families.make("mislabeled", pixels, labels, num_canaries=NUM_CANARIES, num_classes=10, seed=SEED)
    pool = runs.Pool.make(pixels, labels, chosen.source_index, chosen.label)
    included = runs.coins(SEED, NUM_CANARIES, "independent")
    state = steps.sgd_state(recipe, model, pool, included, seed=SEED)
    state = {**state, "included": jnp.asarray(included)}
    return Problem(model=model, recipe=recipe, state=state, pixels=jnp.asarray(chosen.images))


def design(setting: str, num_steps: int) -> tuple[nn.Module, SGD]:
    """The network and the training of a setting."""
    if setting in ("digits", "digits_lax"):
        as_matmul = setting == "digits"
        model = models.build("convnet", num_classes=10, widths=(8, 16), logit_scale=0.3, as_matmul=as_matmul)
        return model, SGD(num_steps=num_steps, batch_size=100, learning_rate=0.3)
    if setting == "resnet9":
        model = models.build("resnet9", num_classes=10, width=1.0, logit_scale=0.04)
        return model, SGD(num_steps=num_steps, batch_size=250, learning_rate=0.1)
    raise ValueError(f"setting: got {setting!r}, expected one of {', '.join(SETTINGS)}")


def _digits(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The demo's images and labels."""
    dataset = data.load("digits", data_dir)
    return images.resize(dataset.train_images, 16), dataset.train_labels


def _random_images() -> tuple[np.ndarray, np.ndarray]:
    """Images of CIFAR-10's shape that show nothing, and labels."""
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8), rng.integers(0, 10, 10_000)


def save(path: Path, problem: Problem) -> None:
    """Write the arrays of a problem, so that the processes of all contenders start from the same ones."""
    store.write_npz(path, _flat({"state": problem.state, "pixels": problem.pixels}), {})


def load(path: Path, setting: str, num_steps: int) -> Problem:
    """Read what `save` wrote."""
    model, recipe = design(setting, num_steps)
    arrays, _ = store.read_npz(path)
    params = _nested(arrays, "state/params/")
    state: dict[str, PyTree] = {
        name: jnp.asarray(arrays[f"state/{name}"]) for name in ("order", "images", "labels", "included")
    }
    state |= {"params": params, "optimizer": recipe.build_optimizer().init(params)}
    return Problem(model=model, recipe=recipe, state=state, pixels=jnp.asarray(arrays["pixels"]))


def _flat(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path; the path of a nested dict's leaf joins its keys with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _nested(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, PyTree]:
    """The nested dict of the arrays whose path begins so."""
    tree: dict[str, PyTree] = {}
    for path, array in arrays.items():
        if path.startswith(prefix):
            *folders, name = path.removeprefix(prefix).split("/")
            inner = tree
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[name] = jnp.asarray(array)
    return tree
