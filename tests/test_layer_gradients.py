"""Gradients by layer: norms and sums against those of examples one by one, what is refused, the order of layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from metacanary import layer_forms, model_layers, models
from metacanary.layer_gradients import layers, take_apart

BATCH, CHANNELS = 5, 4


class Alone(nn.Module):
    """A network of one layer, on images or on vectors."""

    make: Callable[[], nn.Module]
    on_vectors: bool = False

    @nn.compact
    def __call__(self, images):
        y = self.make()(images.reshape(len(images), -1) if self.on_vectors else images)
        return y.reshape(len(images), -1)


ALONE = {
    "dense": Alone(lambda: nn.Dense(6), on_vectors=True),
    "dense without bias": Alone(lambda: nn.Dense(6, use_bias=False), on_vectors=True),
    "dense on pixels": Alone(lambda: nn.Dense(6)),
    "convolution": Alone(lambda: model_layers.Conv3x3(6)),
    "convolution without bias": Alone(lambda: model_layers.Conv3x3(6, use_bias=False)),
    "convolution of lax": Alone(lambda: model_layers.Conv3x3(6, as_matmul=False)),
    "convolution of lax without bias": Alone(lambda: model_layers.Conv3x3(6, use_bias=False, as_matmul=False)),
    "standardised": Alone(lambda: model_layers.WeightStandardisedConv(6)),
    "standardised, stride 2": Alone(lambda: model_layers.WeightStandardisedConv(6, stride=2)),
    "standardised 1x1": Alone(lambda: model_layers.WeightStandardisedConv(6, kernel_size=1)),
    "standardised 1x1, stride 2": Alone(lambda: model_layers.WeightStandardisedConv(6, kernel_size=1, stride=2)),
    "group norm": Alone(lambda: model_layers.GroupNorm(2)),
    "flax's convolution": Alone(lambda: nn.Conv(6, (5, 3))),
    "flax's layer norm": Alone(lambda: nn.LayerNorm()),
}
CONVNET = models.build("convnet", num_classes=3, widths=[4], group_norm=2)


def drawn(shapes, dtype, seed=0):
    """Random numbers in every leaf, biases and gains too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


def start(model, image_shape, copies, dtype):
    """Parameters and images [BATCH, copies, ...]."""
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0), image_shape))
    images = np.random.default_rng(1).random((BATCH, copies, *image_shape))
    return drawn(params, dtype), jnp.asarray(images, dtype)


def loss(logits):
    """Of a batch [batch, K, n]; no two entries have derivatives alike."""
    weights = jnp.cos(jnp.arange(logits[0].size, dtype=logits.dtype)).reshape(logits[0].shape)
    return jnp.sum(jnp.tanh(logits / 4) * weights[None]) / logits.shape[1]


def naive(model, params, images):
    """Each example's gradient by itself: a tree with a leading axis."""
    one = jax.jit(jax.grad(lambda p, copies: loss(models.apply(model, p, copies)[None])))
    return jax.tree.map(lambda *g: jnp.stack(g), *[one(params, copies) for copies in images])


def by_path(tree):
    """Arrays [..., n] by the path of the layer that owns them, in one order."""
    found = {}
    for path, leaf in sorted(flatten_dict(tree).items()):
        found.setdefault("/".join(path[:-1]), []).append(leaf)
    return found


def norms_of(gradients):
    """Squared norms [batch] of each layer."""
    return {
        name: np.sum([np.square(x).reshape(BATCH, -1).sum(axis=1) for x in leaves], axis=0)
        for name, leaves in by_path(gradients).items()
    }


def check(model, image_shape, copies, dtype, tolerance):
    """All that can be asked of a network that is taken apart, against gradients of examples."""
    params, images = start(model, image_shape, copies, dtype)
    names = list(layers(model, image_shape))
    rng = np.random.default_rng(2)
    factors = {name: jnp.asarray(rng.normal(size=BATCH), dtype) for name in names}
    mask = jnp.array([True, False, True, True, False])
    own_factor = {name: lambda square, i=i: 1 / (square + i + 1) for i, name in enumerate(names)}

    @jax.jit
    def found(params, images, factors):
        taken = take_apart(model, params, images, loss)
        together = taken.clip_together(lambda squares: jnp.where(mask, 1 / (squares + 1), 0))
        return taken.squared_norms(), taken.weighted_sum(factors), together, *taken.clip_while_summing(own_factor, mask)

    squares, total, together, clipped, same_squares = found(params, images, factors)
    gradients = naive(model, params, images)
    expected = norms_of(gradients)
    of_all = mask * (1 / (sum(expected.values()) + 1))
    assert set(squares) == set(same_squares) == set(expected)
    for name in names:
        assert expected[name].min() > 1e-6
        assert squares[name].dtype == dtype
        np.testing.assert_allclose(squares[name], expected[name], rtol=tolerance)
        np.testing.assert_allclose(same_squares[name], expected[name], rtol=tolerance)
        own = mask * (1 / (expected[name] + names.index(name) + 1))
        for sums, weights in ((total, factors[name]), (together, of_all), (clipped, own)):
            for ours, theirs in zip(by_path(sums)[name], by_path(gradients)[name], strict=True):
                exact = np.tensordot(np.asarray(weights), np.asarray(theirs), axes=1)
                scale = np.abs(np.asarray(theirs)).max()
                assert ours.shape == exact.shape
                np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("copies", "small"), [(1, 10**9), (3, 0)], ids=["one copy, kept", "three, one by one"])
@pytest.mark.parametrize("model", ALONE.values(), ids=ALONE)
def test_layers_alone_equal_gradients_of_examples(model, copies, small, monkeypatch):
    """To 1e-10 in float64; odd sizes, one copy or several, examples' gradients kept or made one by one."""
    monkeypatch.setattr(layer_forms, "SMALL", small)
    with jax.enable_x64(True):
        check(model, (5, 7, CHANNELS), copies, np.float64, 1e-10)


@pytest.mark.parametrize("name", ["convolution", "standardised, stride 2", "group norm"])
def test_layers_alone_equal_gradients_of_examples_as_on_gpus(name, monkeypatch):
    """Where the gradients of large layers are made at once as well, and not kept."""
    monkeypatch.setattr(layer_forms, "SMALL", 0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.enable_x64(True):
        check(ALONE[name], (5, 7, CHANNELS), 2, np.float64, 1e-10)


@pytest.mark.parametrize("name", ["standardised, stride 2", "standardised 1x1, stride 2"])
def test_layers_with_a_stride_equal_gradients_of_examples_at_even_sizes(name):
    """Where "same" padding is another: nothing before, one row behind."""
    with jax.enable_x64(True):
        check(ALONE[name], (6, 4, CHANNELS), 2, np.float64, 1e-10)


@pytest.mark.parametrize("name", ["dense", "convolution", "standardised, stride 2", "group norm"])
def test_layers_alone_equal_gradients_of_examples_in_float32(name):
    """To 1e-5, and nothing is of another type."""
    check(ALONE[name], (5, 7, CHANNELS), 3, np.float32, 1e-5)


def test_layers_of_a_network_equal_gradients_of_examples():
    """All layers at once, each with its own factors; `test_clipping` has deeper networks."""
    with jax.enable_x64(True):
        check(CONVNET, (4, 4, 3), 2, np.float64, 1e-10)


def test_layers_are_named_in_the_order_of_their_calls():
    """The first convolution first, the last layer last, each with its own form."""
    model = models.WideResNet(num_classes=3, depth=10, width=1, groups=4)
    found = layers(model, (8, 8, 3))
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0), (8, 8, 3)))
    assert set(found) == {"/".join(path[:-1]) for path in flatten_dict(params)}
    names = list(found)
    assert (names[0], names[1], names[2]) == ("WeightStandardisedConv_0", "GroupNorm_0", "WeightStandardisedConv_1")
    assert names[-2:] == ["GroupNorm_6", "Dense_0"]
    strides = {name: (layer.size, layer.stride) for name, layer in found.items() if "Conv" in name}
    assert list(strides.values()) == [(3, 1), (3, 1), (3, 1), (1, 2), (3, 2), (3, 1), (1, 2), (3, 2), (3, 1)]


def test_take_apart_takes_only_what_is_asked_for():
    params, images = start(CONVNET, (4, 4, 3), 1, np.float32)

    def norms(only):
        return jax.jit(lambda *args: take_apart(CONVNET, *args, loss, only).squared_norms())(params, images)

    every, last = norms(None), norms(["Dense_0"])
    assert (set(every), set(last)) == ({"Conv3x3_0", "GroupNorm_0", "Dense_0"}, {"Dense_0"})
    np.testing.assert_allclose(last["Dense_0"], every["Dense_0"], rtol=1e-6)
    taken = take_apart(ALONE["dense"], *start(ALONE["dense"], (2, 2, 1), 1, np.float32), loss, [])
    assert taken.weighted_sum({}) == {}


def test_clip_while_summing_leaves_out_what_is_no_number():
    """A row of padding may be anything, also one whose gradient is not finite."""
    model = ALONE["dense"]
    params, images = start(model, (2, 2, 1), 1, np.float32)
    mask, factor = jnp.arange(BATCH) != 2, {"Dense_0": lambda square: 1 / (1 + square)}
    for small in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_forms, "SMALL", small)
            expected, _ = take_apart(model, params, images, loss).clip_while_summing(factor, mask)
            bad = take_apart(model, params, images.at[2].set(jnp.nan), loss)
            found, squares = bad.clip_while_summing(factor, mask)
        assert np.isnan(squares["Dense_0"]).tolist() == [False, False, True, False, False]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.tobytes() == b.tobytes()


class Twice(nn.Module):
    """One module, called twice."""

    @nn.compact
    def __call__(self, images):
        dense, x = nn.Dense(9), images.reshape(len(images), -1)
        return dense(nn.relu(dense(x)))


class Tied(nn.Module):
    """The parameters of one module, used by its call and by another of its methods."""

    @nn.compact
    def __call__(self, images):
        codes = Codes(9)
        return codes.decode(nn.relu(codes(images.reshape(len(images), -1))))


class Codes(nn.Module):
    """A matrix and its transpose."""

    size: int

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(), (self.size, self.size))

    def __call__(self, x):
        return x @ self.kernel

    def decode(self, y):
        return y @ self.kernel.T


class Owner(nn.Module):
    """Parameters of its own beside those of a module below it."""

    @nn.compact
    def __call__(self, images):
        scale = self.param("scale", nn.initializers.ones, (1,))
        return nn.Dense(3)(images.reshape(len(images), -1) * scale[None])


class Unbatched(nn.Module):
    """A layer that sees pixels first and the batch last; two pixels, or nine."""

    pixels: int

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)[:, : self.pixels]
        return jnp.swapaxes(Shift()(x.T), 0, 1)


class Shift(nn.Module):
    """Keeps the shape of what it is given."""

    @nn.compact
    def __call__(self, x):
        return x + self.param("shift", nn.initializers.normal(), (1, 1))


class Flattened(nn.Module):
    """A layer on all pixels of all images."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images.reshape(-1, 1)).reshape(len(images), -1)


class TwoArguments(nn.Module):
    """A layer of two arguments."""

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return Product()(x, x)


class Product(nn.Module):
    """Of its two arguments and a parameter."""

    @nn.compact
    def __call__(self, x, y):
        return x * y * self.param("scale", nn.initializers.normal(), (1, 1))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Twice(), "Dense_0"),
        (Tied(), "Codes_0"),
        (Owner(), ""),
        (Unbatched(pixels=9), "Shift_0"),
        (Unbatched(pixels=2), "Shift_0"),
        (Flattened(), "Dense_0"),
        (TwoArguments(), "Product_0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_refuse_what_is_no_layer(model, name):
    """Named by model and layer; such a model is clipped example by example."""
    with pytest.raises(ValueError, match=f"model {type(model).__name__}: layer '{name}' is no function of one batch"):
        layers(model, (3, 3, 1))


class Bare(nn.Module):
    """Parameters of a module that is never called by itself."""

    def setup(self):
        self.dense = nn.Dense(3)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        if self.is_initializing():
            return self.dense(x)
        return x @ self.dense.variables["params"]["kernel"]


def test_layers_refuse_parameters_of_no_call():
    with pytest.raises(ValueError, match=r"model Bare: parameters of \['dense'\] belong to no layer"):
        layers(Bare(), (3, 3, 1))
