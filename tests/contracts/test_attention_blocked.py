"""Attention that leaves out blocks: values and gradients of the reference, and no allowed pair outside the blocks it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.test_attention import packed, qkv
from vlm_jax.nn import attention_blocked
from vlm_jax.nn.attention import Mask, attention, choose
from vlm_jax.nn.dropout import dropout_key
from vlm_jax.parallel import rules
from vlm_jax.parallel.mesh import MeshConfig, make_mesh

SIZE = 8
SLOTS = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocked, "BLOCK", SIZE)


def rows(*lengths):
    """Segments [rows, SLOTS] of samples of these lengths, then padding."""
    return jnp.concatenate([packed(1, SLOTS, one) for one in lengths])


ROWS = rows((20, 9, 30), (3, 40))
MASKS = {
    "packed": Mask(True, None, ROWS, ROWS),
    "window": Mask(True, 11, ROWS, ROWS),
    "both ways": Mask(False, None, ROWS, ROWS),
    "plain": Mask(True),
    "everything": Mask(),
    "cache": Mask(True, None, ROWS, jnp.pad(ROWS, ((0, 0), (2 * SIZE, 0)), constant_values=1), q_offset=2 * SIZE),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_dense_with_gradients(name):
    mask = MASKS[name]
    q, k, v = qkv(slots=SLOTS, keys=SLOTS + 2 * SIZE * (name == "cache"))

    def run(impl):
        def loss(q, k, v):
            return (attention(q, k, v, mask, impl) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    (a, of_a), (b, of_b) = run("dense"), run("blocked")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), of_a, of_b)


def test_sixteen_bits_stay_near_dense():
    q, k, v = qkv(slots=SLOTS, dtype=jnp.bfloat16)

    def gradients(impl):
        def loss(*x):
            return (attention(*x, MASKS["packed"], impl).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for a, b in zip(gradients("dense"), gradients("blocked")):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.15)


@pytest.mark.parametrize("name", MASKS)
def test_every_allowed_pair_is_computed(name):
    mask = MASKS[name]
    keys = SLOTS + 2 * SIZE * (name == "cache")
    allowed = mask.allowed(SLOTS, keys)
    seen = np.ones((SLOTS, keys), bool) if allowed is None else np.asarray(allowed.any((0, 1)))
    first, end = map(np.asarray, attention_blocked.bounds(mask, SLOTS, keys))
    for query, key in np.argwhere(seen):
        assert first[query // SIZE] <= key // SIZE < end[query // SIZE]


def test_blocks_of_other_samples_are_left_out():
    ids = rows((24, 16))
    first, end = attention_blocked.bounds(Mask(True, None, ids, ids), SLOTS, SLOTS)
    np.testing.assert_array_equal(first, [0, 0, 0, 3, 3, 5, 5, 5])
    np.testing.assert_array_equal(end, np.arange(8) + 1)


def test_a_mesh_changes_nothing():
    q, k, v = qkv(slots=SLOTS)
    expected = attention(q, k, v, MASKS["packed"], "blocked")
    with rules.use(make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))):
        got = jax.jit(lambda q, k, v: attention(q, k, v, MASKS["packed"], "blocked"))(q, k, v)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_chosen_for_rows_on_a_cpu():
    q = jax.ShapeDtypeStruct((1, SLOTS, 2, 8), jnp.float32)
    assert choose(q, q, Mask(True, drop=0.1), "cpu") == "blocked"
    assert choose(q, q, Mask(diagonals=jnp.zeros((2, 2 * SLOTS - 1))), "cpu") == "dense"
    with dropout_key(jax.random.key(0)):
        assert choose(q, q, Mask(True, drop=0.1), "cpu") == "dense"
    assert choose(q, q, Mask(True), "gpu") == "dense"
