"""Clipping: both ways against a loop over examples and layers; sensitivity, noise, adaptive thresholds, pull-backs."""

from functools import partial

import dp_accounting
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld
from flax.traverse_util import flatten_dict

from metacanary import clipping, models
from metacanary.recipes import DPSGD, Clipping

BATCH, CLASSES = 5, 3
MASK = np.array([1, 1, 0, 1, 1], bool)
CONVNET = models.build("convnet", num_classes=CLASSES, widths=[4], group_norm=2)
LAYERS = ("Conv3x3_0", "GroupNorm_0", "Dense_0")
NAMES = {"all": LAYERS, "last": LAYERS[-1:], "two": LAYERS[:2]}
BY_LAYER = pytest.mark.parametrize("by_layer", [False, True], ids=["by example", "by layer"])
ADAPTIVE = Clipping(name="adaptive", quantile=0.8)
RECIPE = DPSGD(num_steps=10, sampling_prob=0.1, clip_norm=1.0, noise_multiplier=2.0, learning_rate=0.1)


def cross_entropy(logits, label):
    """Mean over the copies of one example."""
    return (jax.nn.logsumexp(logits, axis=-1) - logits[:, label]).mean()


def start(model=CONVNET, shape=(4, 4, 1), copies=1, dtype=np.float32):
    """Random parameters of every leaf, images [BATCH, copies, ...] and labels."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.init(model, jax.random.key(0), shape))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)
    return params, jnp.asarray(rng.random((BATCH, copies, *shape)), dtype), jnp.asarray(rng.integers(0, CLASSES, BATCH))


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for _, x in sorted(flatten_dict(tree).items())])


def by_layer_of(tree):
    """One vector for each layer, by path."""
    names = {"/".join(path[:-1]) for path in flatten_dict(tree)}
    return {name: flat(clipping.split(tree, [name])[0]) for name in names}


def gradients(model, params, names, copies, labels):
    """Each example's gradient by the parameters of some layers, by path, as a list."""
    trained, frozen = clipping.split(params, names)

    def loss(trained, x, y):
        return cross_entropy(models.apply(model, clipping.merge(trained, frozen), x), y)

    gradient = jax.jit(jax.grad(loss))
    return [by_layer_of(gradient(trained, x, y)) for x, y in zip(copies, labels, strict=True)]


def naive(examples, mask, clip_norm, thresholds):
    """The sum by layer as a Python loop over gradients of examples, and the counts."""
    total, counts = dict.fromkeys(examples[0], 0.0), dict.fromkeys(thresholds, 0.0)
    for example, keep in zip(examples, mask, strict=True):
        norms = {name: np.linalg.norm(g) for name, g in example.items()}
        whole = np.sqrt(sum(norm**2 for norm in norms.values()))
        for name in example if keep else ():
            norm, bound = (norms[name], thresholds[name]) if thresholds else (whole, clip_norm)
            total[name] = total[name] + example[name] * min(1.0, bound / norm)
            if thresholds:
                counts[name] += 0.5 if norm <= bound else -0.5
    return total, counts


def medians(examples):
    """Thresholds of layers between the norms of examples: some are clipped, some are not."""
    return {name: float(np.mean(sorted(np.linalg.norm(e[name]) for e in examples)[1:3])) for name in examples[0]}


def clipped(model, by_layer, params, names, copies, labels, mask, clip_norm, thresholds):
    """`clipping.clipped_sum`, compiled."""
    trained, frozen = clipping.split(params, names)
    bounds = {name: jnp.asarray(c, copies.dtype) for name, c in thresholds.items()}
    total = partial(clipping.clipped_sum, model, cross_entropy, clip_norm=clip_norm, by_layer=by_layer)
    return jax.jit(lambda *args: total(*args[:-1], thresholds=args[-1]))(
        trained, frozen, copies, labels, jnp.asarray(mask), bounds
    )


def compare(found, expected, tolerance):
    """Sums by layer and counts with those of the loop."""
    total, counts = found
    total, (exact, exact_counts) = by_layer_of(total), expected
    assert total.keys() == exact.keys()
    for name, value in exact.items():
        np.testing.assert_allclose(total[name], value, rtol=0, atol=tolerance * np.linalg.norm(value))
    assert {name: float(c) for name, c in counts.items()} == exact_counts


@BY_LAYER
@pytest.mark.parametrize(
    ("which", "copies", "form"),
    [("all", 1, "flat"), ("all", 2, "flat"), ("last", 2, "flat"), ("all", 2, "layers"), ("two", 1, "layers")],
)
def test_clipped_sum_equals_a_loop_over_examples_and_layers(by_layer, which, copies, form):
    """Both ways, flat and by layer, all layers or some with the others frozen: to 1e-5 in float32; counts exactly."""
    params, images, labels = start(copies=copies)
    examples = gradients(CONVNET, params, NAMES[which], images, labels)
    thresholds = medians(examples) if form == "layers" else {}
    norms = [np.linalg.norm(np.concatenate(list(e.values()))) for e in examples]
    clip_norm = float(np.median(norms))
    assert min(norms) < clip_norm * 0.99 < clip_norm * 1.01 < max(norms)
    found = clipped(CONVNET, by_layer, params, NAMES[which], images, labels, MASK, clip_norm, thresholds)
    compare(found, naive(examples, MASK, clip_norm, thresholds), 1e-5)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (models.ResNet9(num_classes=CLASSES, width=0.0625, group_norm=2), "layers"),
        (models.WideResNet(num_classes=CLASSES, depth=10, width=1, groups=4), "flat"),
    ],
    ids=["resnet9", "wide resnet"],
)
def test_clipped_sum_of_deep_networks_equals_a_loop(model, form):
    """Skips, strides and pools: by layer, to 1e-4 in float32, since derivatives pass through a dozen layers."""
    params, images, labels = start(model, (8, 8, 3))
    names = clipping.trained_layers("all", model, (8, 8, 3))
    examples = gradients(model, params, names, images, labels)
    thresholds = medians(examples) if form == "layers" else {}
    clip_norm = float(np.median([np.linalg.norm(np.concatenate(list(e.values()))) for e in examples]))
    found = clipped(model, True, params, names, images, labels, MASK, clip_norm, thresholds)
    compare(found, naive(examples, MASK, clip_norm, thresholds), 1e-4)


@BY_LAYER
@pytest.mark.parametrize("form", ["flat", "layers"])
def test_clipped_sum_ignores_what_the_mask_removes(by_layer, form):
    """Bit by bit, whatever is in a row of padding, be it no number at all."""
    params, images, labels = start()
    thresholds = dict.fromkeys(LAYERS, 0.3) if form == "layers" else {}
    trained, _ = clipping.split(params, None)
    total = partial(clipping.clipped_sum, CONVNET, cross_entropy, clip_norm=0.5, by_layer=by_layer)
    compiled = jax.jit(lambda x, y, keep: total(trained, {}, x, y, keep, thresholds=thresholds))
    expected = compiled(images, labels, MASK)
    for other in (images.at[2].set(9.0), images.at[2].set(jnp.nan)):
        found = compiled(other, labels.at[2].set((labels[2] + 1) % CLASSES), MASK)
        assert [x.tobytes() for x in jax.tree.leaves(found)] == [x.tobytes() for x in jax.tree.leaves(expected)]
    changed = compiled(images.at[0].set(9.0), labels, MASK)
    assert flat(changed[0]).tobytes() != flat(expected[0]).tobytes()
    assert not flat(compiled(images, labels, ~MASK & MASK)[0]).any()


@BY_LAYER
@pytest.mark.parametrize("form", ["flat", "layers"])
def test_clipped_sum_has_its_sensitivity(by_layer, form):
    """Guarantee, in float64 to 1e-9: each example changes the sum by at most S, layer k by at most C_k; both reached.

    Small thresholds clip every gradient, so that each example reaches them; large ones clip none.
    """
    with jax.enable_x64(True):
        params, images, labels = start(dtype=np.float64)
        reached = []
        for scale in (1e-3, 0.3, 1e3):
            bounds = {name: scale * (k + 1) for k, name in enumerate(LAYERS)} if form == "layers" else {}
            bound = float(clipping.sensitivity(scale, {k: jnp.float64(v) for k, v in bounds.items()}))
            assert bound == pytest.approx(np.linalg.norm(list(bounds.values())) if bounds else scale, rel=1e-12)
            options = {"clip_norm": scale, "thresholds": bounds, "by_layer": by_layer}
            total = jax.jit(partial(clipping.clipped_sum, CONVNET, cross_entropy, **options))
            masks = np.concatenate([np.ones((1, BATCH)), 1 - np.eye(BATCH)]).astype(bool)
            sums = [total(params, {}, images, labels, mask)[0] for mask in masks]
            for fewer in sums[1:]:
                change = jax.tree.map(lambda a, b: a - b, sums[0], fewer)
                assert np.linalg.norm(flat(change)) <= bound * (1 + 1e-9)
                for name in bounds:
                    assert np.linalg.norm(by_layer_of(change)[name]) <= bounds[name] * (1 + 1e-9)
                reached.append(np.linalg.norm(flat(change)) / bound)
        assert np.allclose(reached[:BATCH], 1, rtol=0, atol=1e-9)
        assert max(reached[-BATCH:]) < 0.1


@BY_LAYER
def test_clipped_sum_of_equal_examples_reaches_n_times_the_bound(by_layer):
    """A worst case: aligned gradients of two layers, where neither the sum's bound nor the layers' can be improved."""
    params, images, labels = start()
    same, thresholds = jnp.broadcast_to(images[:1], images.shape), {"Conv3x3_0": 0.01, "GroupNorm_0": 0.02}
    labels = jnp.full_like(labels, labels[0])
    total, counts = clipped(CONVNET, by_layer, params, NAMES["two"], same, labels, MASK | True, 1.0, thresholds)
    norms = {name: np.linalg.norm(g) for name, g in by_layer_of(total).items()}
    assert norms == pytest.approx({name: BATCH * c for name, c in thresholds.items()}, rel=1e-5)
    assert {name: float(c) for name, c in counts.items()} == dict.fromkeys(thresholds, -BATCH / 2)


class Product(nn.Module):
    """One matrix without a bias: the gradient of a sum of logits is the image."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(1, use_bias=False)(images.reshape(len(images), -1))


@BY_LAYER
def test_clipped_sum_counts_a_norm_at_its_threshold_as_within(by_layer):
    """Norms 5, 10 and 0: at 5 the first and the last are within and nothing of them is cut; just below only the last.

    A count is 1/2 for an example within, -1/2 for one beyond, 0 for padding.
    """
    images = jnp.asarray([[[3.0, 4.0]], [[6.0, 8.0]], [[0.0, 0.0]], [[3.0, 4.0]]]).reshape(4, 1, 1, 2, 1)
    params = {"Dense_0": {"kernel": jnp.zeros((2, 1))}}
    total = partial(clipping.clipped_sum, Product(), lambda logits, _: logits.sum(), by_layer=by_layer, clip_norm=1.0)
    mask, labels = jnp.array([True, True, True, False]), jnp.zeros(4, int)
    for threshold, expected in ((5.0, 0.5), (float(np.nextafter(np.float32(5), np.float32(0))), -0.5)):
        thresholds = {"Dense_0": jnp.float32(threshold)}
        summed, counts = total(params, {}, images, labels, mask, thresholds=thresholds)
        assert float(counts["Dense_0"]) == expected
        assert summed["Dense_0"]["kernel"].ravel().tolist() == pytest.approx([6.0, 8.0], rel=1e-6)


@pytest.mark.parametrize("form", ["flat", "layers"])
def test_clipped_sum_by_layer_pulls_back_as_by_example(form):
    """By parameters, pixels and frozen parameters, to 1e-5 in float32; two copies."""
    params, images, labels = start(copies=2)
    examples = gradients(CONVNET, params, NAMES["two"], images, labels)
    thresholds = medians(examples) if form == "layers" else {}
    trained, frozen = clipping.split(params, NAMES["two"])
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trained)

    def pulled_back(by_layer):
        def total(trained, frozen, x):
            return clipping.clipped_sum(
                CONVNET,
                cross_entropy,
                trained,
                frozen,
                x,
                labels,
                jnp.asarray(MASK),
                clip_norm=1.0,
                thresholds=thresholds,
                by_layer=by_layer,
            )[0]

        return jax.jit(lambda: jax.vjp(total, trained, frozen, images)[1](v))()

    for a, b in zip(*(jax.tree.leaves(pulled_back(by_layer)) for by_layer in (True, False)), strict=True):
        assert np.linalg.norm(b) > 1e-4
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@BY_LAYER
@pytest.mark.parametrize("form", ["flat", "layers"])
def test_clipped_sum_has_the_derivative_of_finite_differences(by_layer, form):
    """By parameters and pixels along one direction, in float64, where some gradients are clipped: to 1e-7."""
    with jax.enable_x64(True):
        params, images, labels = start(dtype=np.float64)
        examples = gradients(CONVNET, params, None, images, labels)
        thresholds = medians(examples) if form == "layers" else {}
        clip_norm = float(np.mean(sorted(np.linalg.norm(np.concatenate(list(e.values()))) for e in examples)[1:3]))
        rng = np.random.default_rng(3)
        v, along = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params) for _ in range(2))
        pixels = jnp.asarray(rng.normal(size=images.shape))
        total = partial(
            clipping.clipped_sum, CONVNET, cross_entropy, clip_norm=clip_norm, thresholds=thresholds, by_layer=by_layer
        )

        @jax.jit
        def scalar(s):
            moved = jax.tree.map(lambda p, a: p + s * a, params, along)
            summed = total(moved, {}, images + s * pixels, labels, jnp.asarray(MASK))[0]
            return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(v), strict=True))

        difference = float(scalar(1e-5) - scalar(-1e-5)) / 2e-5
        assert abs(difference) > 0.1
        assert float(jax.jit(jax.grad(scalar))(0.0)) == pytest.approx(difference, rel=1e-7)


def test_clipped_sum_goes_by_example_where_a_network_does_not_come_apart():
    params, images, labels = start()

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(x.size // len(x))
            return dense(dense(x.reshape(len(x), -1)))

    def total(model, trained, by_layer):
        summed = partial(clipping.clipped_sum, model, cross_entropy, clip_norm=1.0, thresholds={}, by_layer=by_layer)
        return b"".join(
            np.asarray(x).tobytes() for x in jax.tree.leaves(jax.jit(summed)(trained, {}, images, labels, MASK))
        )

    twice = models.init(Twice(), jax.random.key(0), images.shape[2:])
    assert total(Twice(), twice, None) == total(Twice(), twice, False)
    with pytest.raises(ValueError, match="is no function of one batch that is called once"):
        total(Twice(), twice, True)
    assert total(CONVNET, params, None) == total(CONVNET, params, True)


@pytest.mark.parametrize("form", ["flat", "layers"])
def test_clipped_sum_by_layer_holds_no_gradients_of_examples(form):
    """Compiled memory of a layer of a million parameters for 16 examples: by example 16 times its size and more."""
    model, size = Wide(), 1024 * 1024 * 4
    params = {"Dense_0": {"kernel": jnp.zeros((1024, 1024))}}
    images, labels = jnp.zeros((16, 1, 32, 32, 1)), jnp.zeros(16, int)
    thresholds = {"Dense_0": jnp.float32(1.0)} if form == "layers" else {}

    def held(by_layer):
        total = partial(clipping.clipped_sum, model, cross_entropy, clip_norm=1.0, by_layer=by_layer)
        compiled = jax.jit(lambda p, x, keep: total(p, {}, x, labels, keep, thresholds=thresholds))
        analysis = compiled.lower(params, images, jnp.ones(16, bool)).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert held(False) > 15 * size
    assert held(True) < 5 * size


@pytest.mark.parametrize("form", ["flat", "layers"])
@pytest.mark.parametrize("copies", [1, 2])
def test_clipped_sum_by_layer_makes_no_gradient_of_an_example_by_the_last_layer(form, copies):
    """Small layers' gradients are kept while they are summed; of no example are there those of all layers."""
    params, _, labels = start()
    kernel = params["Dense_0"]["kernel"].shape
    images, keep = jnp.ones((len(labels), copies, 4, 4, 1)), jnp.ones(len(labels), bool)
    thresholds = dict.fromkeys(LAYERS, jnp.float32(1.0)) if form == "layers" else {}

    def shapes(by_layer):
        def total(p):
            return clipping.clipped_sum(
                CONVNET,
                cross_entropy,
                p,
                {},
                images,
                labels,
                keep,
                clip_norm=1.0,
                thresholds=thresholds,
                by_layer=by_layer,
            )

        found = set()

        def look(jaxpr):
            for equation in jaxpr.eqns:
                found.update(variable.aval.shape for variable in equation.outvars)
                for value in jax.tree.leaves(list(equation.params.values())):
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        look(inner)

        look(jax.make_jaxpr(total)(params).jaxpr)
        return found

    assert (len(labels), *kernel) in shapes(False)
    assert not {(len(labels), *kernel), (len(labels), *kernel[::-1])} & shapes(True)


class Wide(nn.Module):
    """One matrix of a million numbers."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(1024, use_bias=False)(images.reshape(len(images), -1))


def test_trained_layers_split_and_merge():
    """All layers in the order of their calls, or the last; what is taken apart is put together again."""
    params = start()[0]
    assert clipping.trained_layers("all", CONVNET, (4, 4, 1)) == LAYERS
    assert clipping.trained_layers("last", CONVNET, [4, 4, 1]) == ("Dense_0",)
    taken, rest = clipping.split(params, ["Dense_0"])
    assert (set(taken), set(rest)) == ({"Dense_0"}, {"Conv3x3_0", "GroupNorm_0"})
    assert clipping.split_trained(params, "last", CONVNET, (4, 4, 1)) == (taken, rest)
    assert clipping.split_trained(params, "all", CONVNET, (4, 4, 1)) == (params, {})
    for merged in (clipping.merge(taken, rest), clipping.merge(*clipping.split(params, None))):
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        assert flat(merged).tobytes() == flat(params).tobytes()


def test_start_thresholds_share_the_clip_norm_or_are_given():
    """C / sqrt(K) each, so that the sensitivity is C."""
    assert clipping.start_thresholds(Clipping(), 2.0, LAYERS) == {}
    shared = clipping.start_thresholds(Clipping(name="per_layer"), 2.0, LAYERS)
    assert {name: float(c) for name, c in shared.items()} == pytest.approx(dict.fromkeys(LAYERS, 2 / 3**0.5), rel=1e-6)
    assert float(clipping.sensitivity(9.0, shared)) == pytest.approx(2.0, rel=1e-6)
    given = Clipping(name="adaptive", thresholds={name: k + 1.0 for k, name in enumerate(LAYERS)})
    assert [float(clipping.start_thresholds(given, 2.0, LAYERS)[name]) for name in LAYERS] == [1, 2, 3]


@pytest.mark.parametrize("thresholds", [{"Dense_0": 1.0}, dict.fromkeys((*LAYERS, "Dense_1"), 1.0)])
def test_start_thresholds_refuse_other_layers(thresholds):
    wrong = sorted(set(thresholds) ^ set(LAYERS))
    with pytest.raises(ValueError) as error:
        clipping.start_thresholds(Clipping(name="per_layer", thresholds=thresholds), 1.0, LAYERS)
    assert str(error.value).startswith(f"clipping.thresholds: {wrong} missing or unknown, expected a number for each")


@pytest.mark.parametrize(
    ("name", "allocation"),
    [("flat", "shared"), *((name, how) for name in ("per_layer", "adaptive") for how in ("shared", "equal"))],
)
def test_noise_stddev_is_that_of_a_gaussian_mechanism(name, allocation):
    """Guarantee: the squared means over variances of one example add up to 1 / multiplier^2 at most, and reach it.

    Of its clipped gradients, and where thresholds adapt of its counts, a half each.
    """
    budget = {"budget": 0.2} if name == "adaptive" else {}
    recipe = DPSGD(**vars(RECIPE) | {"clipping": Clipping(name=name, allocation=allocation, **budget)})
    params = start()[0]
    given = {} if name == "flat" else {layer: jnp.float32(0.3 * (k + 1)) for k, layer in enumerate(LAYERS)}
    stddev = clipping.noise_stddev(recipe, given, params)
    stddev = stddev if given else jax.tree.map(lambda _: stddev, params)
    assert jax.tree.structure(stddev) == jax.tree.structure(params)

    def ratio(lengths):
        """Of gradients of these norms by layer."""
        total = sum(lengths[k] ** 2 / float(stddev[k][next(iter(stddev[k]))]) ** 2 for k in LAYERS)
        if name == "adaptive":
            total += len(LAYERS) * 0.25 / recipe.clipping.count_noise(recipe.noise_multiplier, len(LAYERS)) ** 2
        return total * recipe.noise_multiplier**2

    for layer in stddev.values():
        assert len({float(x) for x in layer.values()}) == 1
    longest = {k: float(given[k]) if given else recipe.clip_norm / 3**0.5 for k in LAYERS}
    assert ratio(longest) == pytest.approx(1, rel=1e-5)
    for row in np.random.default_rng(0).random((20, len(LAYERS))):
        assert ratio({k: u * longest[k] for k, u in zip(LAYERS, row, strict=True)}) < 1
    if allocation == "shared" or name == "flat":
        assert len({float(x) for x in jax.tree.leaves(stddev)}) == 1
    else:
        assert len({float(x) for x in jax.tree.leaves(stddev)}) == len(LAYERS)


@pytest.mark.parametrize(("sigma", "budget"), [(1.0, 0.01), (2.0, 0.5)])
def test_adaptive_noise_spends_what_is_accounted(sigma, budget):
    """Gradients and counts, two Gaussian mechanisms on one sample, are one of the total multiplier.

    To 1e-3 of epsilon by dp-accounting's own composition over 100 steps; and, since it knows no sampling of two
    mechanisms at once, delta of one step at q = 0.1 by integration over both outputs, in both directions, to 1e-3.
    """
    settings = Clipping(name="adaptive", budget=budget)
    num_layers, unit = 7, np.sqrt(7) / 2  # the norm of what one example adds to the counts

    def spent(*multipliers):
        parts = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(10 * m) for m in multipliers])
        account = pld.PLDAccountant(value_discretization_interval=1e-4)
        account.compose(dp_accounting.SelfComposedDpEvent(parts, 100))
        return account.get_epsilon(1e-5)

    def deltas(first, second):
        """Of epsilon 0.2, of removing and of adding an example whose outputs are shifted by 1 / multiplier."""
        x, y = np.meshgrid(np.linspace(-9, 9, 1201), np.linspace(-9, 9, 1201))
        without = np.exp(-(x**2 + y**2) / 2) / (2 * np.pi)
        within = 0.9 * without + 0.1 * without * np.exp(x / first + y / second - (first**-2 + second**-2) / 2)
        gaps = (within - np.exp(0.2) * without, without - np.exp(0.2) * within)
        return [np.maximum(gap, 0).sum() * (18 / 1200) ** 2 for gap in gaps]

    gradients, counts = settings.gradient_noise(sigma), settings.count_noise(sigma, num_layers) / unit
    assert gradients > sigma
    assert spent(gradients, counts) == pytest.approx(spent(sigma), abs=1e-3)
    exact = deltas(sigma, np.inf)
    assert exact[0] > 1e-4
    assert deltas(gradients, counts) == pytest.approx(exact, rel=1e-3, abs=1e-7)
    assert spent(sigma, counts) > spent(sigma) + 5e-3  # counts that come on top would be seen


def followed(recipe, norms, steps=200, start=1e-2):
    """Thresholds of layers after updates by the counts of norms [n] of each, by path."""
    thresholds = {name: jnp.float32(start) for name in norms}
    update = jax.jit(lambda c, counts, key: clipping.next_thresholds(recipe, c, counts, 1000.0, key))
    for t in range(steps):
        counts = {k: jnp.float32(np.where(norms[k] <= float(c), 0.5, -0.5).sum()) for k, c in thresholds.items()}
        thresholds = update(thresholds, counts, jax.random.key(t))
    return {name: float(c) for name, c in thresholds.items()}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.01), (1.0, 0.1)])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_next_thresholds_converge_to_the_quantile(quantile, noise, tolerance):
    """Of 1,000 lognormal norms of each layer, from a hundredth: within 1% without noise, 10% with it."""
    rng = np.random.default_rng(0)
    norms = {"a": np.exp(0.5 * rng.normal(size=1000)), "b": 7 * np.exp(0.5 * rng.normal(size=1000))}
    settings = Clipping(name="adaptive", quantile=quantile)
    recipe = DPSGD(**vars(RECIPE) | {"noise_multiplier": noise, "clipping": settings})
    found = followed(recipe, norms)
    for name, values in norms.items():
        assert found[name] == pytest.approx(np.quantile(values, quantile), rel=tolerance)


def test_next_thresholds_follow_noisy_counts_alone():
    """The noise on each count has its deviation, within 5 standard errors, of its own draw for each layer and key."""
    recipe = DPSGD(**vars(RECIPE) | {"clipping": ADAPTIVE})
    counts = {"a": jnp.float32(10.0), "b": jnp.float32(-30.0), "c": jnp.float32(0.0)}
    thresholds = {name: jnp.float32(1.0) for name in counts}
    keys = jax.random.split(jax.random.key(0), 2000)
    found = jax.vmap(lambda key: clipping.next_thresholds(recipe, thresholds, counts, 100.0, key))(keys)
    shares = np.array([ADAPTIVE.quantile - np.log(found[k]) / ADAPTIVE.learning_rate for k in counts])
    noise = (shares - 0.5) * 100 - np.array([[10.0], [-30.0], [0.0]])
    deviation = 2.0 / np.sqrt(0.01) * np.sqrt(3) / 2
    assert ADAPTIVE.count_noise(2.0, 3) == pytest.approx(deviation)
    assert np.abs(noise.std(axis=1) / deviation - 1).max() < 5 / np.sqrt(2 * 2000)
    assert np.abs(noise.mean(axis=1)).max() < 5 * deviation / np.sqrt(2000)
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(2000)


def test_next_thresholds_do_not_follow_what_noise_hides():
    """With much noise, thresholds of quite other norms take the same walk: no statistic enters without noise."""
    norms = {"a": np.full(1000, 1e-20)}, {"a": np.full(1000, 1e20)}

    def walk(noise, norms):
        recipe = DPSGD(**vars(RECIPE) | {"noise_multiplier": noise, "clipping": ADAPTIVE})
        return np.log(followed(recipe, norms, steps=2, start=1.0)["a"])

    noisy, silent = ([walk(noise, n) for n in norms] for noise in (1e4, 0.0))
    assert noisy[1] - noisy[0] == pytest.approx(silent[1] - silent[0], rel=1e-3)  # all that norms do is their count
    assert abs(noisy[0]) > 10 * abs(silent[1] - silent[0])
