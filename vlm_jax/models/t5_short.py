"""T5's decoder over a few answer slots, without the keys and values of what was encoded.

    scores   (x Wq) (M Wk)^T  =  ((x Wq) Wk^T) M^T          M: encoded slots [B, T, D]
    values   P (M Wv)         =  (P M) Wv                   P: attention weights [B, N, U, T]

U answer slots cost 4 U N T D operations per layer in place of 4 T D N H: for the two of a yes with its EOS the share H / U less.
Numbers are those of `T5.decode` to rounding; nothing is dropped here, which makes it a decoder of scoring and not of training.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.models.t5 import T5, Attention, DecoderBlock
from vlm_jax.nn.attention import NEGATIVE, Mask
from vlm_jax.nn.params import scan
from vlm_jax.nn.relative_position import diagonals

SHORT = 16  # answer slots up to which this pays


def decode_short(
    llm: T5, tokens: jax.Array, segments: jax.Array, memory: jax.Array, memory_segments: jax.Array, impl: str = "auto"
) -> jax.Array:
    """tokens and segments [B, U], what the encoder made of the rows [B, T, D] -> final-normed hidden states [B, U, D]."""
    U, side = tokens.shape[1], llm.decoder
    bias = diagonals(side.relative[...], U, U, bidirectional=False, max_distance=llm.config.max_distance)
    own = Mask(True, None, segments, segments, diagonals=bias)
    allowed = Mask(q_segments=segments, k_segments=memory_segments).allowed(U, memory.shape[1])

    def step(block: DecoderBlock, x: jax.Array, _) -> tuple[jax.Array, None]:
        normed = block.norm1(x)
        x = x + block.attn(normed, *block.attn.keys_values(normed), own, impl)
        x = x + _cross(block.cross, block.norm2(x), memory, allowed)
        return x + block.mlp(block.norm3(x)), None

    x, _ = scan(side.blocks, step, llm.embed(tokens, memory.dtype))
    return side.norm(x)


def _cross(cross: Attention, x: jax.Array, memory: jax.Array, allowed: jax.Array) -> jax.Array:
    """Cross-attention of the module docstring: x [B, U, D], memory [B, T, D], allowed bool [B, 1, U, T] -> [B, U, D]."""
    B, U, D = x.shape
    into, out_of = (part.weight().astype(x.dtype).reshape(D, cross.heads, -1) for part in (cross.k, cross.v))
    queries = jnp.einsum("BUNH,DNH->BNUD", cross.q(x).reshape(B, U, cross.heads, -1), into)
    scores = jnp.einsum("BNUD,BTD->BNUT", queries, memory, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(allowed, scores, NEGATIVE), axis=-1).astype(x.dtype)
    mixed = jnp.einsum("BNUT,BTD->BNUD", weights, memory)
    return cross.o(jnp.einsum("BNUD,DNH->BUNH", mixed, out_of).reshape(B, U, -1))
