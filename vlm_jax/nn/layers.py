"""Linear, embedding and norm layers, and the activation table. Kernels are (in, out); statistics are float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import LoRAConfig, QuantConfig
from vlm_jax.nn import quantise
from vlm_jax.nn.dropout import dropout
from vlm_jax.nn.params import normal, ones, param, zeros
from vlm_jax.parallel.rules import alone, platform, shard


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


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """[..., in] @ [in, out] -> [..., out]; dtype: of the sums and the result (default: of x).

    On one CPU the leading axes become one, because XLA's backward pass is then 15 % faster there; elsewhere they stay apart, so that each
    keeps its sharding.
    """
    if x.ndim > 2 and platform() == "cpu" and alone():
        rows = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
        return rows.reshape(*x.shape[:-1], kernel.shape[-1])
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


class Linear(nnx.Module):
    """y = x W (+ b): [..., in] -> [..., out], computed in the dtype of x. The only place where a kernel is read.

    `adapt` adds s dropout(x) A B to y, `store` keeps W in few bits; both may come after `params.stack`, so that every leaf has a
    leading layer axis. `called`: whether x passes through here (False: only `weight` is used).

        lora_a [in, R]   lora_b [R, out]   lora_scale [R] float32: s, of every adapter where several lie side by side in R
    """

    called = True
    quant = lora_a = lora_b = lora_scale = None
    rate, place = 0.0, 0

    def __init__(
        self, din: int, dout: int, axes: tuple[str | None, str | None], rngs: nnx.Rngs, *, bias: bool, std: float = 0.02
    ):
        self.kernel = param(rngs, normal(std), (din, dout), axes)
        self.bias = param(rngs, zeros, (dout,), axes[1:]) if bias else None
        self.axes, self.std = axes, std

    def adapt(self, group: LoRAConfig, key: jax.Array, place: int) -> None:
        """Give the linear an adapter that changes nothing yet: A uniform in +-1/sqrt(in) (kaiming with a = sqrt 5), B zero.

        place: its number in `dropout`.
        """
        *layers, din, dout = self.shape
        bound = din**-0.5
        a = jax.random.uniform(key, (*layers, din, group.rank), jnp.float32, -bound, bound)
        # where in or out is not what FSDP cuts, the ranks are, or the factor and its moments would be whole on every chip
        over = ["embed" if name != "embed" else None for name in self.axes]
        self.lora_a = nnx.Param(a, axes=(self.axes[0], over[0]))
        self.lora_b = nnx.Param(jnp.zeros((*layers, group.rank, dout), jnp.float32), axes=(over[1], self.axes[1]))
        self.lora_scale = nnx.Param(jnp.full((*layers, group.rank), group.scale, jnp.float32), axes=(None,))
        self.rate, self.place = group.dropout, place

    def store(self, quant: QuantConfig, key: jax.Array, std: float) -> None:
        """Replace the kernel by the quantised leaves of a random one, N(0, std^2), made one layer at a time."""
        *layers, din, dout = self.shape

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            return quantise.quantise(std * jax.random.normal(key, (din, dout), jnp.float32), quant, jnp)

        leaves = jax.lax.map(draw, jax.random.split(key, layers[0])) if layers else draw(key)
        for name, like in quantise.layout((din, dout), self.axes, quant).items():
            setattr(self, name, nnx.Param(leaves[name], axes=like.axes))
        self.kernel, self.quant = None, quant

    @property
    def shape(self) -> tuple[int, ...]:
        """([layers,] in, out) of a kernel that is not quantised."""
        return self.kernel.get_value().shape

    def weight(self) -> jax.Array:
        """[in, out]: the kernel with its adapters."""
        w = self.kernel[...] if self.quant is None else quantise.dequantise(self._leaves(), self.quant, jnp.float32)
        return w if self.lora_a is None else w + (self.lora_a[...] * self.lora_scale[...]) @ self.lora_b[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...].astype(x.dtype)) if self.quant is None else self._quantised_product(x)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return y if self.lora_a is None else y + self._adapter(x)

    def _leaves(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in quantise.NAMES if hasattr(self, name)}

    def _quantised_product(self, x: jax.Array) -> jax.Array:
        """x W; what a backward pass keeps are the leaves, never the dequantised kernel (which scan would stack over all layers)."""

        def dequantised(x: jax.Array, leaves: dict[str, jax.Array]) -> jax.Array:
            return product(x, quantise.dequantise(leaves, self.quant, x.dtype))

        return jax.checkpoint(dequantised, prevent_cse=False)(x, self._leaves())

    def _adapter(self, x: jax.Array) -> jax.Array:
        """((dropout(x) A) s) B, the narrow product scaled in float32."""
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        narrow = product(dropout(x, self.rate, self.place), a, jnp.float32)
        return product((narrow * self.lora_scale[...]).astype(x.dtype), b)


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
