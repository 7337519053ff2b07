"""Soft labels for a prior: how near every code of the tokenizer is to a latent, softmax(-distance / temperature), per depth or level.

RQ-Transformers train on them with temperature 0.5 and codes that are drawn from them, HQ-Transformers with 1 and the nearest codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.config import ConfigError
from vlm_jax.visual_tokenizers.bottlenecks import Codebooks, Levels, Single, TwoLevel
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.options import QuantizerConfig
from vlm_jax.visual_tokenizers.quantizers import soft_choice

Arrays = tuple[jax.Array, ...]


def check_soft(c: QuantizerConfig) -> None:
    """Raise ConfigError unless the quantiser has soft labels."""
    if c.language:
        raise ConfigError("soft labels need a codebook of the tokenizer's own, not one drawn towards a language model")
    if c.kind == "vq":
        raise ConfigError(
            "soft labels are for tokenizers with quantizer.kind rq, two_level or levels, and this one's is vq"
        )


def soft_labels(
    bottleneck: Single | TwoLevel | Levels,
    z: jax.Array,
    codebooks: Codebooks,
    temperature: float,
    key: jax.Array | None = None,
) -> tuple[Arrays, Arrays]:
    """(codes, labels float32 [..., V]) of latents [B, h, w, D], one array per level; of residual codes [B, h, w, depth] one.

    key: draws codes from their labels, each depth or level from what the drawn ones before it left; None takes the nearest.
    """
    c = bottleneck.config
    check_soft(c)
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    if isinstance(bottleneck, Single):
        labels, codes = bottleneck.quantizer.soft_codes(z, codebooks["codebook"], temperature, key)
        return (codes,), (labels,)

    def choose(level: int, x: jax.Array, book: str) -> tuple[jax.Array, jax.Array]:
        of_level = None if key is None else jax.random.fold_in(key, level)
        return soft_choice(x, codebooks[book][TABLE], temperature, c.tile, of_level)

    found = (_of_two if isinstance(bottleneck, TwoLevel) else _of_levels)(bottleneck, z, codebooks, choose)
    labels, codes = zip(*found)
    return codes, labels


def _of_two(bottleneck: TwoLevel, z: jax.Array, codebooks: Codebooks, choose) -> list[tuple[jax.Array, jax.Array]]:
    """(labels, codes) of both levels, each chosen from what the one before it left."""
    top = choose(0, bottleneck.down(z), "top")
    rows = bottleneck.top.decode(top[1], codebooks["top"])
    return [top, choose(1, z - bottleneck.up(rows), bottleneck.bottom_name)]


def _of_levels(bottleneck: Levels, z: jax.Array, codebooks: Codebooks, choose) -> list[tuple[jax.Array, jax.Array]]:
    """The same of as many levels as there are."""
    inputs, found = [z], []
    for level in reversed(range(bottleneck.count - 1)):
        inputs.insert(0, bottleneck.down(level, inputs[0]))
    known = jnp.zeros_like(inputs[0])
    for level, quantizer in enumerate(bottleneck.quantizers):
        book = f"level_{level}"
        found.append(choose(level, inputs[level] - known, book))
        known = known + quantizer.decode(found[-1][1], codebooks[book])
        known = bottleneck.up(level, known) if level < bottleneck.count - 1 else known
    return found
