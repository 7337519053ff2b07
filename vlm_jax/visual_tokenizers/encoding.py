"""A visual tokenizer's encoder by itself: uint8 pixels -> codes, for `tokenize` and for priors that are trained on images.

float32 means float32: convolutions and the search in the codebook use the highest precision that a device has, so that codes are those
of the original programs and do not depend on the batch. UniCode's scale, a mean over its batch, is that of each image alone here.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.visual_tokenizers.bottlenecks import Codebooks
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.tokenizer import VisualTokenizer


def levels_of(config: TokenizerConfig) -> int:
    """Arrays of codes that an image has."""
    return len(config.quantizer.books)


def entries_of(config: TokenizerConfig) -> tuple[int, ...]:
    """Entries of the codebook of each level, coarsest first."""
    q = config.quantizer
    return tuple(q.codes_of(0 if q.shared else level) for level in range(levels_of(config)))


def code_shapes(config: TokenizerConfig, size: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(entries of the codebook, shape of the codes of an image of `size` pixels) per level, coarsest first."""
    q, reduction = config.quantizer, config.autoencoder.reduction
    entries = entries_of(config)
    sides = [size // (reduction * q.factor**k) for k in reversed(range(len(entries)))]
    depth = (q.depth,) if q.kind == "rq" else ()
    return tuple((n, (side, side, *depth)) for n, side in zip(entries, sides))


@functools.lru_cache(maxsize=8)
def abstract_encoder(config: TokenizerConfig) -> VisualTokenizer:
    """A tokenizer that can encode and nothing else, with shapes in place of arrays."""
    model = nnx.eval_shape(lambda: VisualTokenizer(config, nnx.Rngs(0)))
    model.decoder = model.post_quant_conv = None
    return model


def to_unit(pixels: jax.Array, dtype: str = "float32") -> jax.Array:
    """uint8 -> [-1, 1], in the steps of torchvision."""
    return ((pixels.astype(jnp.float32) / 255 - 0.5) / 0.5).astype(dtype)


def exact(dtype: str) -> contextlib.AbstractContextManager:
    """What is traced inside multiplies as precisely as `dtype` says."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def encode(
    model: VisualTokenizer, pixels: jax.Array, codebooks: Codebooks, dtype: str = "float32"
) -> tuple[jax.Array, ...]:
    """Codes int32 [B, h, w(, depth)] per level, coarsest first, of uint8 [B, S, S, 3]; dtype: of the convolutions."""
    with exact(dtype):
        if not model.config.quantizer.language:
            return model.encode(to_unit(pixels, dtype), codebooks)
        alone = jax.vmap(lambda one: model.encode(to_unit(one[None], dtype), codebooks))
        return tuple(level[:, 0] for level in alone(pixels))
