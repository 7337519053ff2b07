"""Layers of the tokenizers that are written other than their formulas: values and gradients of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm_jax.nn.params import merge, split
from vlm_jax.visual_tokenizers.group_norm import GroupNorm, group_norm
from vlm_jax.visual_tokenizers.layers import UpsampleConv, convolve, nearest_upsample


def plain_norm(x, scale, bias, groups, eps, silu):
    """Group norm as its paper has it: every group a row of numbers."""
    b, h, w, c = x.shape
    rows = x.reshape(b, h * w, groups, c // groups)
    mean, variance = rows.mean((1, 3), keepdims=True), rows.var((1, 3), keepdims=True)
    y = ((rows - mean) / jnp.sqrt(variance + eps)).reshape(x.shape) * scale + bias
    return y * jax.nn.sigmoid(y) if silu else y


def numbers(seed, *shape, at=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(at, 1, shape), jnp.float32)


@pytest.mark.parametrize("groups, silu, at", [(1, False, 0.0), (4, True, 0.0), (8, True, 50.0)])
def test_group_norm_has_the_values_and_gradients_of_its_formula(groups, silu, at):
    x, out = numbers(0, 2, 6, 5, 8, at=at), numbers(1, 2, 6, 5, 8)
    scale, bias = numbers(2, 8), numbers(3, 8)
    mine, back = jax.vjp(lambda *a: group_norm(*a, groups, 1e-6, silu), x, scale, bias)
    plain, plain_back = jax.vjp(lambda *a: plain_norm(*a, groups, 1e-6, silu), x, scale, bias)
    np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(back(out), plain_back(out)):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_group_norm_can_be_differentiated_twice():
    x, scale, bias = numbers(0, 1, 4, 4, 4), numbers(1, 4), numbers(2, 4)

    def slope(norm):
        return jax.grad(
            lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(norm(x, scale, bias, 2, 1e-6, True) ** 2))(x) ** 2)
        )(x)

    np.testing.assert_allclose(slope(group_norm), slope(plain_norm), rtol=2e-3, atol=2e-2)


def test_group_norm_of_bfloat16_has_float32_statistics_and_keeps_the_input_alone():
    x = (numbers(0, 2, 16, 16, 8) + 20).astype(jnp.bfloat16)
    norm = GroupNorm(8, nnx.Rngs(0), groups=2)
    wanted = plain_norm(x.astype(jnp.float32), 1.0, 0.0, 2, 1e-6, True)
    got, back = jax.vjp(lambda x: norm(x, silu=True), x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=2e-2)
    assert back(got)[0].dtype == jnp.bfloat16
    kept = [a for a in jax.tree.leaves(back) if a.size >= x.size]
    assert [a.dtype for a in kept] == [jnp.bfloat16]


@pytest.mark.parametrize("height, width", [(4, 4), (1, 3)])
def test_convolution_of_doubled_pixels(height, width):
    conv = UpsampleConv(3, 5, nnx.Rngs(0))
    graph, params = split(conv)
    x, out = numbers(0, 2, height, width, 3), numbers(1, 2, 2 * height, 2 * width, 5)

    def plain(x, kernel):
        return convolve(nearest_upsample(x), kernel, pad=1) + conv.bias[...]

    def mine(x, kernel):
        return merge(graph, params | {"kernel": kernel})(x)

    kernel = numbers(2, 3, 3, 3, 5)
    wanted, plain_back = jax.vjp(plain, x, kernel)
    got, back = jax.vjp(mine, x, kernel)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    for g, w in zip(back(out), plain_back(out)):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
