"""Linear, embedding and norm layers, and the activation table. Kernels are (in, out); statistics are float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn.params import normal, ones, param, zeros
from vlm_jax.parallel.rules import shard


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Linear(nnx.Module):
    """y = x W (+ b): [..., in] -> [..., out], computed in the dtype of x. The only place where a kernel is read."""

    def __init__(
        self, din: int, dout: int, axes: tuple[str | None, str | None], rngs: nnx.Rngs, *, bias: bool, std: float = 0.02
    ):
        self.kernel = param(rngs, normal(std), (din, dout), axes)
        self.bias = param(rngs, zeros, (dout,), axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Token table [V, D]; `attend` is the tied output head."""

    def __init__(self, vocab: int, width: int, rngs: nnx.Rngs, std: float = 0.02):
        self.embedding = param(rngs, normal(std), (vocab, width), ("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """tokens [B, T] -> [B, T, D]."""
        table = shard(
            self.embedding[...], "vocab", None
        )  # whole rows: a gather of split rows would be replicated first
        return jnp.take(table, tokens, axis=0).astype(dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back, times scale (Llama's order of the cast)."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs):
        self.scale, self.eps = param(rngs, ones, (width,), (None,)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return f.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Standard layer norm with float32 statistics."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs):
        self.scale, self.bias, self.eps = (
            param(rngs, ones, (width,), (None,)),
            param(rngs, zeros, (width,), (None,)),
            eps,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        f = f - jnp.mean(f, axis=-1, keepdims=True)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return (f * self.scale[...] + self.bias[...]).astype(x.dtype)
