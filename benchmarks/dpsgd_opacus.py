"""Opacus as a contender of `benchmarks.dpsgd`: twins of the networks in PyTorch, and its three ways to clip.

The twins are the same functions of the same parameters, weight-standardised convolutions included. Their layers take
[b, K, ...], the copies of an example on an axis of their own, so that one gradient for each example is made and not K,
as Opacus treats a sequence. It has no such layers; for them it is given gradient samplers of the form of its own
(unfold, then one product for each example), which `opacus_functorch` does without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from jax.flatten_util import ravel_pytree
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional

from benchmarks.dpsgd_contenders import Contender
from benchmarks.dpsgd_problem import SEED, Problem
from metacanary.models import ConvNet, WideResNet

Arrays = dict[str, Any]
STANDARDISED = "WeightStandardisedConv"


class Convolution(nn.Module):
    """A convolution of [b, K, c, h, w] under JAX's "same" padding; weight-standardised if there is a gain."""

    def __init__(self, arrays: Arrays, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.tensor(arrays["kernel"]).permute(3, 2, 0, 1).contiguous())
        self.gain = nn.Parameter(torch.tensor(arrays["gain"])) if "gain" in arrays else None
        self.bias = nn.Parameter(torch.tensor(arrays["bias"]))

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """[b * K, c, h, w] with the border that "same" asks for: one row less on top if their number is odd."""
        size = self.weight.shape[-1]
        total = [max(0, (-(-n // self.stride) - 1) * self.stride + size - n) for n in x.shape[-2:]]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in total)
        return functional.pad(x.flatten(0, 1), (left, right, top, bottom))

    def kernel(self, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """The kernel that is convolved with."""
        if gain is None:
            return weight
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (weight - mean) * gain[:, None, None, None] * torch.rsqrt((variance * weight[0].numel()).clamp(min=1e-4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel(self.weight, self.gain)
        return functional.conv2d(self.padded(x), kernel, self.bias, self.stride).unflatten(0, x.shape[:2])


class GroupNorm(nn.GroupNorm):
    """GroupNorm of [b, K, c, h, w]."""

    def __init__(self, arrays: Arrays, num_groups: int) -> None:
        super().__init__(num_groups, len(arrays["scale"]), eps=1e-6)
        self.weight = nn.Parameter(torch.tensor(arrays["scale"]))
        self.bias = nn.Parameter(torch.tensor(arrays["bias"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def dense(arrays: Arrays) -> nn.Linear:
    """A linear layer of [b, K, features], for which Opacus has samplers."""
    layer = nn.Linear(*arrays["kernel"].shape)
    layer.weight = nn.Parameter(torch.tensor(arrays["kernel"]).T.contiguous())
    layer.bias = nn.Parameter(torch.tensor(arrays["bias"]))
    return layer


class Block(nn.Module):
    """A block of a wide ResNet; its layers are made in the order in which Flax numbers them."""

    def __init__(self, take: Callable[[str], Arrays], groups: int, stride: int, changes: bool) -> None:
        super().__init__()
        self.first_norm = GroupNorm(take("GroupNorm"), groups)
        self.skip = Convolution(take(STANDARDISED), stride) if changes else None
        self.first = Convolution(take(STANDARDISED), stride)
        self.second_norm = GroupNorm(take("GroupNorm"), groups)
        self.second = Convolution(take(STANDARDISED))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first_norm(functional.relu(x))
        skip = x if self.skip is None else self.skip(y)
        return self.second(self.second_norm(functional.relu(self.first(y)))) + skip


class Twin(nn.Module):
    """The twin of a network: images [b, K, h, w, c] in [0, 1] to logits [b, K, classes]."""

    def __init__(self, model: ConvNet | WideResNet, params: Arrays) -> None:
        super().__init__()
        self.mean, self.std, self.logit_scale = model.mean, model.std, model.logit_scale
        self.kind = STANDARDISED if isinstance(model, WideResNet) else "Conv3x3"
        counts: Counter[str] = Counter()

        def take(kind: str) -> Arrays:
            counts[kind] += 1
            return params[f"{kind}_{counts[kind] - 1}"]

        self.body = nn.Sequential(*(_wide(model, take) if isinstance(model, WideResNet) else _narrow(model, take)))
        self.head = dense(take("Dense"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(value, device=images.device) for value in (self.mean, self.std))
        return self.logit_scale * self.head(self.body(((images - mean) / std).movedim(-1, 2)))

    def vector(self) -> np.ndarray:
        """The parameters in the order of Flax's leaves."""
        tree: dict[str, Arrays] = {}
        kinds: dict[type[nn.Module], str] = {Convolution: self.kind, GroupNorm: "GroupNorm", nn.Linear: "Dense"}
        for layer in self.modules():
            if type(layer) in kinds:
                kind = kinds[type(layer)]
                number = sum(name.startswith(kind) for name in tree)
                tree[f"{kind}_{number}"] = _as_flax(layer)
        return np.asarray(ravel_pytree(tree)[0])


def _wide(model: WideResNet, take: Callable[[str], Arrays]) -> list[nn.Module]:
    """The layers of a wide ResNet in front of its linear one."""
    layers: list[nn.Module] = [Convolution(take(STANDARDISED))]
    for stage in range(3):
        for index in range((model.depth - 4) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Block(take, model.groups, stride, changes=index == 0))
    return [*layers, nn.ReLU(), GroupNorm(take("GroupNorm"), model.groups), Average()]


def _narrow(model: ConvNet, take: Callable[[str], Arrays]) -> list[nn.Module]:
    """The layers of a ConvNet in front of its linear one."""
    return [part for _ in model.widths for part in (Convolution(take("Conv3x3")), Pooled())] + [Flat()]


class Average(nn.Module):
    """The mean over the picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((-2, -1))


class Pooled(nn.Module):
    """Flax's GELU, then 2x2 averages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = functional.avg_pool2d(functional.gelu(x.flatten(0, 1), approximate="tanh"), 2)
        return pooled.unflatten(0, x.shape[:2])


class Flat(nn.Module):
    """All features on one axis, in Flax's order: height, width, channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(2, -1).flatten(2)


def _as_flax(layer: nn.Module) -> Arrays:
    """A layer's parameters as Flax names and lays them out."""
    found = {name: p.detach().cpu() for name, p in layer.named_parameters()}
    if isinstance(layer, GroupNorm):
        found["scale"] = found.pop("weight")
    else:
        weight = found.pop("weight")
        found["kernel"] = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    return {name: value.numpy() for name, value in found.items()}


@register_grad_sampler(Convolution)
def convolution_samples(
    layer: Convolution, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Gradients of each example, summed over its copies: by the kernel, then pulled back to weight and gain."""
    x = activations[0]
    patches = functional.unfold(layer.padded(x), layer.weight.shape[-2:], stride=layer.stride)
    patches, cotangents = patches.unflatten(0, x.shape[:2]), backprops.flatten(-2)
    by_kernel = torch.einsum("nkoq,nkpq->nop", cotangents, patches).reshape(-1, *layer.weight.shape)
    found = {layer.bias: cotangents.sum((1, 3))}
    if layer.gain is None:
        return found | {layer.weight: by_kernel}
    _, pull_back = torch.func.vjp(layer.kernel, layer.weight, layer.gain)
    by_weight, by_gain = torch.func.vmap(pull_back)(by_kernel)
    return found | {layer.weight: by_weight, layer.gain: by_gain}


@register_grad_sampler(GroupNorm)
def group_norm_samples(
    layer: GroupNorm, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[nn.Parameter, torch.Tensor]:
    """Gradients of each example, summed over its copies."""
    x = activations[0]
    normal = functional.group_norm(x.flatten(0, 1), layer.num_groups, eps=layer.eps).unflatten(0, x.shape[:2])
    return {layer.weight: (normal * backprops).sum((1, 3, 4)), layer.bias: backprops.sum((1, 3, 4))}


def opacus(problem: Problem, *, mode: str) -> Contender:
    """A step of Opacus's optimiser over physical batches of `microbatch` examples, as its BatchMemoryManager cuts them.

    Args:
      problem: the batch; its copies are drawn beforehand, in Opacus's favour.
      mode: of Opacus: "hooks", a gradient for each example; "functorch", the same by `torch.func`; "ghost", norms
        first, then a second backward pass.
    """
    device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX does by default
    torch.manual_seed(SEED)
    network = Twin(problem.model, jax.tree.map(np.asarray, problem.params()))
    _require_equal(network.vector(), problem)
    stacks, labels = torch.tensor(problem.stacks()).to(device), torch.tensor(problem.labels).long().to(device)
    parts = list(zip(stacks.split(problem.microbatch), labels.split(problem.microbatch), strict=True))
    ghost = {"max_grad_norm": problem.clip_norm} if mode == "ghost" else {}
    module = prepare_module(network.to(device), mode, **ghost)
    optimizer = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        torch.optim.SGD(module.parameters(), lr=problem.learning_rate),
        noise_multiplier=problem.noise_multiplier,
        max_grad_norm=problem.clip_norm,
        expected_batch_size=problem.batch,
    )
    cross_entropy = nn.CrossEntropyLoss()
    criterion = DPLossFastGradientClipping(module, optimizer, cross_entropy) if ghost else cross_entropy

    def step() -> None:
        for number, (images, targets) in enumerate(parts, 1):
            shape = {"shape": images.shape[:2]} if ghost else {}
            logits = module(images).flatten(0, 1)
            criterion(logits, targets.repeat_interleave(problem.copies), **shape).backward()
            optimizer.signal_skip_step(number < len(parts))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Contender(
        step=step, wait=lambda: device.type == "cpu" or torch.cuda.synchronize(device), vector=network.vector
    )


def _require_equal(vector: np.ndarray, problem: Problem) -> None:
    """Refuse a twin whose parameters are not those of the network, in number and value."""
    expected = np.asarray(ravel_pytree(problem.params())[0])
    if not np.array_equal(vector, expected):
        got = f"{len(vector)} parameters"
        raise ValueError(f"twin: got {got}, expected the {len(expected)} of {problem.setting}, equal bit by bit")


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    f"opacus_{mode}": partial(opacus, mode=mode) for mode in ("hooks", "functorch", "ghost")
}
