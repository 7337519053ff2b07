"""RQ- and HQ-Transformers small enough to be compiled by a test, one for every way that their parts can be."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from vlm_jax.nn.params import merge
from vlm_jax.visual_tokenizers.priors import models
from vlm_jax.visual_tokenizers.priors.hierarchy_options import HQTransformerConfig, RQTransformerConfig, StackConfig

ONE = {"body": StackConfig(1, 16, 2), "head": StackConfig(1, 16, 4)}
RQ = functools.partial(RQTransformerConfig, grid=(2, 3), depth=2, codes=12, code_width=6, conditions=5, **ONE)
HQ = functools.partial(HQTransformerConfig, grid=2, codes=(9, 12), positions=4, classes=5, **ONE)
KINDS = {
    "rq": RQ(body=StackConfig(2, 16, 2)),
    "rq_apart": RQ(codebook_body=False, shared_tokens=False, shared_head=False, cumulative=False),
    "rq_own_text": RQ(codebook_body=False, codebook_head=False, condition_tokens=3),
    "hq_text": HQ(
        body=StackConfig(2, 16, 2), condition="text", text_codes=7, text_tokens=3, embedding="reduce", axes=True
    ),
    "hq_top2bot": HQ(order="top2bot", embedding="multiple", condition="none"),
    "hq_bidirectional": HQ(
        order="bidirectional",
        embedding="bidirectional",
        embedding_layers=2,
        positions=9,
        body=StackConfig(1, 16, 2, "quick_gelu", False, False),
    ),
    "hq_three": HQ(codes=(9, 12, 10), weights=(1.0, 4.0, 16.0)),
}


def is_rq(config) -> bool:
    """Whether a config is one of an RQ-Transformer."""
    return isinstance(config, RQTransformerConfig)


@functools.cache
def params_of(config):
    """Random parameters that are large enough for codes to differ: norms around 1, all else N(0, 0.4^2)."""
    rng = np.random.RandomState(0)
    made = {k: 0.4 * rng.normal(size=s.shape) + k.endswith("scale") for k, s in models.shapes(config).items()}
    return {k: jnp.asarray(v, jnp.float32) for k, v in made.items()}


def condition_of(config, rows: int = 3):
    """Condition of some rows, or None."""
    rng = np.random.RandomState(1)
    if is_rq(config):
        return jnp.asarray(rng.randint(0, config.conditions, (rows, config.condition_tokens)), jnp.int32)
    known = {
        "class": (config.classes, (rows,)),
        "text": (config.text_codes, (rows, config.text_tokens)),
        "none": (1, ()),
    }
    high, shape = known[config.condition]
    return jnp.asarray(rng.randint(0, high, shape), jnp.int32) if shape else None


def codes_of(config, rows: int = 3):
    """Random codes of some images, as the model takes them."""
    rng = np.random.RandomState(2)
    if is_rq(config):
        return jnp.asarray(rng.randint(0, config.codes, (rows, *config.grid, config.depth)), jnp.int32)
    sides = [config.grid * 2**level for level in range(config.levels)]
    return tuple(jnp.asarray(rng.randint(0, n, (rows, s, s)), jnp.int32) for n, s in zip(config.codes, sides))


def table_of(config):
    """The tokenizer's table that an RQ-Transformer reads, one per depth where it has heads per depth; else None."""
    if not is_rq(config) or not config.reads_codebook:
        return None
    shape = (config.codes, config.code_width) if config.shared_head else (config.depth, config.codes, config.code_width)
    return jnp.asarray(np.random.RandomState(3).normal(size=shape), jnp.float32)


def forward(config, params, codes, condition):
    """Logits by teacher forcing."""
    model = merge(models.structure(config), params)
    return model(codes, table_of(config), condition) if is_rq(config) else model(codes, condition)
