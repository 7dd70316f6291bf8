"""The private part: naive twins, jax-privacy, sensitivity and its tightness, the statistics of sampler and noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.dpsgd import add_noise, clip, clipped_gradient_sum, global_norm, poisson_batches, poisson_sample

BATCH = 7


def loss(params, image, label):
    """A small non-linear model of one [2, 2, 1] image."""
    hidden = jnp.tanh(image.reshape(-1) @ params["hidden"])
    return jnp.square(jnp.vdot(hidden, params["out"]) - label)


def example(dtype=np.float32, seed=0):
    """Parameters, images, labels; the gradients' norms lie on both sides of 1."""
    rng = np.random.default_rng(seed)
    params = {"hidden": rng.normal(size=(4, 3)), "out": rng.normal(size=3)}
    params = jax.tree.map(partial(jnp.asarray, dtype=dtype), params)
    images = jnp.asarray(rng.normal(size=(BATCH, 2, 2, 1)), dtype)
    return params, images, jnp.asarray(rng.normal(size=BATCH), dtype)


total = jax.jit(partial(clipped_gradient_sum, loss))


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def naive(params, images, labels, mask, clip_norm):
    """The sum as a Python loop; also the norms before clipping."""
    gradient = jax.jit(jax.grad(loss))
    gradients = [flat(gradient(params, x, y)) for x, y in zip(images, labels, strict=True)]
    norms = np.linalg.norm(gradients, axis=1)
    factors = np.minimum(1, clip_norm / norms) * mask
    return factors @ np.array(gradients), norms


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_clipped_gradient_sum_equals_a_loop(dtype, tolerance):
    with jax.enable_x64(dtype is np.float64):
        params, images, labels = example(dtype)
        mask = np.array([1, 1, 0, 1, 0, 1, 1])
        found = total(params, images, labels, mask, 1.0)
        expected, norms = naive(params, images, labels, mask, 1.0)
        assert norms.min() < 1 < norms.max()  # some are clipped and some are not
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(dtype)}
        assert np.linalg.norm(flat(found) - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
@pytest.mark.parametrize("clip_norm", [0.05, 1.0, 1e6])
def test_clipped_gradient_sum_equals_jax_privacy(clip_norm):
    clipping = pytest.importorskip("jax_privacy.clipping", reason="jax-privacy is a development extra")
    params, images, labels = example()
    mask = np.array([1, 1, 0, 1, 0, 1, 1])
    theirs = clipping.clipped_grad(loss, batch_argnums=(1, 2), keep_batch_dim=False, l2_clip_norm=clip_norm)
    expected = flat(jax.jit(theirs)(params, images, labels, is_padding_example=jnp.asarray(mask == 0)))
    found = flat(total(params, images, labels, mask, clip_norm))
    assert np.linalg.norm(expected) > 0.01
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6 * clip_norm)


def test_clipped_gradient_sum_ignores_what_the_mask_removes():
    """Bit by bit, whatever the image and label of a padding row are."""
    params, images, labels = example()
    mask = np.array([1, 1, 0, 1, 0, 1, 1])
    expected = total(params, images, labels, mask, 1.0)
    others = total(params, images.at[2].set(9.0), labels.at[4].set(-7.0), mask, 1.0)
    assert flat(others).tobytes() == flat(expected).tobytes()
    kept = total(params, images.at[0].set(9.0), labels, mask, 1.0)
    assert flat(kept).tobytes() != flat(expected).tobytes()
    assert not flat(total(params, images, labels, 0 * mask, 1.0)).any()


@pytest.mark.parametrize("clip_norm", [0.01, 1.0])
def test_clipped_gradient_sum_has_its_sensitivity(clip_norm):
    """Guarantee: one example changes the sum by at most C, to 1e-6 relative in float64, and long gradients by C."""
    with jax.enable_x64(True):
        params, images, labels = example(np.float64)
        images = images.at[0].multiply(100.0)
        sums = [flat(total(params, images, labels, 1 - row, clip_norm)) for row in np.eye(BATCH + 1, BATCH)]
        changes = [np.linalg.norm(sums[BATCH] - one_less) for one_less in sums[:BATCH]]
    assert max(changes) <= clip_norm * (1 + 1e-6)
    assert max(changes) >= clip_norm * (1 - 1e-6)


def test_clipped_gradient_sum_of_aligned_examples_reaches_n_times_clip_norm():
    """A worst case: the bound on the sum cannot be improved, and replacing one by its opposite changes it by 2 C."""

    def linear(params, image, label):
        return label * jnp.vdot(params, image)

    image = jnp.ones((4, 3)) * 5
    found = clipped_gradient_sum(linear, jnp.zeros(3), image, jnp.ones(4), np.ones(4), 0.5)
    assert float(global_norm(found)) == pytest.approx(4 * 0.5, rel=1e-6)
    turned = clipped_gradient_sum(linear, jnp.zeros(3), image, jnp.array([1.0, 1, 1, -1]), np.ones(4), 0.5)
    assert float(global_norm(found - turned)) == pytest.approx(2 * 0.5, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 0.999, 1.001, 1e3, 1e12])
def test_clip_bounds_the_norm_and_keeps_short_gradients(scale):
    tree = {"a": jnp.array([0.6, 0.0]) * scale, "b": jnp.array([[0.8]]) * scale}
    clipped = clip(tree, 1.0)
    assert np.linalg.norm(flat(clipped)) <= 1 + 1e-6
    if scale < 1:
        assert flat(clipped).tobytes() == flat(tree).tobytes()
    else:
        assert flat(clipped) == pytest.approx([0.6, 0.0, 0.8], rel=1e-6)


def test_clip_of_a_zero_gradient_is_zero_with_a_finite_derivative():
    """Trap 10: the norm's derivative at 0 is not a number; the clip is the identity there, so is its derivative."""
    zero = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    assert not flat(clip(zero, 1.0)).any()
    gradient = jax.grad(lambda tree: sum(x.sum() for x in jax.tree.leaves(clip(tree, 1.0))))(zero)
    assert (flat(gradient) == 1.0).all()
    assert not flat(jax.grad(global_norm)(zero)).any()


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
def test_clip_of_jax_privacy_has_no_derivative_at_zero():
    """Why the clip is written here; when this fails, jax-privacy's can be used."""
    clipping = pytest.importorskip("jax_privacy.clipping", reason="jax-privacy is a development extra")
    gradient = jax.jit(jax.grad(lambda v: clipping.clip_pytree(v, 1.0)[0].sum()))(jnp.zeros(3))
    assert np.isnan(gradient).all()


def test_clipped_gradient_sum_is_differentiable_through_a_zero_gradient():
    """As metagradients need it: by the pixels of an example whose loss is flat in the parameters."""

    def pixels_to_sum(images):
        def flat_at_zero(params, image, label):
            return jnp.square(jnp.vdot(params, image))  # its gradient is 0 at params = 0

        labels, mask = jnp.zeros(2), np.ones(2)
        total = clipped_gradient_sum(flat_at_zero, jnp.zeros(3), images, labels, mask, 1.0)
        return total.sum()

    assert np.isfinite(jax.jit(jax.grad(pixels_to_sum))(jnp.ones((2, 3)))).all()


def test_clip_has_the_derivative_of_finite_differences():
    """Of a clipped gradient, float64; a clip that detached its factor would fail."""
    weights = np.array([0.3, -1.0, 2.0])
    with jax.enable_x64(True):
        x = jnp.array([1.0, 2.0, -2.0], jnp.float64)
        function = jax.jit(lambda v: jnp.vdot(weights, clip(v, 1.5)))
        found = np.asarray(jax.jit(jax.grad(function))(x))
        differences = [float(function(x + e) - function(x - e)) / 2e-5 for e in 1e-5 * np.eye(3)]
    assert np.allclose(found, differences, rtol=0, atol=1e-9)
    assert not np.allclose(found, weights * 0.5, atol=1e-2)


@pytest.fixture(scope="module")
def draws():
    """Which of 30 examples are in each of 1000 batches, at q = 0.2."""
    batches = [poisson_sample(jax.random.key(seed), 0.2, 30) for seed in range(1000)]
    return np.array([np.isin(np.arange(30), batch) for batch in batches])


def test_poisson_sample_has_binomial_batch_sizes(draws):
    """Mean and variance within 5 standard errors; a fixed-size sampler has variance 0."""
    sizes, variance = draws.sum(axis=1), 30 * 0.2 * 0.8
    assert abs(sizes.mean() - 6) < 5 * np.sqrt(variance / 1000)
    excess = (1 - 6 * 0.2 * 0.8) / variance
    assert abs(sizes.var(ddof=1) - variance) < 5 * variance * np.sqrt((2 + excess) / 1000)


def test_poisson_sample_includes_examples_alike_and_independently(draws):
    """Every mean and every covariance of two examples within 5 standard errors (435 pairs)."""
    assert np.abs(draws.mean(axis=0) - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 1000)
    covariance = np.cov(draws.T, ddof=1)[np.triu_indices(30, 1)]
    assert np.abs(covariance).max() < 5 * 0.2 * 0.8 / np.sqrt(1000)


def test_poisson_sample_depends_on_its_key_only(draws):
    assert len({row.tobytes() for row in draws}) > 990
    first = poisson_sample(jax.random.key(1), 0.5, 100)
    assert np.array_equal(first, poisson_sample(jax.random.key(1), 0.5, 100))
    assert not np.array_equal(first, poisson_sample(jax.random.key(2), 0.5, 100))
    assert (np.diff(first) > 0).all()


@pytest.mark.parametrize(("sampling_prob", "expected"), [(1.0, 5), (0.0, 0)])
def test_poisson_sample_at_the_ends(sampling_prob, expected):
    sample = poisson_sample(jax.random.key(3), sampling_prob, 5)
    assert sample.tolist() == list(range(expected))


USED = np.arange(40) % 3 > 0


@pytest.mark.parametrize("multiple", [1, 7, 64])
def test_poisson_batches_are_the_draws_of_each_step(multiple):
    """Guarantee: nothing is truncated; the rows of `poisson_sample` that are used, then -1, at a width of its own."""
    batches = poisson_batches(jax.random.key(5), 0.3, USED, 50, multiple)
    assert batches.dtype == np.int32
    assert batches.shape[1] % multiple == 0
    for t, batch in enumerate(batches):
        drawn = poisson_sample(jax.random.fold_in(jax.random.key(5), t), 0.3, 40)
        size = USED[drawn].sum()
        assert batch[:size].tolist() == drawn[USED[drawn]].tolist()
        assert (batch[size:] == -1).all()


def test_poisson_batches_share_the_draws_of_shared_rows():
    """Guarantee: whether another row is used changes nothing for a row."""
    first = poisson_batches(jax.random.key(6), 0.5, USED, 20, 4)
    second = poisson_batches(jax.random.key(6), 0.5, USED & (np.arange(40) != 20), 20, 4)
    assert first.shape == second.shape
    changed = 0
    for some, fewer in zip(first, second, strict=True):
        changed += 20 in some
        assert some[(some >= 0) & (some != 20)].tolist() == fewer[fewer >= 0].tolist()
    assert 0 < changed < 20


@pytest.mark.parametrize(
    ("sampling_prob", "multiple", "width"), [(0.3, 1, 30), (0.3, 8, 32), (1.0, 16, 48), (0.9, 1, 40)]
)
def test_poisson_batches_have_a_width_that_draws_do_not_change(sampling_prob, multiple, width):
    """Guarantee: mean and six deviations of all n rows, at most n, then up to the multiple: 12 + 6 sqrt(8.4) = 29.4."""
    for seed in range(5):
        used = USED if seed % 2 else ~USED
        assert poisson_batches(jax.random.key(seed), sampling_prob, used, 6, multiple).shape == (6, width)


def test_poisson_batches_grow_for_a_larger_draw(monkeypatch):
    """Guarantee: nothing is truncated, even where a draw is beyond six deviations."""
    monkeypatch.setattr("metacanary.dpsgd.poisson_sample", lambda key, sampling_prob, n: np.arange(n))
    batches = poisson_batches(jax.random.key(0), 0.01, np.ones(40, bool), 2, 16)
    assert batches.shape == (2, 48)
    assert batches[1, :40].tolist() == list(range(40))


def test_add_noise_is_gaussian_of_its_deviation():
    """Mean and deviation within 5 standard errors, in every leaf; leaves and keys are independent."""
    n, zeros = 20_000, {"a": jnp.zeros((100, 200)), "b": jnp.zeros(20_000)}
    first = jax.tree.map(np.ravel, add_noise(jax.random.key(0), zeros, 2.5))
    second = jax.tree.map(np.ravel, add_noise(jax.random.key(1), zeros, 2.5))
    noises = np.array([first["a"], first["b"], second["a"], second["b"]]) / 2.5
    assert np.abs(noises.mean(axis=1)).max() < 5 / np.sqrt(n)
    assert np.abs(noises.std(axis=1) - 1).max() < 5 / np.sqrt(2 * n)
    assert np.abs(np.mean(noises**4, axis=1) - 3).max() < 5 * np.sqrt(96 / n)
    assert np.abs(np.corrcoef(noises)[np.triu_indices(4, 1)]).max() < 5 / np.sqrt(n)


def test_add_noise_is_added():
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}
    assert flat(add_noise(jax.random.key(0), tree, 0.0)).tolist() == [1.0, 2.0, 3.0]
    noise = flat(add_noise(jax.random.key(0), jax.tree.map(jnp.zeros_like, tree), 0.1))
    assert np.allclose(flat(add_noise(jax.random.key(0), tree, 0.1)), flat(tree) + noise, atol=1e-6)
    assert np.abs(noise).min() > 0


def test_add_noise_has_a_deviation_of_its_own_for_each_leaf():
    """A tree of deviations: the draws of one number, leaf by leaf scaled; traced numbers serve as well."""
    tree = {"a": jnp.zeros(50), "b": {"c": jnp.zeros((4, 5)), "d": jnp.zeros(3)}}
    stddev = {"a": 2.0, "b": {"c": jnp.float32(0.5), "d": 0.0}}
    unit, found = add_noise(jax.random.key(0), tree, 1.0), add_noise(jax.random.key(0), tree, stddev)
    assert np.allclose(found["a"], 2 * unit["a"], rtol=1e-6)
    assert np.allclose(found["b"]["c"], 0.5 * unit["b"]["c"], rtol=1e-6)
    assert not found["b"]["d"].any()
    traced = jax.jit(lambda s: add_noise(jax.random.key(0), tree, s))(jnp.float32(3.0))
    assert np.allclose(flat(traced), 3 * flat(unit), rtol=1e-6)
    assert (unit["a"] != 0).all()


def test_clip_takes_a_traced_bound():
    """As thresholds that adapt are: the bound's own derivative is that of a gradient at the bound."""
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    assert flat(jax.jit(clip)(tree, jnp.float32(2.5))) == pytest.approx([1.5, 2.0], rel=1e-6)
    assert flat(jax.jit(clip)(tree, jnp.float32(5.0))).tolist() == [3.0, 4.0]
    slope = jax.jacobian(lambda bound: clip(tree, bound))(jnp.float32(2.5))
    assert flat(slope) == pytest.approx([0.6, 0.8], rel=1e-6)
