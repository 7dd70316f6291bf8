"""PyTorch contenders: EleutherAI's bergson, plain autograd through the unrolled training, and that with checkpoints.

They get the initial weights, data, data order and coins of the problem as NumPy arrays and train a twin of its network.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.contender import Contender
from benchmarks.problem import TEMPERATURE, Problem

Params = dict[str, torch.Tensor]


class Twin(nn.Module):
    """The twin of `metacanary.models.ConvNet`: the same function of the same parameters.

    Called with a batch it returns the mean cross-entropy, which is what bergson's trainer differentiates.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.logit_scale, self.mean, self.std = (getattr(problem.model, k) for k in ("logit_scale", "mean", "std"))
        self.num_layers = len(problem.model.widths)
        for name, array in jax.tree.map(np.asarray, problem.state["params"]).items():
            kernel = torch.tensor(array["kernel"])
            convolution = kernel.ndim == 4
            kernel = kernel.permute(3, 2, 0, 1) if convolution else kernel.T
            self.register_parameter(f"{name}_kernel", nn.Parameter(kernel.contiguous()))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.tensor(array["bias"])))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [b, k] of images [b, h, w, c] in [0, 1]."""
        x = ((images - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2)
        for i in range(self.num_layers):
            kernel, bias = getattr(self, f"Conv3x3_{i}_kernel"), getattr(self, f"Conv3x3_{i}_bias")
            x = functional.avg_pool2d(
                functional.gelu(functional.conv2d(x, kernel, bias, padding=1), approximate="tanh"), 2
            )
        x = x.permute(0, 2, 3, 1).flatten(1)  # Flax flattens height, width, channels
        return self.logit_scale * functional.linear(x, self.Dense_0_kernel, self.Dense_0_bias)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None, **unused: Any) -> torch.Tensor:
        """Mean cross-entropy of a batch; its logits where there are no labels."""
        logits = self.logits(images)
        return logits if labels is None else functional.cross_entropy(logits, labels)


class Stream:
    """The batches of a run, computed from the pixels that are differentiated by; what bergson calls a data stream.

    bergson differentiates by `weights`, meant as one weight an example; it takes any tensor that batches depend on.
    """

    def __init__(self, problem: Problem) -> None:
        state = problem.state
        self.images, self.labels, self.order = (
            torch.tensor(np.asarray(state[k])) for k in ("images", "labels", "order")
        )
        self.labels = self.labels.long()
        self.order = self.order.long()
        self.included = torch.tensor(np.asarray(state["included"]))
        self.weights = nn.Parameter(torch.tensor(np.asarray(problem.pixels)))
        self.device = torch.device("cpu")

    @property
    def requires_grad(self) -> bool:
        """Whether batches are to be differentiated by the pixels."""
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, t: int) -> dict[str, torch.Tensor]:
        rows = self.order[t]
        r = len(self.images)
        others = self.images[rows.clamp(max=r - 1)].float() / 255
        images = torch.where((rows >= r)[:, None, None, None], self.weights[(rows - r).clamp(min=0)], others)
        # bergson scales a microbatch's loss by its share of this mask; there is one microbatch.
        return {"images": images, "labels": self.labels[rows], "shift_loss_mask": torch.ones(1)}

    def first(self, num_steps: int) -> Stream:
        """The stream cut after some steps; pixels and data are shared."""
        part = copy.copy(self)
        part.order = self.order[:num_steps]
        return part

    def objective(self, logits: torch.Tensor) -> torch.Tensor:
        """Minus the smooth AUROC of `metacanary.objectives`."""
        is_label = functional.one_hot(self.labels[-len(logits) :], logits.shape[-1]).bool()
        others = logits.masked_fill(is_label, -torch.inf).logsumexp(-1)
        margin = logits.masked_fill(~is_label, 0).sum(-1) - others
        pairs = torch.sigmoid((margin[:, None] - margin[None, :]) / TEMPERATURE)
        weight = (self.included[:, None] & ~self.included[None, :]).float()
        return -(pairs * weight).sum() / weight.sum().clamp(min=1)


def bergson(problem: Problem, *, save_mode: str) -> Contender:
    """bergson's MAGIC trainer: checkpoints of the forward pass on disk, those of a replayed stretch in memory."""
    import torchopt
    from bergson.magic import BackwardState, Trainer

    stream = Stream(problem)

    def trained(steps: int, **saving: Any) -> tuple[Any, Any, Stream]:
        network = Twin(problem)
        part = stream.first(steps)
        trainer, state = Trainer.initialize(network, torchopt.sgd(problem.recipe.learning_rate))
        return trainer, trainer.train(state, part, **saving), part

    def metagradient(steps: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            trainer, state, part = trained(steps, save_dir=folder, save_mode=save_mode)
            with state.activate(trainer.model) as params:
                value = part.objective(trainer.model.logits(part.weights))
                *adjoint, direct = torch.autograd.grad(value, [*params.values(), part.weights])
            start = BackwardState(dict(zip(params, adjoint, strict=True)), [], direct)
            return trainer.backward(folder, part, start, state, save_mode=save_mode).weight_grads.numpy()

    return Contender(
        plain=lambda: trained(len(stream)) and None,
        metagradient=partial(metagradient, len(stream)),
        warm_up=partial(metagradient, 4),
        states_held=_bergson_states(len(stream), save_mode),
    )


def _bergson_states(num_steps: int, save_mode: str) -> int | None:
    """States on disk and, while a stretch between two of them is replayed, in memory."""
    root = math.isqrt(num_steps)
    return {"all": num_steps, "sqrt": num_steps // root + root, "log": None}[save_mode]


def unrolled(problem: Problem, *, checkpointed: bool) -> Contender:
    """Autograd through the unrolled training, all graphs kept or those of one stretch of sqrt(T) steps at a time."""
    stream, network = Stream(problem), Twin(problem)
    names = [name for name, _ in network.named_parameters()]

    def step(t: int, params: list[torch.Tensor], differentiable: bool) -> list[torch.Tensor]:
        with torch.enable_grad():
            inputs = [p if p.requires_grad else p.detach().requires_grad_() for p in params]
            loss = torch.func.functional_call(network, dict(zip(names, inputs, strict=True)), kwargs=stream[t])
            gradient = torch.autograd.grad(loss, inputs, create_graph=differentiable)
        rate = problem.recipe.learning_rate
        return [p - rate * g for p, g in zip(inputs if differentiable else params, gradient, strict=True)]

    def stretch(first: int, last: int, pixels: torch.Tensor, *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Steps first to last; `pixels` only so that `checkpoint` sees that they are differentiated by."""
        moved = list(params)
        for t in range(first, last):
            moved = step(t, moved, torch.is_grad_enabled())
        return tuple(moved)

    def start() -> list[torch.Tensor]:
        return [p.detach().clone().requires_grad_() for p in network.parameters()]

    def plain() -> None:
        with torch.no_grad():
            stretch(0, len(stream), stream.weights, *start())

    def metagradient(steps: int) -> np.ndarray:
        stream.weights.grad = None
        params = tuple(start())
        length = math.isqrt(steps - 1) + 1
        for first in range(0, steps, length):
            part = partial(stretch, first, min(first + length, steps))
            params = (
                checkpoint(part, stream.weights, *params, use_reentrant=True)
                if checkpointed
                else part(stream.weights, *params)
            )
        state = dict(zip(names, params, strict=True))
        stream.objective(torch.func.functional_call(network, state, (stream.weights,))).backward()
        return stream.weights.grad.numpy().copy()

    states = math.isqrt(len(stream) - 1) + 1
    return Contender(
        plain=plain,
        metagradient=partial(metagradient, len(stream)),
        warm_up=partial(metagradient, 2),
        states_held=2 * states if checkpointed else len(stream),
    )


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "bergson_sqrt": partial(bergson, save_mode="sqrt"),
    "bergson_log": partial(bergson, save_mode="log"),
    "bergson_all": partial(bergson, save_mode="all"),
    "torch_unrolled": partial(unrolled, checkpointed=False),
    "torch_checkpoint": partial(unrolled, checkpointed=True),
}
