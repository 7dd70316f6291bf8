"""Metasmoothness: how straight the trained parameters move when the metaparameters do (arXiv 2503.13751).

A metagradient is exact whatever the training, but of use only where training answers smoothly to its metaparameters:
else the slope at a point says little of the next. Three trainings measure it; no metagradient is needed.

    smoothness = metasmoothness(train_fn, pixels, direction, step=0.05)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metacanary import runs, training
from metacanary.canaries import Canaries

PyTree = Any

COLUMNS = ("direction", "seed", "step", "metasmoothness", "relative_change")
"""Columns of `of_canaries`; docs/output.md says what each means."""


def metasmoothness(train_fn: Callable[[PyTree], PyTree], metaparams: PyTree, direction: PyTree, step: float) -> float:
    """Measure the metasmoothness of a training set-up along a direction by three trainings.

    With theta_0 = A(z), theta_h = A(z + h v), theta_2h = A(z + 2 h v) and d = |theta_2h - theta_0|, over all trained
    parameters j,

        S = sum_j d_j / ||d||_1 * sign(theta_h - theta_0)_j * sign(theta_2h - theta_h)_j.

    Args:
      train_fn: the training A, from metaparameters to a pytree of trained parameters, of which floating-point leaves
        count. It must be deterministic: the same seed, data order and coins at each call.
      metaparams: z, a pytree of numbers or arrays.
      direction: v, a tree like metaparams, of the same shapes; None at leaves of metaparams that are not floating
        point, which do not move. z + h v is rounded to the dtype of z, and projected to nothing: a projection would
        put a kink into the path that is measured.
      step: h > 0, in units of z over v.

    Returns:
      S in [-1, 1]: 1 if every parameter goes on in the direction in which it began to move, -1 if each turns back. A
      parameter that stands still in one half of the way counts as 0.

    Raises:
      ValueError: a step that is not positive and finite, a direction of another tree or shape, one that is not
        finite or zero everywhere; trained parameters of different trees or without a floating-point leaf; or
        theta_2h = theta_0 at every parameter, where S is 0/0.
      FloatingPointError: a trained parameter is not finite.

    Guarantees:
      1 for a training that is linear in z. The same for c v and step / c, for parameters times a constant, and in
      whatever order or tree the parameters stand.

    References:
      arXiv 2503.13751, Definition 2.
    """
    return of_trained(*_train_along(train_fn, metaparams, direction, step))


def of_trained(first: PyTree, middle: PyTree, last: PyTree) -> float:
    """The metasmoothness of three trained parameter trees theta_0, theta_h, theta_2h, as `metasmoothness` has it."""
    agreement = total = 0.0
    for a, b, c in _float_leaves(first, middle, last):
        change = np.abs(c - a)
        agreement += float(np.sum(change * np.sign(b - a) * np.sign(c - b)))
        total += float(np.sum(change))
    if total == 0:
        raise ValueError(
            "trained parameters: theta_2h equals theta_0 everywhere, expected them to move with metaparams"
        )
    return float(np.clip(agreement / total, -1.0, 1.0))  # the quotient may be rounded beyond 1


def relative_change(first: PyTree, last: PyTree) -> float:
    """How far the parameters moved: ||theta_2h - theta_0||_1 / ||theta_0||_1."""
    pairs = list(_float_leaves(first, last))
    moved = sum(float(np.sum(np.abs(c - a))) for a, c in pairs)
    size = sum(float(np.sum(np.abs(a))) for a, _ in pairs)
    if size == 0:
        raise ValueError("trained parameters: theta_0 is zero everywhere, expected parameters to compare a change with")
    return moved / size


def of_canaries(
    recipe: training.Recipe,
    model: nn.Module,
    pool: runs.Pool,
    start: Canaries,
    *,
    seeds: Sequence[int],
    game: str,
    step: float,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[dict[str, float]]:
    """Measure how smoothly a training answers to the pixels of canaries, along random sign vectors.

    Args:
      recipe: the training.
      model: the network.
      pool: the other training images, and all labels.
      start: the canaries where it is measured.
      seeds: of the run (coins, initial model, data order) and of the direction; one for each direction.
      game: as in `runs.coins`.
      step: h, the change of each pixel, which are in [0, 1]. Pixels may leave [0, 1] by 2 h: clipping them would make
        the path kinked.
      on_step: as in `training.train`, of each of the three trainings.

    Yields:
      After each direction a row of `COLUMNS`: its number, its seed, step, metasmoothness, relative_change.

    Guarantees:
      The three trainings of a direction share coins, initial model and data order. A direction depends on its seed and
      on the shape of the canaries alone, so that recipes and networks are compared on the same directions.
    """
    for number, seed in enumerate(seeds):
        included = runs.coins(seed, len(start.images), game)

        def train_fn(pixels: jax.Array, seed: int = seed, included: np.ndarray = included) -> PyTree:
            options: dict[str, Any] = {"seed": seed, "snapshots": [recipe.num_steps], "on_step": on_step}
            return training.train(recipe, model, pool, np.asarray(pixels), included, **options)[recipe.num_steps]

        trained = _train_along(train_fn, start.images, random_signs(seed, start.images.shape), step)
        measured = {"metasmoothness": of_trained(*trained), "relative_change": relative_change(trained[0], trained[2])}
        yield {"direction": number, "seed": seed, "step": step, **measured}


def random_signs(seed: int, shape: Sequence[int]) -> np.ndarray:
    """A vector of fair signs, float32; the direction of `of_canaries`."""
    return (2.0 * np.random.default_rng(seed).integers(0, 2, size=shape) - 1.0).astype(np.float32)


def _train_along(
    train_fn: Callable[[PyTree], PyTree], metaparams: PyTree, direction: PyTree, step: float
) -> list[PyTree]:
    """theta_0, theta_h, theta_2h."""
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step: got {step}, expected a finite number > 0")
    _check_direction(metaparams, direction)

    def at(distance: float) -> PyTree:
        return jax.tree.map(lambda z, v: _moved(z, v, distance), metaparams, direction)

    return [train_fn(at(distance)) for distance in (0.0, step, 2 * step)]


def _check_direction(metaparams: PyTree, direction: PyTree) -> None:
    """Refuse a direction that does not fit the metaparameters, or moves nothing."""
    pairs: list[tuple[Any, Any]] = []
    try:
        jax.tree.map(lambda z, v: pairs.append((z, v)), metaparams, direction)
    except ValueError as error:
        raise ValueError(f"direction: got another tree than metaparams: {error}") from None
    for z, v in pairs:
        if not _is_float(z) and v is not None:
            raise ValueError(f"direction: got {v!r} where metaparams is not floating point, expected None")
        if _is_float(z) and (v is None or np.shape(v) != np.shape(z)):
            shape = "None" if v is None else f"shape {np.shape(v)}"
            raise ValueError(f"direction: got {shape}, expected the shape of metaparams, {np.shape(z)}")
    vectors = [np.asarray(v, np.float64) for _, v in pairs if v is not None]
    if not all(np.isfinite(v).all() for v in vectors):
        raise ValueError("direction: got numbers that are not finite, expected finite ones")
    if not any(v.any() for v in vectors):
        raise ValueError("direction: got zeros alone, expected a direction in which floating-point metaparams move")


def _moved(leaf: Any, sign: Any, distance: float) -> Any:
    """z + distance v in the dtype of z; z itself where it does not move."""
    if sign is None or distance == 0:
        return leaf
    return leaf + np.asarray(distance * np.asarray(sign, np.float64), _dtype(leaf))


def _dtype(leaf: Any) -> Any:
    """The dtype of an array or of a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _is_float(leaf: Any) -> bool:
    """Whether a leaf is floating point; Python's floats are."""
    return bool(jnp.issubdtype(_dtype(leaf), jnp.floating))


def _float_leaves(*trees: PyTree) -> Iterator[tuple[np.ndarray, ...]]:
    """The floating-point leaves of trees side by side, in float64, one after the other to save memory."""
    structures = {jax.tree.structure(tree) for tree in trees}
    if len(structures) != 1:
        raise ValueError(f"trained parameters: got the trees {sorted(map(str, structures))}, expected one and the same")
    together = [leaves for leaves in zip(*map(jax.tree.leaves, trees), strict=True) if _is_float(leaves[0])]
    if not together:
        raise ValueError("trained parameters: got no floating-point leaf, expected at least one")
    for leaves in together:
        if len({np.shape(leaf) for leaf in leaves}) != 1:
            raise ValueError(
                f"trained parameters: got shapes {[*map(np.shape, leaves)]} of one leaf, expected one shape"
            )
        arrays = tuple(np.asarray(leaf, np.float64) for leaf in leaves)
        if not all(np.isfinite(array).all() for array in arrays):
            raise FloatingPointError("trained parameters are not finite: the training diverged")
        yield arrays
