"""What lies between encoder and decoder: latents [B, h, w, C] -> codes, latents for the decoder, losses, codebooks after.

    Single    VQ, RQ and UniCode's RQ: one quantiser
    TwoLevel  top = Q_t(down(z)), bottom = Q_b(wide(z - up(top))); latents = [up(top), narrow(bottom)]     HQ-VAE, UniCode
    Levels    coarse to fine: q_l = Q_l(down^(L-1-l)(z) - r_l), r_(l+1) = up(q_l + r_l); latents = r_L     HQ-VAE, L levels
Codebooks are {"name": state of its quantiser}; `wide` and `narrow` exist in UniCode only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.visual_tokenizers import language
from vlm_jax.visual_tokenizers.codebook import Draw, State, draws_from
from vlm_jax.visual_tokenizers.language import Language, LanguageResidual
from vlm_jax.visual_tokenizers.layers import (
    Conv,
    ConvTranspose,
    average_pool,
    nearest_upsample,
    pixel_shuffle,
    pixel_unshuffle,
)
from vlm_jax.visual_tokenizers.options import QuantizerConfig
from vlm_jax.visual_tokenizers.quantizers import VQ, Averaged, Residual

Codebooks = Mapping[str, State]


class Coded(NamedTuple):
    """codes: one int32 array per level, coarsest first; latents [B, h, w, D] for post_quant_conv."""

    codes: tuple[jax.Array, ...]
    latents: jax.Array
    losses: dict[str, jax.Array]
    codebooks: dict[str, State]
    metrics: dict[str, jax.Array]


class Single(nnx.Module):
    """One quantiser, whose state is codebooks["codebook"]."""

    def __init__(self, c: QuantizerConfig, rngs: nnx.Rngs):
        self.config = c
        self.quantizer = (LanguageResidual(c) if c.language else Residual(c)) if c.kind == "rq" else VQ(c)

    def initial(self, key: jax.Array, table: Any = None) -> dict[str, State]:
        """Codebooks before training; table: token embeddings for a language-driven quantiser."""
        return {"codebook": _initial(self.quantizer, key, table)}

    def draws(self, key: jax.Array) -> Sequence[Draw]:
        """What `encode` needs to restart unused codes: one draw per depth."""
        return [draws_from(k) for k in jax.random.split(key, self.config.depth)]

    def encode(self, z: jax.Array, codebooks: Codebooks, *, train: bool = False, ratio=0.0, draws=None) -> Coded:
        """z [B, h, w, D]."""
        found = _encode(self.quantizer, z, codebooks["codebook"], train, ratio, draws)
        metrics = found.metrics | _gap(self.config, found.state)
        return Coded((found.codes,), found.latents, found.losses, {"codebook": found.state}, metrics)

    def decode(self, codes: Sequence[jax.Array | None], codebooks: Codebooks) -> jax.Array:
        """Latents of one array of codes."""
        return self.quantizer.decode(codes[0], codebooks["codebook"])


class TwoLevel(nnx.Module):
    """Top and bottom codes; codebooks "top" and "bottom", or "top" alone where `shared`."""

    def __init__(self, c: QuantizerConfig, rngs: nnx.Rngs):
        self.config = c
        fine, conv = c.latent_width, c.upsample == "conv"
        coarse = fine * c.factor**2 if c.upsample == "pixelshuffle" else fine
        self.down_conv = Conv(fine, fine, c.factor, rngs, stride=c.factor) if conv else None
        self.up_conv = ConvTranspose(fine, fine, c.factor, rngs) if conv else None
        self.wide = Conv(fine, c.width, 1, rngs) if c.language else None
        self.narrow = Conv(c.width, fine, 1, rngs) if c.language else None
        self.top = Language(c) if c.language else Averaged(c, c.codes_of(0), coarse)
        self.bottom = self.top if c.shared else Averaged(c, c.codes_of(1), fine)
        self.bottom_name = "top" if c.shared else "bottom"

    def initial(self, key: jax.Array, table: Any = None) -> dict[str, State]:
        """Codebooks before training."""
        books = {"top": _initial(self.top, key, table)}
        return books if self.config.shared else books | {"bottom": self.bottom.initial(jax.random.fold_in(key, 1))}

    def draws(self, key: jax.Array) -> Sequence[Draw]:
        """What `encode` needs to restart unused codes: one draw per level."""
        return [draws_from(k) for k in jax.random.split(key, 2)]

    def down(self, x: jax.Array) -> jax.Array:
        """Bottom resolution -> top resolution."""
        return _down(self.config, x) if self.down_conv is None else self.down_conv(x)

    def up(self, x: jax.Array) -> jax.Array:
        """Top resolution -> bottom resolution."""
        return _up(self.config, x) if self.up_conv is None else self.up_conv(x)

    def encode(self, z: jax.Array, codebooks: Codebooks, *, train: bool = False, ratio=0.0, draws=None) -> Coded:
        """z [B, h, w, D] at the bottom's resolution; a shared table that trains changes between the levels."""
        draws = draws or (None, None)
        top = _encode(self.top, self.down(z), codebooks["top"], train, ratio, draws[0])
        after = dict(codebooks) | {"top": top.state}
        up = self.up(top.latents)
        left = z - up
        left = left if self.wide is None else self.wide(left)
        bottom = _encode(self.bottom, left, after[self.bottom_name], train, ratio, draws[1])
        after[self.bottom_name] = bottom.state
        fine = bottom.latents if self.narrow is None else self.narrow(bottom.latents)
        metrics = {f"top/{k}": v for k, v in top.metrics.items()} | {
            f"bottom/{k}": v for k, v in bottom.metrics.items()
        }
        metrics |= {"residual": jnp.mean(jnp.abs(left))} | _gap(self.config, after["top"])
        losses = {"commit_top": top.losses["commit"], "commit_bottom": bottom.losses["commit"]}
        return Coded((top.codes, bottom.codes), jnp.concatenate([up, fine], -1), losses, after, metrics)

    def decode(self, codes: Sequence[jax.Array | None], codebooks: Codebooks) -> jax.Array:
        """Latents of (top, bottom); where one is None its rows are 0, before the upsampling that may add a bias."""
        top, bottom = codes
        if top is None and bottom is None:
            raise ValueError("decode needs the codes of at least one level")
        if top is None:
            b, h, w = bottom.shape
            rows = jnp.zeros(
                (b, h // self.config.factor, w // self.config.factor, codebooks["top"]["embedding"].shape[1])
            )
        else:
            rows = self.top.decode(top, codebooks["top"])
        up = self.up(rows)
        if bottom is None:
            wide = self.config.width if self.narrow is not None else up.shape[-1]
            fine = jnp.zeros((*up.shape[:3], wide))
        else:
            fine = self.bottom.decode(bottom, codebooks[self.bottom_name])
        return jnp.concatenate([up, fine if self.narrow is None else self.narrow(fine)], -1)


class Levels(nnx.Module):
    """As many codebooks "level_0" (coarsest) ... as `codes` has numbers; latents are summed."""

    def __init__(self, c: QuantizerConfig, rngs: nnx.Rngs):
        self.config, self.count = c, len(c.codes)
        grow = c.factor**2 if c.upsample == "pixelshuffle" else 1
        self.quantizers = tuple(
            Averaged(c, codes, c.width * grow ** (self.count - 1 - level)) for level, codes in enumerate(c.codes)
        )
        if c.upsample == "conv":
            for level in range(self.count - 1):
                setattr(self, f"down_{level}", Conv(c.width, c.width, c.factor, rngs, stride=c.factor))
                setattr(self, f"up_{level}", ConvTranspose(c.width, c.width, c.factor, rngs))

    def initial(self, key: jax.Array, table: Any = None) -> dict[str, State]:
        """Codebooks before training."""
        return {f"level_{i}": q.initial(jax.random.fold_in(key, i)) for i, q in enumerate(self.quantizers)}

    def draws(self, key: jax.Array) -> Sequence[Draw]:
        """What `encode` needs to restart unused codes: one draw per level."""
        return [draws_from(k) for k in jax.random.split(key, self.count)]

    def down(self, level: int, x: jax.Array) -> jax.Array:
        """Resolution of `level` + 1 -> that of `level`."""
        return getattr(self, f"down_{level}")(x) if self.config.upsample == "conv" else _down(self.config, x)

    def up(self, level: int, x: jax.Array) -> jax.Array:
        """Resolution of `level` -> that of `level` + 1."""
        return getattr(self, f"up_{level}")(x) if self.config.upsample == "conv" else _up(self.config, x)

    def encode(self, z: jax.Array, codebooks: Codebooks, *, train: bool = False, ratio=0.0, draws=None) -> Coded:
        """z [B, h, w, D] at the finest resolution."""
        inputs = [z]
        for level in reversed(range(self.count - 1)):
            inputs.insert(0, self.down(level, inputs[0]))
        known, codes, losses, after, signed = jnp.zeros_like(inputs[0]), [], {}, dict(codebooks), 0.0
        for level, quantizer in enumerate(self.quantizers):
            left = inputs[level] - known
            draw = draws[level] if draws else None
            found = quantizer.encode(left, codebooks[f"level_{level}"], train=train, draw=draw)
            signed = signed + (left.mean() if level else 0.0)
            known = found.latents + known
            known = self.up(level, known) if level < self.count - 1 else known
            codes.append(found.codes)
            losses[f"commit_{level}"], after[f"level_{level}"] = found.losses["commit"], found.state
        return Coded(tuple(codes), known, losses, after, {"residual_mean": signed})

    def decode(self, codes: Sequence[jax.Array | None], codebooks: Codebooks) -> jax.Array:
        """Latents of the codes of all levels; a level that is None adds nothing."""
        present = next((i for i, c in enumerate(codes) if c is not None), None)
        if present is None:
            raise ValueError("decode needs the codes of at least one level")
        known = None
        for level, quantizer in enumerate(self.quantizers):
            rows = None if codes[level] is None else quantizer.decode(codes[level], codebooks[f"level_{level}"])
            if known is None and rows is None:
                b, h, w = codes[present].shape
                shrink = self.config.factor ** (present - level)
                rows = jnp.zeros((b, h // shrink, w // shrink, quantizer.width))
            known = rows if known is None else known if rows is None else known + rows
            known = self.up(level, known) if level < self.count - 1 else known
        return known


def bottleneck(c: QuantizerConfig, rngs: nnx.Rngs) -> Single | TwoLevel | Levels:
    """The module of a config."""
    return {"vq": Single, "rq": Single, "two_level": TwoLevel, "levels": Levels}[c.kind](c, rngs)


def _initial(quantizer, key: jax.Array, table: Any) -> State:
    return (
        quantizer.initial(key, table) if isinstance(quantizer, Language | LanguageResidual) else quantizer.initial(key)
    )


def _encode(quantizer, z: jax.Array, state: State, train: bool, ratio, draw):
    if isinstance(quantizer, VQ):
        return quantizer.encode(z, state, train=train)
    if isinstance(quantizer, Language | LanguageResidual):
        return quantizer.encode(z, state, train=train, ratio=ratio, draw=draw)
    return quantizer.encode(z, state, train=train, draw=draw)


def _gap(c: QuantizerConfig, state: State) -> dict[str, jax.Array]:
    return {"cosine_gap": language.cosine_gap(state)} if c.language else {}


def _down(c: QuantizerConfig, x: jax.Array) -> jax.Array:
    return (pixel_unshuffle if c.upsample == "pixelshuffle" else average_pool)(x, c.factor)


def _up(c: QuantizerConfig, x: jax.Array) -> jax.Array:
    return (pixel_shuffle if c.upsample == "pixelshuffle" else nearest_upsample)(x, c.factor)
