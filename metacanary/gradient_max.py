"""Gradient Max canaries: pixels that make the norm of the canary's own gradient large on proxy models.

A baseline in the ICLR version of arXiv 2507.15836, of which is known that it maximises the canary's gradient norm on a
proxy; all else is our choice. A proxy is a model that is trained on the pool, without any canary. The pixels x of a
canary with label y ascend

    phi(x) = mean over proxies theta of log |grad_theta loss(theta, x, y)|,

the norm over all parameters that a training of the same recipe changes (`gradient_norms`). The logarithm lets no proxy
outweigh the others.

    proxies = train_proxies(settings, model, pool, start, seed=1)
    for state, row in maximize(settings, model, start, proxies): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanary import clipping, gradient_norms, models, runs, store, training
from metacanary.canaries import Canaries
from metacanary.recipes import DPSGD, SGD
from metacanary.updates import AdamUpdate, MetaState, SignedUpdate

Params = Any


@dataclass(frozen=True, kw_only=True)
class GradientMax:
    """Settings of `train_proxies` and `maximize`.

    Attributes:
      update: how pixels move, a value of `updates.UPDATES`.
      recipe: the training of the proxies, private or not.
      num_steps: updates of the pixels.
      num_proxies: models that are trained, each from a seed of its own.
      proxy_steps: steps of the training after which a model is a proxy; none for its last step alone.
      microbatch: canaries that are worked on at a time; less memory, the same result up to rounding.
    """

    update: SignedUpdate | AdamUpdate
    recipe: SGD | DPSGD
    num_steps: int
    num_proxies: int = 1
    proxy_steps: tuple[int, ...] = ()
    microbatch: int = 64

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_proxies", "microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer >= 1")
        last = self.recipe.num_steps
        steps = tuple(sorted(self.proxy_steps)) or (last,)
        if len(set(steps)) < len(steps) or not 1 <= steps[0] <= steps[-1] <= last:
            raise ValueError(f"proxy_steps: got {self.proxy_steps}, expected different steps from 1 to {last}")
        object.__setattr__(self, "proxy_steps", steps)


def train_proxies(
    settings: GradientMax,
    model: nn.Module,
    pool: runs.Pool,
    start: Canaries,
    *,
    seed: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> list[Params]:
    """Train the models that gradients are taken of.

    Args:
      settings: their recipe, number and steps.
      model: the network.
      pool: the other training images, which they are trained on.
      start: the canaries, none of which is included.
      seed: of the optimisation; the proxy's number is folded into it.
      checkpoint: folder for trained proxies and for the one in training; None writes none.
      **options: on_step, should_stop of `training.train`; on_step is called with the steps of all proxies.

    Returns:
      Parameters, num_proxies times len(proxy_steps) of them, in this order.

    Raises:
      ValueError: a model that DP-SGD could not train, as one with batch normalisation: an example has no gradient of
        its own there.
      FloatingPointError, Stopped: as `training.train`.

    Guarantees:
      Going on with the same checkpoint folder gives bit-identical proxies.
    """
    training.require_independent(model, pool.images.shape[1:])
    on_step, proxies = options.pop("on_step", None), []
    for number in range(settings.num_proxies):
        proxies += _train_proxy(
            settings,
            model,
            pool,
            start,
            seed=proxy_seed(seed, number),
            checkpoint=checkpoint / f"proxy{number}" if checkpoint else None,
            on_step=on_step and partial(_shifted, on_step, number * settings.recipe.num_steps),
            **options,
        )
    return proxies


def maximize(
    settings: GradientMax,
    model: nn.Module,
    start: Canaries,
    proxies: Sequence[Params],
    *,
    resume: MetaState | None = None,
) -> Iterator[tuple[MetaState, dict[str, float]]]:
    """Move the pixels of canaries up the mean logarithm of their gradients' norms.

    Args:
      settings: update, number of steps, which parameters are trained.
      model: the network of the proxies.
      start: the canaries to start from; labels are kept.
      proxies: from `train_proxies`.
      resume: continue after this state.

    Yields:
      After each step (MetaState, row of the history): step; mean_gradient_norm and geometric_mean_gradient_norm of the
      canaries before this step's update, over canaries and proxies; seconds.

    Raises:
      FloatingPointError: a gradient that is not finite.

    Guarantees:
      Going on from a yielded state gives bit-identical later states. Pixels stay in [0, 1]. A canary moves by its own
      gradients alone, whatever the others are; one whose gradient is 0 in all proxies from the start stays where
      it is.
    """
    optimizer = settings.update.optimizer()
    state = resume or initial(settings, start)
    for step in range(state.step, settings.num_steps):
        began = time.perf_counter()
        norms, slopes = log_norm_slopes(settings, model, proxies, state.images, start.label)
        if not (np.isfinite(norms).all() and np.isfinite(slopes).all()):
            raise FloatingPointError(f"gradients of canaries are not finite before step {step + 1}")
        updates, opt_state = optimizer.update(jnp.asarray(-slopes), state.optimizer)
        images = np.asarray(jnp.clip(state.images + updates, 0.0, 1.0))
        state = MetaState(step=step + 1, images=images, optimizer=opt_state)
        with np.errstate(divide="ignore"):  # the geometric mean with a norm of 0 is 0
            geometric = float(np.exp(np.log(norms, dtype=np.float64).mean()))
        means = {"mean_gradient_norm": float(norms.mean()), "geometric_mean_gradient_norm": geometric}
        yield state, {"step": step + 1, **means, "seconds": time.perf_counter() - began}


def initial(settings: GradientMax, start: Canaries) -> MetaState:
    """The state before the first step."""
    return MetaState(step=0, images=start.images, optimizer=settings.update.optimizer().init(jnp.asarray(start.images)))


def log_norm_slopes(
    settings: GradientMax, model: nn.Module, proxies: Sequence[Params], images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Norms of the gradients of examples, and how their logarithms change with the pixels.

    Args:
      settings: which parameters are trained, and the microbatch.
      model: the network.
      proxies: P parameter trees.
      images: float [m, height, width, channels] in [0, 1].
      labels: int [m].

    Returns:
      Norms [P, m] of the cross-entropy's gradient by the trained parameters; and, as images, the derivative of the mean
      over proxies of the logarithm of an image's norm. A norm of 0 adds 0 to it.
    """
    slopes_of = _compiled(settings.recipe.trainable, model)
    count, size = len(images), min(settings.microbatch, len(images))
    # All pieces have one size, so that there is one compilation: the last is filled up with the first images.
    pieces = np.resize(np.arange(count), (-(-count // size), size))
    norms, slopes = [], []
    for proxy in proxies:
        done = [slopes_of(proxy, jnp.asarray(images[rows]), jnp.asarray(labels[rows])) for rows in pieces]
        norms.append(np.concatenate([np.asarray(norm) for norm, _ in done])[:count])
        slopes.append(np.concatenate([np.asarray(slope) for _, slope in done])[:count])
    return np.stack(norms), np.mean(slopes, axis=0)


@cache
def _compiled(trainable: str, model: nn.Module) -> Callable[[Params, jax.Array, jax.Array], Any]:
    """(params, images, labels) -> norms, and the derivatives of their logarithms by the pixels; compiled once."""
    log_norm = gradient_norms.log_norm_function(model, optax.softmax_cross_entropy_with_integer_labels)

    @jax.jit
    def slopes_of(params: Params, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        parted = clipping.split_trained(params, trainable, model, images.shape[1:])
        one = jax.grad(log_norm, has_aux=True)
        slopes, norms = jax.vmap(lambda x, y: one(x, y, *parted))(images, labels)
        return norms, slopes

    return slopes_of


def proxy_seed(seed: int, number: int) -> int:
    """The seed of a proxy's training."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _train_proxy(
    settings: GradientMax,
    model: nn.Module,
    pool: runs.Pool,
    start: Canaries,
    *,
    seed: int,
    checkpoint: Path | None,
    **options: Any,
) -> list[Params]:
    """The proxies of one training, in the order of its steps."""
    steps = settings.proxy_steps
    finished = checkpoint and checkpoint / "trained.npz"
    if finished and finished.exists():
        like = models.init(model, runs.stream(seed, "init"), pool.images.shape[1:])
        return store.read_tree(finished, [like] * len(steps))
    found = training.train(
        settings.recipe,
        model,
        pool,
        start.images,
        np.zeros(len(start.images), bool),
        seed=seed,
        snapshots=steps,
        checkpoint=checkpoint and checkpoint / "training.npz",
        **options,
    )
    proxies = [found[step] for step in steps]
    if finished:
        store.write_tree(finished, proxies, {})
    return proxies


def _shifted(on_step: Callable[[int], None], before: int, done: int) -> None:
    """Counts the steps of the proxies before."""
    on_step(before + done)
