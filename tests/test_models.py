"""Networks: shapes, sizes, both forms of convolution, and no example that touches another's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import models
from metacanary.models import average_pool, build, convolve, init, normalise

SMALL = {
    "convnet": build("convnet", num_classes=5, widths=(4, 6)),
    "convnet with GroupNorm": build("convnet", num_classes=5, widths=(4,), group_norm=2, activation="celu"),
    "resnet9": build("resnet9", num_classes=5, width=0.125),
    "wide resnet": models.WideResNet(num_classes=5, depth=10, width=1),
}
EACH = pytest.mark.parametrize("model", SMALL.values(), ids=SMALL)


def pictures(num=3, size=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((num, size, size, 3)), jnp.float32)


def drawn(model, size=8, seed=0):
    """Random parameters of every leaf, biases and gains too."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0), (size, size, 3)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


forward = jax.jit(models.apply, static_argnums=0)


def num_parameters(model, image_shape):
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0), image_shape))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("wrn16_4", 10, 2_753_402),  # 2.75 M in De et al. 2022 and Sander et al. 2022
        ("wrn16_4", 100, 2_776_532),
        ("wrn40_4", 10, 8_960_890),  # 8.9 M in Zagoruyko and Komodakis 2016, who have no gains and fewer biases
        ("resnet9", 10, 26_269_834),  # 4 times the 6.57 M of the usual width: `width` is 2
        ("convnet", 10, 25_578),
    ],
)
def test_build_has_this_many_parameters(name, num_classes, expected):
    assert num_parameters(build(name, num_classes=num_classes), (32, 32, 3)) == expected


def test_build_wrn16_4_has_the_size_of_the_paper():
    assert 2.74e6 < num_parameters(build("wrn16_4", num_classes=10), (32, 32, 3)) < 2.76e6


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1)])
def test_build_maps_images_to_logits(name, shape):
    channels = {"mean": [0.5] * shape[-1], "std": [0.25] * shape[-1]}
    model = build(name, num_classes=7, **channels)
    params = jax.eval_shape(lambda: init(model, jax.random.key(0), shape))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    logits = jax.eval_shape(lambda p, x: models.apply(model, p, x), params, jnp.zeros((4, *shape)))
    assert (logits.shape, logits.dtype) == ((4, 7), np.float32)


def test_names_are_those_of_the_interface():
    assert models.names() == ["convnet", "resnet9", "wrn16_4", "wrn40_4"]


@EACH
def test_models_keep_examples_apart(model):
    """What DP-SGD and the direct term of a metagradient need: one image's logits do not see its batch."""
    params, images = drawn(model), pictures()
    together = forward(model, params, images)
    others = forward(model, params, images.at[1:].set(1 - images[1:]))
    assert np.std(together) > 1e-3
    assert np.allclose(others[0], together[0], rtol=0, atol=1e-5)
    assert not np.allclose(others[1:], together[1:], rtol=0, atol=1e-3)


@EACH
def test_models_keep_float64(model):
    """Nothing in a model falls back to float32 when pixels and parameters are float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), drawn(model))
        images = pictures().astype(jnp.float64)
        text = str(jax.make_jaxpr(lambda p, x: models.apply(model, p, x))(params, images))
        assert jax.eval_shape(lambda p, x: models.apply(model, p, x), params, images).dtype == jnp.float64
    assert "f64" in text
    assert "f32[" not in text


@EACH
def test_logit_scale_scales_logits(model):
    """Weights and bias; to 1e-6."""
    params, images = drawn(model), pictures()
    scaled = model.clone(logit_scale=0.04)
    expected = 0.04 / model.logit_scale * forward(model, params, images)
    assert np.allclose(forward(scaled, params, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 5, 1), (3, 4, 6, 3)])
def test_convolve_as_matmul_equals_lax(shape):
    """Values and, of a scalar, both derivatives to 1e-5."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (3, 3, shape[-1], 4)))

    def scalar(x, kernel, as_matmul):
        y = convolve(x, kernel, as_matmul=as_matmul)
        return jnp.sum(jnp.sin(y)), y

    derivative = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True), static_argnums=2)
    ours, theirs = (jax.tree.leaves(derivative(x, kernel, as_matmul)) for as_matmul in (True, False))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_convolve_has_its_definition():
    """y[i, j] = sum of kernel[a, b] x[i + a - 1, j + b - 1], zero outside; a correlation, not flipped."""
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    for as_matmul in (True, False):
        assert convolve(x, kernel, as_matmul=as_matmul)[0, ..., 0].tolist() == [[8, 7, 6], [5, 4, 3], [2, 1, 0]]


def test_as_matmul_does_not_change_a_model():
    """The same parameters serve both forms: what was trained on a CPU can be scored on a GPU."""
    model = SMALL["convnet"]
    params, images = drawn(model), pictures()
    other = forward(model.clone(as_matmul=False), params, images)
    assert np.allclose(forward(model, params, images), other, rtol=1e-5, atol=1e-5)


def test_average_pool_drops_the_odd_row_and_column():
    x = np.random.default_rng(0).random((2, 5, 7, 3)).astype(np.float32)
    expected = [[x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2)) for j in range(3)] for i in range(2)]
    assert np.allclose(average_pool(jnp.asarray(x)), np.array(expected).transpose(2, 0, 1, 3), rtol=1e-6)


def test_average_pool_refuses_to_average_nothing():
    """A 1x1 map would become an empty one, and logits a constant or not a number."""
    with pytest.raises(ValueError, match="image size: got a 1x2 feature map"):
        average_pool(jnp.ones((1, 1, 2, 3)))
    with pytest.raises(ValueError, match="image size: got a 1x1 feature map"):
        init(build("convnet", num_classes=2, widths=[4, 4, 4]), jax.random.key(0), (4, 4, 1))


def test_normalise_is_by_channel():
    x = jnp.array([0.2, 0.6]).reshape(1, 1, 1, 2)
    assert normalise(x, (0.1, 0.2), (0.5, 0.25)).ravel().tolist() == pytest.approx([0.2, 1.6], rel=1e-6)
    assert normalise(x, (0.1,), (0.5,)).ravel().tolist() == pytest.approx([0.2, 1.0], rel=1e-6)


@EACH
def test_models_normalise_pixels_themselves(model):
    """Trap 7: what they are given, and what is projected to [0, 1], are pixels."""
    params, images = drawn(model), pictures()
    plain = forward(model.clone(mean=(0.0,), std=(1.0,)), params, normalise(images, model.mean, model.std))
    assert np.allclose(forward(model, params, images), plain, rtol=1e-4, atol=1e-5)


def test_weight_standardised_conv_ignores_shift_and_scale_of_its_kernel():
    layer = models.WeightStandardisedConv(features=4, stride=2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)
    params = {"kernel": kernel, "gain": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}
    expected = layer.apply({"params": params}, x)
    assert expected.shape == (2, 3, 3, 4)
    moved = layer.apply({"params": params | {"kernel": 3 * kernel + 0.7}}, x)
    assert np.allclose(moved, expected, rtol=0, atol=1e-4)
    exact = np.asarray(kernel, np.float64).reshape(27, 4)
    weights = (exact - exact.mean(axis=0)) / exact.std(axis=0) / np.sqrt(27) * np.arange(1, 5)
    patch = np.asarray(x[0, 2:5, 2:5]).reshape(27)  # stride 2, "same" pads 0 before and 1 behind
    assert np.allclose(expected[0, 1, 1], patch @ weights + 1, rtol=0, atol=1e-5)


def test_resnet9_final_pool():
    """The average, or the log-mean-exp at temperature 0.1; both give a constant map's value."""
    x = np.random.default_rng(0).random((1, 2, 2, 3)).astype(np.float32)
    expected = {"average": x.mean(axis=(1, 2)), "logsumexp": 0.1 * np.log(np.exp(x / 0.1).mean(axis=(1, 2)))}
    for pool in models.POOLS:
        model = build("resnet9", num_classes=5, pool=pool)
        assert np.allclose(model._final_pool(jnp.asarray(x)), expected[pool], rtol=1e-5)
        assert np.allclose(model._final_pool(jnp.full((1, 2, 2, 1), 0.7)), 0.7, rtol=1e-5)


def test_build_makes_hashable_models():
    """Lists of a config become tuples: equal settings are one compiled function."""
    model = build("convnet", num_classes=3, widths=[4, 8], mean=[0.5])
    assert (model.widths, model.mean) == ((4, 8), (0.5,))
    assert hash(model) == hash(build("convnet", num_classes=3, widths=(4, 8)))
    assert model != build("convnet", num_classes=3, widths=(4, 9))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "model name: got 'lenet', expected one of convnet, resnet9, wrn16_4, wrn40_4"),
        ("convnet", {"depth": 3}, "options of model convnet: .*depth"),
        ("wrn16_4", {"depth": 28}, "options of model wrn16_4: .*depth"),
        ("convnet", {"activation": "tanh"}, "activation: got 'tanh', expected one of relu, gelu, celu"),
        ("resnet9", {"pool": "max"}, "pool: got 'max', expected one of average, logsumexp"),
    ],
)
def test_build_rejects(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, num_classes=10, **options)
