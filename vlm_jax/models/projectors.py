"""Projectors: vision features -> LLM width. `linear` (LLaVA v1), `mlpNx_gelu` (LLaVA-1.5), `identity`."""

from __future__ import annotations

import jax
from flax import nnx

from vlm_jax.config import ProjectorConfig
from vlm_jax.nn.layers import ACTIVATIONS, Linear


class Projector(nnx.Module):
    """[..., features] -> [..., D]: N linear layers with an activation between them."""

    def __init__(self, c: ProjectorConfig, din: int, dout: int, rngs: nnx.Rngs):
        self.act, self.depth = c.act, c.depth
        for i in range(self.depth):
            axes = (None if i == 0 else "embed", "embed" if i == 0 else None)
            setattr(self, f"layer_{i}", Linear(din if i == 0 else dout, dout, axes, rngs, bias=c.bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = getattr(self, f"layer_{i}")(x if i == 0 else ACTIVATIONS[self.act](x))
        return x
