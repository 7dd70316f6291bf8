"""The table of canaries and its file."""

import numpy as np

from metacanary import store
from metacanary.canaries import Canaries
from metacanary.families import make


def test_canaries_survive_their_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 1)).astype(np.uint8)
    made = make("mislabeled", images, np.arange(30) % 10, num_canaries=20, num_classes=10, seed=0)
    store.write_npz(tmp_path / "canaries.npz", made.arrays(), {})
    again = Canaries.from_arrays(store.read_npz(tmp_path / "canaries.npz")[0])
    for name, array in made.arrays().items():
        assert getattr(again, name).dtype == array.dtype
        assert np.array_equal(getattr(again, name), array)
