"""Choosing a token: temperature, top-k with ties, top-p and penalty against a plain numpy version, and keys per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.config import ConfigError
from vlm_jax.generate.decode import Decoding
from vlm_jax.generate.sampling import Settings, choose, penalise, warp


def the_same(rows, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0):
    full = lambda x, dtype: jnp.full(rows, x, dtype)  # noqa: E731
    return Settings(
        full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32), full(penalty, jnp.float32)
    )


def reference(logits, temperature, top_k, top_p):
    """One row, written as the warpers are described: temperature, then k-th largest, then cumulative mass."""
    l = logits.astype(np.float64) / temperature
    if top_k:
        l[l < np.sort(l)[-min(top_k, len(l))]] = -np.inf
    p = np.exp(l - l.max())
    p /= p.sum()
    order = np.argsort(l, kind="stable")
    dropped = np.cumsum(p[order]) <= 1 - top_p
    dropped[-1] = False
    if top_p < 1:
        p[order[dropped]] = 0
    return p / p.sum()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 20, 99]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_distribution(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(2, 24)).astype(np.float32) * 3
    ours = jax.nn.softmax(warp(jnp.asarray(logits), the_same(2, temperature, top_k, top_p)), axis=-1)
    for row, theirs in zip(np.asarray(ours), logits):
        np.testing.assert_allclose(row, reference(theirs, temperature, top_k, top_p), atol=2e-6)


def test_ties_at_the_kth_place_are_kept():
    kept = warp(jnp.asarray([[0.0, 2.0, 1.0, 1.0, -1.0]]), the_same(1, top_k=2))
    np.testing.assert_array_equal(np.isfinite(kept[0]), [False, True, True, True, False])


def test_top_p_keeps_at_least_the_best():
    kept = warp(jnp.asarray([[0.0, 5.0, 1.0]]), the_same(1, top_p=1e-6))
    np.testing.assert_array_equal(np.isfinite(kept[0]), [False, True, False])


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = choose(jnp.repeat(logits, n, 0), keys, the_same(n, top_p=0.9))
    share = np.bincount(drawn, minlength=4) / n
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_temperature_zero_is_greedy_among_sampled_rows():
    logits = jax.random.normal(jax.random.key(1), (3, 50))
    mixed = the_same(3)._replace(temperature=jnp.asarray([0.0, 1.0, 0.0]))
    drawn = choose(logits, jax.random.split(jax.random.key(2), 3), mixed)
    assert drawn[0] == logits[0].argmax() and drawn[2] == logits[2].argmax()


def test_a_draw_depends_on_its_own_key_and_logits_only():
    logits = jax.random.normal(jax.random.key(1), (4, 50))
    keys = jax.random.split(jax.random.key(2), 4)
    together = choose(logits, keys, the_same(4, 0.8, 10, 0.9))
    back = choose(logits[::-1], keys[::-1], the_same(4, 0.8, 10, 0.9))[::-1]
    alone = [choose(logits[i : i + 1], keys[i : i + 1], the_same(1, 0.8, 10, 0.9))[0] for i in range(4)]
    np.testing.assert_array_equal(together, back)
    np.testing.assert_array_equal(together, alone)


def test_penalty_makes_seen_tokens_less_likely():
    out = penalise(jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[True, True, False]]), jnp.asarray([2.0]))
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"beams": 2, "temperature": 1.0},
        {"stop": ("",)},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Decoding(**wrong)
