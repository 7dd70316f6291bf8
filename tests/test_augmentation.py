"""Augmentation: copies against NumPy's mirrored border, their distribution, their derivative."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.augmentation import copies
from metacanary.recipes import Augmentation

IMAGE = np.arange(1.0, 31.0, dtype=np.float32).reshape(5, 6, 1)
BOTH = Augmentation(multiplicity=400, flip=True, crop_padding=2)


draw = jax.jit(copies, static_argnums=0)


def crops(padding, flips):
    """All crops of the mirrored image by name, as NumPy makes them."""
    padded = np.pad(IMAGE, ((padding, padding), (padding, padding), (0, 0)), mode="symmetric")
    places = product(range(2 * padding + 1), repeat=2)
    plain = {(i, j, False): padded[i : i + 5, j : j + 6] for i, j in places}
    return plain | {(i, j, True): crop[:, ::-1] for (i, j, _), crop in plain.items() if flips}


def names(drawn, known):
    """The name of each copy; a copy that is no crop is an error."""
    by_bytes = {np.ascontiguousarray(crop).tobytes(): name for name, crop in known.items()}
    assert len(by_bytes) == len(known)
    return [by_bytes[np.asarray(copy).tobytes()] for copy in drawn]


@pytest.mark.parametrize(
    ("augmentation", "count"),
    [
        (Augmentation(multiplicity=60, flip=True), 2),
        (Augmentation(multiplicity=400, crop_padding=2), 25),
        (BOTH, 50),
    ],
)
def test_copies_are_crops_of_the_mirrored_image(augmentation, count):
    """Every copy is one of NumPy's, pixel by pixel, and every one of those comes up."""
    drawn = draw(augmentation, jax.random.key(0), jnp.asarray(IMAGE))
    assert drawn.shape == (augmentation.multiplicity, 5, 6, 1)
    known = crops(augmentation.crop_padding, augmentation.flip)
    assert len(known) == count
    assert set(names(drawn, known)) == set(known)


def test_copies_are_uniform_and_independent():
    """5,000 copies: places and coins within 5 standard errors, correlations of the three and of neighbours too."""
    drawn = draw(Augmentation(multiplicity=5000, flip=True, crop_padding=2), jax.random.key(1), jnp.asarray(IMAGE))
    table = np.array(names(drawn, crops(2, True)), float)
    for column, values in zip(table.T, (5, 5, 2), strict=True):
        shares = np.array([(column == value).mean() for value in range(values)])
        assert np.abs(shares - 1 / values).max() < 5 * np.sqrt((1 - 1 / values) / values / 5000)
    correlations = np.corrcoef(np.concatenate([table[:-1], table[1:]], axis=1).T)
    assert np.abs(correlations[np.triu_indices(6, 1)]).max() < 5 / np.sqrt(5000)


def test_copies_depend_on_the_key_only():
    first, again, other = (draw(BOTH, jax.random.key(k), jnp.asarray(IMAGE)) for k in (2, 2, 3))
    assert (first == again).all()
    assert not (first == other).all()
    with jax.enable_x64(True):  # a run audited in float64 sees the copies of the run in float32
        assert (draw(BOTH, jax.random.key(2), jnp.asarray(IMAGE, jnp.float64)) == np.asarray(first)).all()


def test_copies_without_augmentation_are_the_image():
    """Guarantee: bit by bit, whatever the key."""
    found = copies(Augmentation(), jax.random.key(4), jnp.asarray(IMAGE))
    assert np.asarray(found).tobytes() == IMAGE[None].tobytes()


def test_copies_are_differentiable_by_the_image():
    """The derivative adds up over the copies where a pixel went: against finite differences of a linear function."""
    augmentation = Augmentation(multiplicity=3, flip=True, crop_padding=2)
    weights = np.random.default_rng(0).normal(size=(3, 5, 6, 1))

    def function(image):
        return jnp.vdot(copies(augmentation, jax.random.key(5), image), weights)

    with jax.enable_x64(True):
        image = jnp.asarray(IMAGE, jnp.float64)
        found = np.asarray(jax.jit(jax.grad(function))(image)).ravel()
        bumped = jax.jit(jax.vmap(lambda bump: function(image + bump)))(jnp.eye(30).reshape(30, 5, 6, 1))
        expected = np.asarray(bumped - function(image))
    assert np.abs(expected).max() > 0.1
    assert np.allclose(found, expected, rtol=0, atol=1e-10)


def test_copies_reject_a_border_wider_than_the_image():
    with pytest.raises(ValueError, match=r"augmentation\.crop_padding: got 6, expected at most 5 pixels"):
        copies(Augmentation(crop_padding=6), jax.random.key(0), jnp.asarray(IMAGE))
    assert copies(Augmentation(crop_padding=5), jax.random.key(0), jnp.asarray(IMAGE)).shape == (1, 5, 6, 1)
