"""Initial weights for a small model that is trained from nothing, tower included: `VLMConfig.init = "scratch"`.

    kernels            N(0, 1 / inputs), those that write to the residual stream with half that deviation,
                       those of T5's queries N(0, 1 / (inputs H)), because its scores are not divided by sqrt(H)
    patch kernel       N(0, 1 / inputs) less its mean over the pixels of a patch, times 0.2
    position, class    N(0, 0.5^2)                         text embedding   N(0, 0.02^2), of T5 N(0, 1) as T5 was first trained

Why: with one deviation for all (0.02, made for fine-tuning pre-trained parts) the flat colour of a patch is much stronger than a thin
line in it, and patch content much stronger than position, so that training stays on the text's prior for a long time. Filters
without a mean do not see flat colour, and the class token's LayerNorm scales up what is left.
"""

from __future__ import annotations

import math
import re
import zlib

import jax
import jax.numpy as jnp

from vlm_jax.config import VLMConfig
from vlm_jax.nn.params import Params

PATCH_SCALE, POSITION_STD, EMBEDDING_STD, T5_EMBEDDING_STD, RESIDUAL_SCALE = 0.2, 0.5, 0.02, 1.0, 0.5
COLOURS = 3


def standard_deviation(path: str, shape: tuple[int, ...], config: VLMConfig) -> float | None:
    """Of the parameter at `path`; None: it keeps the value it has (norms, biases, what is never computed)."""
    if path.startswith("tower/unused/"):
        return None
    if path in ("tower/position", "tower/cls"):
        return POSITION_STD
    if path == "llm/embed/embedding":
        return T5_EMBEDDING_STD if config.encoder_decoder else EMBEDDING_STD
    if not path.endswith("/kernel"):
        return None
    residual = re.search(r"/((attn|cross)/o|mlp/down)/kernel$", path)
    scale = PATCH_SCALE if path == "tower/patch/kernel" else RESIDUAL_SCALE if residual else 1.0
    if re.match(r"llm/(encoder|decoder)/.*/q/kernel$", path):
        scale = config.llm.head_dim**-0.5
    return scale / math.sqrt(shape[-2])


def draw(params: Params, seed: int, config: VLMConfig) -> Params:
    """`params` with fresh random values where `standard_deviation` gives one; each path has its own random key."""
    out = dict(params)
    for path, old in params.items():
        std = standard_deviation(path, old.shape, config)
        if std is None:
            continue
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        values = std * jax.random.normal(key, old.shape, jnp.float32)
        out[path] = (without_mean(values) if path == "tower/patch/kernel" else values).astype(old.dtype)
    return out


def without_mean(kernel: jax.Array) -> jax.Array:
    """Patch filters [p * p * 3, D] that give 0 for a patch of one colour."""
    pixels = kernel.reshape(-1, COLOURS, kernel.shape[-1])
    return (pixels - pixels.mean(axis=0)).reshape(kernel.shape)
