"""Convolutions with half of the multiplications: the same numbers, gradients and second gradients as XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.visual_tokenizers import layers, winograd

SHAPES = {  # [H, W, I, O]: every way of the forward and the backward pass
    "products": (32, 32, 64, 64),
    "products, ragged": (33, 35, 64, 80),
    "products, turned": (64, 66, 64, 64),
    "plain": (24, 24, 64, 64),
    "places": (8, 11, 64, 80),
    "plain, narrow": (64, 64, 16, 32),
    "thin in": (12, 10, 3, 32),
    "thin out": (12, 10, 32, 3),
}


def arrays(h: int, w: int, i: int, o: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (2, h, w, i), (3, 3, i, o), (2, h, w, o)
    x, k, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, k / (9 * i) ** 0.5, g


def usual(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return winograd.plain(x, kernel, "HWIO")


def gap(a: jax.Array, b: jax.Array) -> float:
    """Over the largest number."""
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_as_xla(shape):
    x, k, g = arrays(*shape)
    y, back = jax.vjp(winograd.convolve, x, k)
    expected, expected_back = jax.vjp(usual, x, k)
    assert y.shape == expected.shape
    for mine, theirs in zip((y, *back(g)), (expected, *expected_back(g)), strict=True):
        assert gap(mine, theirs) < 3e-5


def test_gradients_have_gradients():
    """Gradient penalties of a critic differentiate twice."""
    x, k, g = arrays(*SHAPES["products"])
    penalty = lambda way: lambda k: jnp.sum(jnp.square(jax.grad(lambda x: jnp.sum(jnp.tanh(way(x, k)) * g))(x)))
    assert gap(jax.grad(penalty(winograd.convolve))(k), jax.grad(penalty(usual))(k)) < 1e-4


def test_fewer_products_on_a_cpu_alone(monkeypatch):
    x, k, _ = arrays(*SHAPES["products"])

    def convolutions() -> int:
        return str(jax.make_jaxpr(lambda x, k: layers.convolve(x, k, pad=1))(x, k)).count("conv_general_dilated[")

    assert convolutions() == 6
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    assert convolutions() == 1
