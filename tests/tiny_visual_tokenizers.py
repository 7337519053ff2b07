"""Visual tokenizers small enough for tests: one of every kind, with random tensors under their original names."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.visual_tokenizers import names
from vlm_jax.visual_tokenizers.codebook import COUNT
from vlm_jax.visual_tokenizers.options import AutoencoderConfig, QuantizerConfig, TokenizerConfig

PLAIN = AutoencoderConfig(width=32, multipliers=(1, 2), blocks=1, attention=(128,), latent=16)
HALVED = dataclasses.replace(PLAIN, multipliers=(1, 1), attention=(64,), init_downsample=True)
DEEP = dataclasses.replace(PLAIN, multipliers=(1, 2, 1), attention=(64, 256), blocks=2)

TINY = {
    "vq": TokenizerConfig(PLAIN, QuantizerConfig(codes=(24,), width=8, normalise=True)),
    "vq_deep": TokenizerConfig(DEEP, QuantizerConfig(codes=(40,), width=4, normalise=True)),
    "rq": TokenizerConfig(PLAIN, QuantizerConfig("rq", (24,), 8, depth=3, shared=True, restart=True), "taming"),
    "rq_unshared": TokenizerConfig(PLAIN, QuantizerConfig("rq", (24,), 8, depth=3, restart=True), "taming"),
    "hq": TokenizerConfig(HALVED, QuantizerConfig("two_level", (24, 20), 8), "taming"),
    "hq_nearest": TokenizerConfig(HALVED, QuantizerConfig("two_level", (24,), 8, upsample="nearest"), "taming"),
    "hq_shared": TokenizerConfig(
        HALVED, QuantizerConfig("two_level", (24,), 8, upsample="conv", shared=True), "taming"
    ),
    "hq3": TokenizerConfig(HALVED, QuantizerConfig("levels", (24, 20, 16), 8), "taming"),
    "hq3_conv": TokenizerConfig(HALVED, QuantizerConfig("levels", (24, 24), 8, upsample="conv"), "taming"),
    "unicode_hq": TokenizerConfig(
        HALVED, QuantizerConfig("two_level", (24,), 32, shared=True, language=True), "taming"
    ),
    "unicode_rq": TokenizerConfig(
        PLAIN, QuantizerConfig("rq", (24,), 32, shared=True, restart=True, language=True), "taming"
    ),
}


def tensors(config: TokenizerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint of `config`: small random kernels, distinct codebooks, those of a shared table repeated."""
    rng, made = np.random.default_rng(seed), {}
    for entry in names.entries(config):
        first = made.get(entry.path) if entry.again else None
        if first is not None:
            made[entry.key] = first
            continue
        if entry.path == names.TOKENS:
            value = np.arange(entry.shape[0], dtype=np.int64)
        elif entry.path == COUNT:
            value = rng.uniform(1, 2, entry.shape).astype(np.float32)
        else:
            fan = max(1, int(np.prod(entry.shape[1:]))) if len(entry.shape) == 4 else 1
            value = (rng.standard_normal(entry.shape) / fan**0.5).astype(np.float32)
        if entry.layout == "padded":
            value[-1] = 0
        if entry.key == names.USED:
            value = np.zeros(entry.shape, np.float32)
        made[entry.key] = value
        if entry.book:
            made.setdefault(entry.path, value)
    return {entry.key: made[entry.key] for entry in names.entries(config)}
