"""Networks: shapes, sizes, both forms of convolution, and no example that touches another's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary import model_layers, models
from metacanary.model_layers import normalise
from metacanary.models import build, init

SMALL = {
    "convnet": build("convnet", num_classes=5, widths=(4, 6)),
    "convnet with GroupNorm": build("convnet", num_classes=5, widths=(4,), group_norm=2, activation="celu"),
    "rough convnet": build("convnet", num_classes=5, widths=(4, 6), activation="relu", pool="max"),
    "resnet9": build("resnet9", num_classes=5, width=0.125),
    "rough resnet9": build(
        "resnet9",
        num_classes=5,
        width=0.125,
        activation="relu",
        norm_after_activation=True,
        pool="max",
        final_pool="max",
    ),
    "resnet9 without GroupNorm": build("resnet9", num_classes=5, width=0.125, group_norm=0),
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
        ("wrn10_1", 10, 78_522),
        ("wrn16_4", 10, 2_753_402),  # 2.75 M in De et al. 2022 and Sander et al. 2022
        ("wrn16_4", 100, 2_776_532),
        ("wrn40_4", 10, 8_960_890),  # 8.9 M in Zagoruyko and Komodakis 2016, who have no gains and fewer biases
        ("resnet9", 10, 26_269_834),  # 4 times the 6.57 M of the usual width: `width` is 2
        ("convnet", 10, 25_578),
    ],
)
def test_build_has_this_many_parameters(name, num_classes, expected):
    assert num_parameters(build(name, num_classes=num_classes), (32, 32, 3)) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("convnet", {"pool": "max", "activation": "relu", "logit_scale": 0.1}, 25_578),
        ("convnet", {"group_norm": 8}, 25_578 + 2 * (16 + 32)),  # a gain and a bias per channel
        ("convnet", {"group_norm": 8, "norm_after_activation": True}, 25_578 + 2 * (16 + 32)),
        ("convnet", {"widths": (32, 64)}, (27 + 1) * 32 + (9 * 32 + 1) * 64 + (8 * 8 * 64 + 1) * 10),
        ("resnet9", {"pool": "max", "final_pool": "max", "norm_after_activation": True}, 26_269_834),
        ("resnet9", {"group_norm": 0}, 26_269_834 - 2 * (64 + 3 * 128 + 256 + 3 * 512)),  # biases for gains and biases
        # Kernels, gains and biases of the normalisations, the last layer.
        ("resnet9", {"width": 1.0}, 6_563_520 + 2 * (64 + 3 * 128 + 256 + 3 * 512) + 5_130),
    ],
)
def test_build_options_have_this_many_parameters(name, options, expected):
    assert num_parameters(build(name, num_classes=10, **options), (32, 32, 3)) == expected


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
    assert models.names() == ["convnet", "resnet9", "wrn10_1", "wrn16_4", "wrn40_4"]


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


def test_as_matmul_does_not_change_a_model():
    """The same parameters serve both forms: what was trained on a CPU can be scored on a GPU."""
    model = SMALL["convnet"]
    params, images = drawn(model), pictures()
    other = forward(model.clone(as_matmul=False), params, images)
    assert np.allclose(forward(model, params, images), other, rtol=1e-5, atol=1e-5)


def options_of(name):
    """What undoes each change that makes a network smooth."""
    last = {"final_pool": "max"} if name == "resnet9" else {}
    return [
        {},
        {"pool": "max"},
        {"norm_after_activation": True},
        {"group_norm": 0},
        {"activation": "relu"},
        *([last] if last else []),
    ]


@pytest.mark.parametrize("name", ["convnet", "resnet9"])
def test_build_options_each_change_the_function(name):
    """No option is read and forgotten: at the same parameters the logits of no two variants agree."""
    size = {"widths": (4, 6), "group_norm": 2} if name == "convnet" else {"width": 0.125}
    params, images, found = drawn(build(name, num_classes=5, **size), size=16), pictures(size=16), []
    for options in options_of(name):
        model = build(name, num_classes=5, **{**size, **options})
        if options == {"group_norm": 0}:  # other parameters; that they are fewer is tested above
            assert jax.tree.structure(drawn(model, size=16)) != jax.tree.structure(params)
            continue
        found.append(np.asarray(forward(model, params, images)))
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            assert np.abs(a - b).max() > 1e-3


def test_norm_after_activation_normalises_what_is_pooled():
    """Behind the activation the channels of a group have zero mean and unit variance over the map; before it not."""
    model = build("convnet", num_classes=2, widths=(4,), group_norm=1, norm_after_activation=True)
    params, images = init(model, jax.random.key(0), (8, 8, 3)), pictures()
    for late in (True, False):
        moments = [(x.mean(), x.var()) for x in normalised(model.clone(norm_after_activation=late), params, images)]
        assert np.allclose(moments, [(0, 1)] * len(images), atol=2e-2) == late


def normalised(model, params, images):
    """What the network pools, by image: the first argument of its pool."""
    seen = []
    plain = model_layers.POOLS[model.pool]
    model_layers.POOLS[model.pool] = lambda x: seen.append(np.asarray(x)) or plain(x)
    try:
        models.apply(model, params, images)
    finally:
        model_layers.POOLS[model.pool] = plain
    return seen[0]


@EACH
def test_models_normalise_pixels_themselves(model):
    """Trap 7: what they are given, and what is projected to [0, 1], are pixels."""
    params, images = drawn(model), pictures()
    plain = forward(model.clone(mean=(0.0,), std=(1.0,)), params, normalise(images, model.mean, model.std))
    assert np.allclose(forward(model, params, images), plain, rtol=1e-4, atol=1e-5)


def test_weight_standardised_conv_ignores_shift_and_scale_of_its_kernel():
    layer = model_layers.WeightStandardisedConv(features=4, stride=2)
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
    """The average, the log-mean-exp at temperature 0.1, or the maximum; all give a constant map's value."""
    x = np.random.default_rng(0).random((1, 2, 2, 3)).astype(np.float32)
    expected = {"average": x.mean(axis=(1, 2)), "logsumexp": 0.1 * np.log(np.exp(x / 0.1).mean(axis=(1, 2)))}
    expected["max"] = x.max(axis=(1, 2))
    for pool in models.FINAL_POOLS:
        model = build("resnet9", num_classes=5, final_pool=pool)
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
        ("lenet", {}, "model name: got 'lenet', expected one of convnet, resnet9, wrn10_1, wrn16_4, wrn40_4"),
        ("convnet", {"depth": 3}, "options of model convnet: .*depth"),
        ("wrn16_4", {"depth": 28}, "options of model wrn16_4: .*depth"),
        ("convnet", {"activation": "tanh"}, "activation: got 'tanh', expected one of relu, gelu, celu"),
        ("resnet9", {"pool": "logsumexp"}, "pool: got 'logsumexp', expected one of average, max"),
        ("resnet9", {"final_pool": "sum"}, "final_pool: got 'sum', expected one of average, logsumexp, max"),
    ],
)
def test_build_rejects(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, num_classes=10, **options)
