"""Soft labels for a prior: how near every code of the tokenizer is to a latent, softmax(-distance / temperature), per depth or level.

RQ-Transformers train on them with temperature 0.5 and codes that are drawn from them, HQ-Transformers with 1 and the nearest codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.bottlenecks import Codebooks, Levels, Single, TwoLevel
from vlm_jax.visual_tokenizers.codebook import TABLE, soft_codes
from vlm_jax.visual_tokenizers.quantizers import Residual

Arrays = tuple[jax.Array, ...]


def soft_labels(
    bottleneck: Single | TwoLevel | Levels,
    z: jax.Array,
    codebooks: Codebooks,
    temperature: float,
    key: jax.Array | None = None,
) -> tuple[Arrays, Arrays]:
    """(codes, labels float32 [..., V]) of latents [B, h, w, D], one array per level; of residual codes [B, h, w, depth] one.

    key: draws residual codes from their labels, each depth from what the drawn ones left; the others are always the nearest.
    """
    if bottleneck.config.language:
        raise ConfigError("soft labels need a codebook of the tokenizer's own, not one drawn towards a language model")
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    if isinstance(bottleneck, TwoLevel | Levels):
        codes = bottleneck.encode(z, codebooks).codes
        inputs, books = _inputs(bottleneck, z, codes, codebooks)
        return codes, tuple(soft_codes(x, codebooks[b][TABLE], temperature) for x, b in zip(inputs, books))
    if not isinstance(bottleneck.quantizer, Residual):
        raise ConfigError("soft labels are for tokenizers with quantizer.kind rq, two_level or levels")
    labels, codes = bottleneck.quantizer.soft_codes(z, codebooks["codebook"], temperature, key)
    return (codes,), (labels,)


def _inputs(bottleneck: TwoLevel | Levels, z: jax.Array, codes: Arrays, codebooks: Codebooks) -> tuple[list, list[str]]:
    """What each level quantises, given the codes of those before it, and the name of its codebook."""
    if isinstance(bottleneck, TwoLevel):
        rows = bottleneck.top.decode(codes[0], codebooks["top"])
        return [bottleneck.down(z), z - bottleneck.up(rows)], ["top", bottleneck.bottom_name]
    books = [f"level_{level}" for level in range(bottleneck.count)]
    inputs = [z]
    for level in reversed(range(bottleneck.count - 1)):
        inputs.insert(0, bottleneck.down(level, inputs[0]))
    known = jnp.zeros_like(inputs[0])
    for level, quantizer in enumerate(bottleneck.quantizers):
        inputs[level], known = inputs[level] - known, known + quantizer.decode(codes[level], codebooks[books[level]])
        known = bottleneck.up(level, known) if level < bottleneck.count - 1 else known
    return inputs, books
