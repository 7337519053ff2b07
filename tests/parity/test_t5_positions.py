"""T5's buckets of relative positions against HF, exactly, and the bias that is built from diagonals."""

import re

import jax.numpy as jnp
import numpy as np

from tests.goldens import golden
from vlm_jax.nn.relative_position import bucket_of, diagonals, toeplitz


@golden("clip_flant5", "relative_position_buckets*.npz")
def test_buckets(path):
    z = np.load(path)
    for name in z.files:
        if found := re.fullmatch(r"buckets_bidirectional([01])_n(\d+)_d(\d+)", name):
            both, buckets, furthest = map(int, found.groups())
            ours = bucket_of(z["relative_position"], bool(both), buckets, furthest)
            np.testing.assert_array_equal(ours, z[name], err_msg=name)


def test_first_distance_of_every_bucket():
    """The edges that the published model was trained with; 16, 32 and 64 lie exactly on one."""
    both = bucket_of(-np.arange(200), True, 32, 128)
    assert np.flatnonzero(np.diff(both)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 11, 15, 22, 31, 45, 63, 90]
    causal = bucket_of(-np.arange(200), False, 32, 128)
    assert (np.flatnonzero(np.diff(causal))[15:] + 1).tolist() == [
        16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
    ]  # fmt: skip


def test_bias_equals_a_gather_per_pair():
    table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    for queries, keys in ((7, 7), (1, 9), (3, 200), (150, 40)):
        for both in (True, False):
            relative = np.arange(keys)[None, :] - np.arange(queries)[:, None]
            wanted = table[bucket_of(relative, both, 32, 128)].transpose(2, 0, 1)
            values = diagonals(jnp.asarray(table), queries, keys, bidirectional=both, max_distance=128)
            np.testing.assert_array_equal(toeplitz(values, queries, keys), wanted)
