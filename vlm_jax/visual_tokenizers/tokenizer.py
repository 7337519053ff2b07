"""Visual tokenizers: images in [-1, 1] -> codes -> images, with codebooks as explicit state beside the parameters.

h = quant_conv(encoder(image));  codes, latents = bottleneck(h, codebooks);  image' = decoder(post_quant_conv(latents))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import ConfigError
from vlm_jax.parallel.rules import shard
from vlm_jax.visual_tokenizers.autoencoder import Decoder, Encoder
from vlm_jax.visual_tokenizers.bottlenecks import Codebooks, Coded, bottleneck
from vlm_jax.visual_tokenizers.codebook import State
from vlm_jax.visual_tokenizers.layers import Conv
from vlm_jax.visual_tokenizers.options import TokenizerConfig


class Reconstruction(NamedTuple):
    """image [B, H, W, 3], unbounded around [-1, 1]; features: what the decoder's last convolution reads; the bottleneck's result."""

    image: jax.Array
    features: jax.Array
    coded: Coded


class VisualTokenizer(nnx.Module):
    """Encoder, bottleneck and decoder of a config; a VQ's table is in the codebooks too, and is trained from there."""

    def __init__(self, c: TokenizerConfig, rngs: nnx.Rngs):
        self.config = c
        self.encoder, self.decoder = Encoder(c.autoencoder, rngs), Decoder(c.autoencoder, rngs)
        self.quant_conv = Conv(c.autoencoder.latent, c.quantizer.latent_width, 1, rngs)
        self.post_quant_conv = Conv(c.quantizer.decoded_width, c.autoencoder.latent, 1, rngs)
        self.bottleneck = bottleneck(c.quantizer, rngs)

    def initial(self, key: jax.Array, table: Any = None) -> dict[str, State]:
        """Codebooks before training; table [V, D]: the token embeddings that a language-driven quantiser approaches."""
        return self.bottleneck.initial(key, table)

    def latents(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, h, w, D] in front of the bottleneck; raises ConfigError for sizes that do not divide."""
        r = self.config.autoencoder.reduction
        if images.shape[1] % r or images.shape[2] % r:
            raise ConfigError(f"images of {images.shape[1]} x {images.shape[2]} pixels: both must be multiples of {r}")
        return self.quant_conv(self.encoder(shard(images, "batch", None, None, None)))

    def encode(self, images: jax.Array, codebooks: Codebooks) -> tuple[jax.Array, ...]:
        """Codes int32 [B, h, w] (or [B, h, w, depth]), one array per level, coarsest first."""
        return self.bottleneck.encode(self.latents(images), codebooks).codes

    def decode(self, codes: Sequence[jax.Array | None], codebooks: Codebooks) -> jax.Array:
        """Images [B, H, W, 3] of codes; None for a level leaves it out."""
        return self.decoder(self.post_quant_conv(self.bottleneck.decode(codes, codebooks)))

    def __call__(
        self,
        images: jax.Array,
        codebooks: Codebooks,
        *,
        train: bool = False,
        ratio: jax.Array | float = 0.0,
        draws=None,
    ) -> Reconstruction:
        """Reconstruct; `train` updates the codebooks, `draws` (of `bottleneck.draws`) restarts unused codes; ratio: see `alignment`."""
        h = self.latents(images).astype(jnp.float32)
        coded = self.bottleneck.encode(h, codebooks, train=train, ratio=ratio, draws=draws)
        features = self.decoder.features(self.post_quant_conv(coded.latents.astype(images.dtype)))
        return Reconstruction(self.decoder.conv_out(features), features, coded)
