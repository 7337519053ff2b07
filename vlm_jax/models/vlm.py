"""The assembled model: tower -> projector -> slots -> language model, and its life as a flat dict of arrays.

batch (all [B, ...], see data.packing): tokens, image_slots, positions, segments int32 [B, T]; images uint8 [B, I, S, S, 3]
                                or features [B, I, P, C] of a frozen tower in their place; for an encoder-decoder
                                also answer_tokens, answer_segments int32 [B, U]
forward(model, batch) -> hidden [B, T, D] or, of the answers, [B, U, D];   logits = hidden @ model.llm.head_kernel()
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import VLMConfig
from vlm_jax.models import scratch
from vlm_jax.models.adapters import attach
from vlm_jax.models.llama import Cache, Llama
from vlm_jax.models.merge import merge_images
from vlm_jax.models.projectors import Projector
from vlm_jax.models.t5 import T5, T5Cache
from vlm_jax.models.views import encode_shown, shown_views
from vlm_jax.models.vit import VisionTower
from vlm_jax.nn.params import Params, logical_axes, merge, normal, param, shardings_of, split
from vlm_jax.parallel.rules import alone, shard


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass runs: activation dtypes, attention implementation, rematerialisation policy."""

    dtype: str = "float32"
    vision_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"


class VLM(nnx.Module):
    """A vision-language model around a decoder (LLaVA) or around an encoder and a decoder (CLIP-FlanT5)."""

    def __init__(self, c: VLMConfig, rngs: nnx.Rngs):
        self.config = c
        self.tower = VisionTower(c.vision, rngs)
        self.projector = Projector(c.projector, c.vision.feature_width, c.llm.width, rngs)
        newline = normal(c.llm.width**-0.5)
        self.image_newline = param(rngs, newline, (c.llm.width,), (None,)) if c.image_newline else None
        self.llm = (T5 if c.encoder_decoder else Llama)(c.llm, rngs)

    def encode_images(
        self, images: jax.Array, compute: Compute = Compute(), image_slots: jax.Array | None = None
    ) -> jax.Array:
        """[B, I, S, S, 3] uint8 or normalised floats -> projected features [B, I*P, D]; image_slots [B, T]: which of them are shown."""
        B, I = images.shape[:2]
        flat = images.reshape(B * I, *images.shape[2:])

        def encode(some: jax.Array) -> jax.Array:
            return self.tower.features(some, jnp.dtype(compute.vision_dtype), compute.attention, compute.remat)

        if image_slots is not None and alone():
            shown = shown_views(image_slots, I, self.config.vision.features)
            features = encode_shown(encode, flat, shown)
        else:
            features = encode(flat)
        return self.project(features.reshape(B, I, *features.shape[1:]), compute)

    def project(self, features: jax.Array, compute: Compute = Compute()) -> jax.Array:
        """The tower's features [B, I, P, C] -> [B, I*P, D]."""
        B, I, P, C = features.shape
        projected = self.projector(features.reshape(B * I, P, C).astype(compute.dtype))
        return shard(projected.reshape(B, I * P, -1), "batch", None, None)

    def embed(
        self, tokens: jax.Array, image_slots: jax.Array, features: jax.Array | None, compute: Compute = Compute()
    ) -> jax.Array:
        """Text embeddings with the features in their slots: [B, T, D]."""
        x = self.llm.embed(tokens, jnp.dtype(compute.dtype))
        if features is None:
            return shard(x, "batch", "length", None)
        newline = None if self.image_newline is None else self.image_newline[...]
        return merge_images(x, features, image_slots, newline)

    def inputs(self, batch: Mapping[str, jax.Array], compute: Compute = Compute()) -> jax.Array:
        """What the language model reads [B, T, D]. Images come as pixels or as the tower's "features"; without both it is text only."""
        slots = batch.get("image_slots")
        features = self.encode_images(batch["images"], compute, slots) if "images" in batch else None
        features = self.project(batch["features"], compute) if "features" in batch else features
        return self.embed(batch["tokens"], slots, features, compute)

    def encode(self, batch: Mapping[str, jax.Array], compute: Compute = Compute()) -> jax.Array:
        """Hidden states [B, T, D] of the encoder of an encoder-decoder."""
        return self.llm.encode(self.inputs(batch, compute), batch["segments"], compute.attention, compute.remat)

    def __call__(
        self, batch: Mapping[str, jax.Array], cache: Cache | T5Cache | None = None, compute: Compute = Compute()
    ) -> tuple[jax.Array, Cache | T5Cache | None]:
        """Batch -> (hidden [B, T, D], cache); of an encoder-decoder the hidden states of its answers [B, U, D].

        With an encoder-decoder's cache, which holds what was encoded, the batch is decoder tokens and segments [B, U].
        """
        how = compute.attention, compute.remat
        if not self.config.encoder_decoder:
            return self.llm(self.inputs(batch, compute), batch["positions"], batch["segments"], cache, *how)
        if cache is not None:
            return self.llm.append(batch["tokens"], batch["segments"], cache, compute.attention)
        answers = batch["answer_tokens"], batch["answer_segments"]
        return self.llm.decode(*answers, self.encode(batch, compute), batch["segments"], *how), None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        return jnp.matmul(hidden, self.llm.head_kernel().astype(hidden.dtype), preferred_element_type=jnp.float32)


def forward(model: VLM, batch: Mapping[str, jax.Array], compute: Compute = Compute()) -> jax.Array:
    """Final-normed hidden states [B, T, D] of a row batch; those of its answers [B, U, D] where there is an encoder."""
    return model(batch, None, compute)[0]


@functools.lru_cache(maxsize=32)
def abstract(config: VLMConfig) -> VLM:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: _make(config, 0))


def _make(config: VLMConfig, seed: int) -> VLM:
    """A random model with its adapters and quantised kernels."""
    return attach(VLM(config, nnx.Rngs(seed)), config, seed)


@functools.lru_cache(maxsize=32)
def graph(config: VLMConfig) -> nnx.GraphDef:
    """Static structure, the first argument of `merge`."""
    return split(abstract(config))[0]


def shapes(config: VLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{"path": shape and dtype} of every parameter."""
    return split(abstract(config))[1]


def axes(config: VLMConfig) -> dict[str, tuple[str | None, ...]]:
    """{"path": logical axes} of every parameter."""
    return logical_axes(abstract(config))


def build(config: VLMConfig, params: Mapping[str, jax.Array]) -> VLM:
    """The model that computes with `params`."""
    return merge(graph(config), params)


def count(config: VLMConfig) -> int:
    """Number of parameters, unused tower layers included."""
    return sum(math.prod(s.shape) for s in shapes(config).values())


def init(config: VLMConfig, seed: int, dtypes: Mapping[str, str] | None = None) -> Params:
    """Random parameters, each created directly with its sharding when a mesh is in use.

    dtypes: {"path": dtype} for leaves that are not kept in float32 (frozen ones); the cast happens inside the same program.
    """
    dtypes = dtypes or {}

    def make() -> Params:
        params = split(_make(config, seed))[1]
        params = scratch.draw(params, seed, config) if config.init == "scratch" else params
        return {path: x.astype(dtypes.get(path, x.dtype)) for path, x in params.items()}

    return jax.jit(make, out_shardings=shardings(config))()


def shardings(config: VLMConfig) -> dict[str, jax.sharding.NamedSharding] | None:
    """{"path": NamedSharding} under the mesh in use, None without one."""
    return shardings_of(abstract(config))
