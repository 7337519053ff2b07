"""Every kind of prior as flat dicts of arrays: structure, shapes, placement and random values of a config.

model = nn.params.merge(structure(config), params)
"""

from __future__ import annotations

import functools

import jax
from flax import nnx

from vlm_jax.nn.params import Params, shardings_of, split
from vlm_jax.visual_tokenizers.priors.gpt import GPT
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.hq_transformer import HQTransformer
from vlm_jax.visual_tokenizers.priors.options import GPTConfig
from vlm_jax.visual_tokenizers.priors.rq_transformer import RQTransformer

Config = GPTConfig | RQTransformerConfig | HQTransformerConfig
Model = GPT | RQTransformer | HQTransformer
KINDS = {GPTConfig: GPT, RQTransformerConfig: RQTransformer, HQTransformerConfig: HQTransformer}


def make(config: Config, seed: int) -> Model:
    """A random model."""
    return KINDS[type(config)](config, nnx.Rngs(seed))


@functools.lru_cache(maxsize=32)
def abstract(config: Config) -> Model:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: make(config, 0))


def structure(config: Config) -> nnx.GraphDef:
    """Static structure, the first argument of `nn.params.merge`."""
    return split(abstract(config))[0]


def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """{"path": shape and dtype} of every parameter."""
    return split(abstract(config))[1]


def shardings(config: Config) -> dict[str, jax.sharding.NamedSharding] | None:
    """{"path": NamedSharding} under the mesh in use, None without one."""
    return shardings_of(abstract(config))


def init(config: Config, seed: int) -> Params:
    """Random parameters, each created directly with its sharding when a mesh is in use."""
    return jax.jit(lambda: split(make(config, seed))[1], out_shardings=shardings(config))()
